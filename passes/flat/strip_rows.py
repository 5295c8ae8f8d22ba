"""Strip rows: which operations can be computed in pieces, besides those that `stream` knows.

    tril(m)[:, 4:8]  =  tril(m[:, 4:8], 4)         conv1d(x, w, padding=3)[4:8]  =  conv1d(x[1:8], w)

Along the dimensions that an operation treats as a batch a piece of the result is made of the same piece of
its operands; a triangle moves with its rows and columns; a convolution reads a few positions beside its
piece.

Requires: nodes with `meta["val"]`.  All of it is exact; kernels of other sizes may round differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from rmtcompile.passes.flat.functionalise import bind, overload_name
from rmtcompile.passes.flat.store_forwarding.nodes import is_static_tensor, shape_of
from rmtcompile.passes.flat.store_forwarding.stores import store_of
from rmtcompile.passes.flat.stream import Dims, passed_on, row_wise

TRIANGLES = ("tril", "triu")

DRAWS = ("dropout", "bernoulli", "rand_like", "randn_like")
"""Operations that draw a number for each element by itself; which one does not depend on the others."""


def rows_of(node: fx.Node, d: int) -> Dims | None:
    """As `row_wise`: which dimension of which operands a load along `d` loads."""
    name, rank = overload_name(node), len(shape_of(node))
    if name in TRIANGLES:
        return {bind(node)["self"]: d} if d < rank - 2 else None
    if name == "einsum":
        return _einsum(node, d)
    if name == "scaled_dot_product_attention":
        return _attention(node, d, rank)
    return row_wise(node, d)


def _einsum(node: fx.Node, d: int) -> Dims | None:
    """The letter of a dimension of the result, in each operand that has it."""
    bound = bind(node)
    equation, operands = str(bound["equation"]).replace(" ", ""), list(bound["tensors"])
    if "->" not in equation or "." in equation or len(set(operands)) < len(operands):
        return None
    inputs, result = equation.split("->")
    found: Dims = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        if letters.count(result[d]) > 1 or not is_static_tensor(operand):
            return None
        at = letters.find(result[d])
        if at >= 0 and shape_of(operand)[at] == shape_of(node)[d]:
            found[operand] = at
    return found or None


def _attention(node: fx.Node, d: int, rank: int) -> Dims | None:
    """Batches of attention, and queries."""
    bound = bind(node)
    q, k, v, mask = bound["query"], bound["key"], bound["value"], bound.get("attn_mask")
    if len({q, k, v}) < 3 or bound["dropout_p"] or d == rank - 1 or bound.get("enable_gqa"):
        return None
    if d == rank - 2 and bound["is_causal"]:
        return None
    found: Dims = {}
    for operand in (q,) if d == rank - 2 else (q, k, v):
        at = d - (rank - len(shape_of(operand)))
        if at >= 0 and shape_of(operand)[at] == shape_of(node)[d]:
            found[operand] = at
    if mask is not None and (at := d - (rank - len(shape_of(mask)))) >= 0:
        if mask in found:
            return None
        if shape_of(mask)[at] == shape_of(node)[d]:
            found[mask] = at
    return found


def places_of(node: fx.Node, operand: fx.Node, d: int) -> list[int]:
    """As `passed_on`: along which dimensions of a node a load is one of dimension `d` of an operand."""
    if overload_name(node) in DRAWS and shape_of(node) == shape_of(operand):
        return [d]
    name, rank = overload_name(node), len(shape_of(node))
    if name in TRIANGLES:
        return [d]
    if name in ("einsum", "scaled_dot_product_attention"):
        return [o for o in range(rank) if (rows_of(node, o) or {}).get(operand) == d]
    if name in ("roll", "flip"):
        dims = bind(node)["dims"]
        return [d] if d not in [k % rank for k in ([dims] if isinstance(dims, int) else dims)] else []
    if name in ("select_scatter", "slice_scatter") and (store := store_of(node)) is not None:
        base, src, at, stored = store
        own = [d] if operand is base and d != at else []
        return own + ([d + (stored.drop and d >= at)] if operand is src and (stored.drop or d != at) else [])
    return passed_on(node, operand, d)


@dataclass(frozen=True)
class Window:
    """A convolution along the last dimension: what it reads besides a piece, on either side."""

    source: fx.Node
    padding: int
    beyond: int


def window_of(node: fx.Node) -> Window | None:
    """A convolution of one dimension whose steps are single positions; None for other operations."""
    if overload_name(node) != "conv1d" or not is_static_tensor(node):
        return None
    bound = bind(node)
    stride, padding, dilation = (_one(bound[name]) for name in ("stride", "padding", "dilation"))
    if stride != 1 or padding is None or dilation is None:
        return None
    return Window(bound["input"], padding, dilation * (shape_of(bound["weight"])[-1] - 1))


def _one(value: Any) -> int | None:
    value = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
    return value if type(value) is int else None
