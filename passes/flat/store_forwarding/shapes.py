"""Loads of copies, expansions, permutations and reshapes."""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from rmtcompile.passes.flat.functionalise import PERMUTES, RESHAPES, bind, overload_name
from rmtcompile.passes.flat.store_forwarding.loads import Loads, Rule
from rmtcompile.passes.flat.store_forwarding.nodes import (
    is_reshape,
    is_static_tensor,
    operand_of,
    permutation,
    shape_of,
    val_of,
)
from rmtcompile.passes.flat.store_forwarding.ranges import Range, blocks

aten = torch.ops.aten
COPIES = {"clone", "contiguous", "alias", "to", "_to_copy", "lift_fresh", "positive", "dropout"}


def load_copy(w: Loads, x: fx.Node, d: int, r: Range) -> fx.Node | None:
    """Of a copy: of what was copied."""
    source = x.args[0]
    if not is_static_tensor(source) or not _is_copy(x):
        return None
    assert isinstance(source, fx.Node)
    return w.try_load(source, d, r)


def _is_copy(x: fx.Node) -> bool:
    """Whether a node of a copying kind hands on the very values."""
    source = operand_of(x)
    if overload_name(x) == "dropout":
        bound = bind(x)
        return bound["train"] is False or bound["p"] == 0
    return (
        val_of(source).dtype == val_of(x).dtype
        and val_of(source).device == val_of(x).device
        and shape_of(source) == shape_of(x)
    )


def load_expand(w: Loads, x: fx.Node, d: int, r: Range) -> fx.Node | None:
    """Of an expansion: of its operand, or the operand itself along a repeated dimension."""
    source = operand_of(x)
    shape = list(shape_of(x))
    shape[d : d + 1] = [] if r.drop else [r.n]
    below = d - (len(shape_of(x)) - len(shape_of(source)))
    if below < 0:
        inner: fx.Node | None = source
    elif shape_of(source)[below] == 1:
        inner = w.load(source, below, Range(0, 1, 1, True)) if r.drop else source
    else:
        inner = w.try_load(source, below, r)
    if inner is None or shape_of(inner) == tuple(shape):
        return inner
    return w.emit(aten.expand.default, inner, shape)


def load_permute(w: Loads, x: fx.Node, d: int, r: Range) -> fx.Node | None:
    """Of a permutation: of the operand's dimension that it shows there."""
    order = permutation(x)
    found = w.try_load(operand_of(x), order[d], r)
    if found is None:
        return None
    if r.drop:
        return w.permute(found, [o - (o > order[d]) for o in order if o != order[d]])
    return w.permute(found, order)


def load_reshape(w: Loads, x: fx.Node, d: int, r: Range) -> fx.Node | None:
    """Of a reshape: of the dimensions that it maps onto this one, where they are cut evenly."""
    source = operand_of(x)
    if not is_reshape(x):
        return None
    inner, outer = shape_of(source), shape_of(x)
    shape = [*outer[:d], *([] if r.drop else [r.n]), *outer[d + 1 :]]
    a, b = next(block for block in blocks(inner, outer) if d in block[1])
    if not a:
        return w.reshape(source, shape)
    found: fx.Node | None
    if len(a) == len(b) == 1:
        found = w.try_load(source, a[0], r)
    else:
        ahead = prod(outer[k] for k in b if k < d)
        behind = prod(outer[k] for k in b if k > d)
        if ahead == 1 and r.step == 1:
            found = _load_flat(w, source, a, r.lo * behind, r.n * behind)
        elif behind == 1 and len(a) == 1 and r.drop:
            found = w.try_load(source, a[0], Range(r.lo, ahead, outer[d]))
        else:
            found = None
    return None if found is None else w.reshape(found, shape)


def _load_flat(w: Loads, x: fx.Node, dims: list[int], start: int, count: int) -> fx.Node | None:
    """`count` elements from `start` on of some adjacent dimensions, counted as one."""
    fired = False
    dims = list(dims)
    while dims:
        behind = prod(shape_of(x)[k] for k in dims[1:])
        first, last = start // behind, (start + count - 1) // behind
        whole = start % behind == 0 and count % behind == 0
        if not whole and first != last:
            return None
        r = Range(first, count // behind) if whole else Range(first, 1, 1, True)
        found = w.try_load(x, dims[0], r)
        fired = fired or (found is not None and found is not x)
        x = w.take(x, dims[0], r) if found is None else found
        if whole:
            return x if fired else None
        start -= first * behind
        dims = [k - 1 for k in dims[1:]]
    return None


def undone(w: Loads, node: fx.Node) -> fx.Node | None:
    """The operand, or what is behind it, that has the node's shape already."""
    x = operand_of(node)
    while shape_of(x) != shape_of(node):
        if not is_reshape(x) or not w.is_open(x):
            return None
        x = operand_of(x)
    return x


def permuted(w: Loads, node: fx.Node) -> fx.Node | None:
    """The operand, or what is behind it, whose dimensions are in the node's order already."""
    order, x = list(permutation(node)), operand_of(node)
    while order != sorted(order):
        if overload_name(x) not in PERMUTES or not w.is_open(x):
            return None
        inner = permutation(x)
        order, x = [inner[d] for d in order], operand_of(x)
    return x


RULES: dict[str, Rule] = {
    "expand": load_expand,
    "detach": load_copy,
    **dict.fromkeys(COPIES, load_copy),
    **dict.fromkeys(RESHAPES, load_reshape),
    **dict.fromkeys(PERMUTES, load_permute),
}
