"""Loads of what was put together: stacks, concatenations, rolls, flips, gathers by literal indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rmtcompile.passes.flat.functionalise import bind, overload_name
from rmtcompile.passes.flat.store_forwarding.constants import literal, positions
from rmtcompile.passes.flat.store_forwarding.loads import Loads, Rule
from rmtcompile.passes.flat.store_forwarding.nodes import is_static_tensor, operand_of, shape_of, val_of
from rmtcompile.passes.flat.store_forwarding.ranges import Range

aten = torch.ops.aten
_LONGEST_GATHER = 64


def parts_of(x: fx.Node) -> tuple[list[fx.Node], int] | None:
    """Operands and dimension of a stack or concatenation that converts nothing."""
    bound = bind(x)
    parts, dim = list(bound["tensors"]), bound["dim"] % len(shape_of(x))
    rank = len(shape_of(x)) - (overload_name(x) == "stack")
    plain = all(is_static_tensor(p) and val_of(p).dtype == val_of(x).dtype for p in parts)
    plain = plain and all(len(shape_of(p)) == rank for p in parts)
    return (parts, dim) if plain else None


def _load_each(w: Loads, target: Any, parts: list[fx.Node], at: int, d: int, r: Range) -> fx.Node | None:
    """A load of another dimension than the one along which parts were put together."""
    below = d - (target is aten.stack.default and d > at)
    found = [w.try_load(part, below, r) for part in parts]
    if not [f for f in found if f is not None]:
        return None
    loaded = [w.take(p, below, r) if f is None else f for p, f in zip(parts, found, strict=True)]
    return w.join(target, loaded, at - (r.drop and d < at))


def load_stack(w: Loads, x: fx.Node, d: int, r: Range) -> fx.Node | None:
    """Of a stack: the part, or fewer parts."""
    known = parts_of(x)
    if known is None:
        return None
    parts, at = known
    if d != at:
        return _load_each(w, aten.stack.default, parts, at, d, r)
    if r.drop:
        return parts[r.lo]
    if w.holds and r.n > 1:
        return None
    return w.join(aten.stack.default, [parts[r.at(k)] for k in range(r.n)], at)


def load_cat(w: Loads, x: fx.Node, d: int, r: Range) -> fx.Node | None:
    """Of a concatenation: the parts that it meets."""
    known = parts_of(x)
    if known is None:
        return None
    parts, at = known
    if d != at:
        return _load_each(w, aten.cat.default, parts, at, d, r)
    pieces: list[tuple[fx.Node, Range]] = []
    offset = 0
    for part in parts:
        size = shape_of(part)[at]
        first = max(0, -((r.lo - offset) // r.step))
        last = min(r.n, -((r.lo - offset - size) // r.step))
        if first < last:
            pieces.append((part, r.part(first, last - first, r.at(first) - offset, r.step)))
        offset += size
    if sum(piece.n for _, piece in pieces) < r.n:
        return None  # a load behind the end, which says that the segments are others
    if w.holds and len(pieces) > 1:
        return None
    found = [w.try_load(p, d, piece) for p, piece in pieces]
    moved = [
        f for f, (p, piece) in zip(found, pieces, strict=True) if f is not None and piece.n < shape_of(p)[d]
    ]
    if len(pieces) == len(parts) and not moved and not r.drop and not w.lists:
        return None
    loaded = [w.take(p, d, i) if f is None else f for f, (p, i) in zip(found, pieces, strict=True)]
    return w.join(aten.cat.default, loaded, d)


def load_roll(w: Loads, x: fx.Node, d: int, r: Range) -> fx.Node | None:
    """Of a roll: of one or two pieces of the operand."""
    source, size = operand_of(x), shape_of(x)[d]
    turns = turns_of(x)
    if turns is None:
        return None
    shift = turns.pop(d, 0)
    if not shift:
        found = w.try_load(source, d, r)
    else:
        start = (r.lo - shift) % size
        first = min(r.n, -((start - size) // r.step))
        if w.holds and first < r.n:
            return None
        pieces = [w.load(source, d, r.part(0, first, start, r.step))]
        if first < r.n:
            again = start + first * r.step - size
            pieces.append(w.load(source, d, r.part(first, r.n - first, again, r.step)))
        found = w.join(aten.cat.default, pieces, d)
    if found is None or not turns:
        return found
    dims = [k - (r.drop and d < k) for k in turns]
    return w.emit(aten.roll.default, found, list(turns.values()), dims)


def turns_of(x: fx.Node) -> dict[int, int] | None:
    """How far each dimension is rolled."""
    bound = bind(x)
    shifts, dims = bound["shifts"], bound["dims"]
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    dims = [dims] if isinstance(dims, int) else list(dims)
    if len(shifts) != len(dims) or not all(isinstance(s, int) for s in shifts):
        return None
    turns: dict[int, int] = {}
    for shift, dim in zip(shifts, dims, strict=True):
        k = dim % len(shape_of(x))
        turns[k] = (turns.get(k, 0) + shift) % shape_of(x)[k]
    return turns


def load_flip(w: Loads, x: fx.Node, d: int, r: Range) -> fx.Node | None:
    """Of a flip: of the operand, from the other end."""
    rank = len(shape_of(x))
    dims = [k % rank for k in bind(x)["dims"]]
    if d in dims:
        found = w.try_load(operand_of(x), d, Range(shape_of(x)[d] - 1 - r.at(r.n - 1), r.n, r.step, r.drop))
    else:
        found = w.try_load(operand_of(x), d, r)
    dims = [k - (r.drop and d < k) for k in dims if not (r.drop and k == d)]
    return found if found is None or not dims else w.emit(aten.flip.default, found, dims)


def load_gather(w: Loads, x: fx.Node, d: int, r: Range) -> fx.Node | None:
    """Of a gather: of the index that it names."""
    gather = _gather(w, x)
    if gather is None or not r.drop or d != gather[1]:
        return None
    return w.load(gather[0], d, Range(gather[2][r.lo], 1, 1, True))


def _gather(w: Loads, x: fx.Node) -> tuple[fx.Node, int, list[int]] | None:
    """Operand, dimension and indices of `index_select` or `index` by one literal list of integers."""
    index = _index(x)
    written = None if index is None else literal(w, index[2])
    if index is None or written is None or written.dim() != 1:
        return None
    if written.dtype not in (torch.int32, torch.int64):
        return None
    source, dim, _ = index
    return source, dim, [i % shape_of(source)[dim] for i in written.tolist()]


def _index(x: fx.Node) -> tuple[fx.Node, int, fx.Node] | None:
    """Operand, dimension and index of `index_select` or of `index` along one dimension."""
    bound = bind(x)
    source = bound["self"]
    if not is_static_tensor(source):
        return None
    if overload_name(x) == "index_select":
        dim, index = bound["dim"], bound["index"]
    else:
        given = [(k, i) for k, i in enumerate(bound["indices"]) if i is not None]
        if len(given) != 1:
            return None
        dim, index = given[0]
    return (source, dim % len(shape_of(source)), index) if shape_of(source) else None


def fewer(w: Loads, node: fx.Node) -> fx.Node | None:
    """A concatenation without its empty parts; of one part, that part."""
    bound = bind(node)
    parts, dim = list(bound["tensors"]), bound["dim"] % len(shape_of(node))
    if not all(is_static_tensor(part) for part in parts):
        return None
    is_stack = overload_name(node) == "stack"
    kept = parts if is_stack else [part for part in parts if not _is_empty(part, dim)]
    if not kept or (len(kept) == len(parts) > 1):
        return None
    if any(val_of(part).dtype != val_of(node).dtype for part in kept):
        return None
    return w.join(aten.stack.default if is_stack else aten.cat.default, kept, dim)


def listed(w: Loads, node: fx.Node) -> fx.Node | None:
    """A concatenation of concatenations along the same dimension, of the parts of these."""
    known = parts_of(node)
    if known is None:
        return None
    parts, dim = known
    found = [inner for part in parts for inner in _listed_parts(w, part, dim)]
    return w.emit(aten.cat.default, found, dim) if len(found) > len(parts) else None


def _listed_parts(w: Loads, part: fx.Node, dim: int) -> list[fx.Node]:
    """The parts of one part of a concatenation, or the part itself."""
    below = operand_of(part) if overload_name(part) == "detach" else part
    known = parts_of(below) if overload_name(below) == "cat" and below not in w.pinned else None
    if known is None or known[1] != dim:
        return [part]
    inner = [one for given in known[0] for one in _listed_parts(w, given, dim)]
    return inner if below is part and w.is_open(part) else [w.emit(aten.detach.default, one) for one in inner]


def _is_empty(part: fx.Node, dim: int) -> bool:
    """Whether a part adds nothing along `dim`; torch skips `tensor([])`, whatever is joined with it."""
    shape = shape_of(part)
    return shape == (0,) or shape[dim] == 0


def reordered(w: Loads, node: fx.Node) -> fx.Node | None:
    """A roll or flip of a stack along its own dimension is a stack."""
    x = operand_of(node)
    known = parts_of(x) if overload_name(x) == "stack" and w.is_open(x) else None
    if known is None:
        return None
    parts, at = known
    if overload_name(node) == "flip":
        if [k % len(shape_of(node)) for k in bind(node)["dims"]] != [at]:
            return None
        return w.emit(aten.stack.default, parts[::-1], at)
    turns = turns_of(node)
    if turns is None or set(turns) != {at}:
        return None
    rolled = [parts[(k - turns[at]) % len(parts)] for k in range(len(parts))]
    return w.emit(aten.stack.default, rolled, at)


def gathered(w: Loads, node: fx.Node) -> fx.Node | None:
    """A gather at evenly spaced positions is a load; one of a few stored values is a stack of them."""
    index = _index(node)
    if index is not None and (places := positions(w, index[2], shape_of(index[0])[index[1]])) is not None:
        return w.load(index[0], index[1], places)
    gather = _gather(w, node)
    if gather is None or not 0 < len(gather[2]) <= _LONGEST_GATHER:
        return None
    source, d, indices = gather
    found = [w.try_load(source, d, Range(i, 1, 1, True)) for i in indices]
    if not [f for f in found if f is not None]:
        return None
    ranges = [Range(i, 1, 1, True) for i in indices]
    parts = [w.take(source, d, r) if f is None else f for f, r in zip(found, ranges, strict=True)]
    return w.join(aten.stack.default, parts, d)


RULES: dict[str, Rule] = {
    "stack": load_stack,
    "cat": load_cat,
    "roll": load_roll,
    "flip": load_flip,
    "index_select": load_gather,
    "index": load_gather,
}
