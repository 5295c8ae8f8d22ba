"""Size vectors: the sizes of a call, and from which calls the program of another one could be read.

A vector lists every dim of every input; along axes that are cut into segments it holds what is left over by
whole segments. After these come the integers that the model keeps from call to call (positions, numbers of
segments) and goes on from. Sizes that change together are one free size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.ir.segmentation import Segmentation
from rmtcompile.ir.size import KEPT

Vector = tuple[int, ...]
Columns = tuple[int, ...]


def tensors_in(args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors of a call, in pytree order."""
    return [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]


def _shapes(args: Any, kwargs: Any) -> list[torch.Size]:
    return [value.shape for value in tensors_in(args, kwargs)]


def sizes_of(args: Any, kwargs: Any, segmentation: Segmentation, ends_whole: bool = False) -> Vector:
    """Every dim of every input; along an axis that is cut, what whole segments leave over.

    Args:
        ends_whole: whether a whole last segment is left over, too.
    """
    shapes, rests = _shapes(args, kwargs), _rests(args, kwargs, segmentation)
    if ends_whole:
        rests |= {(a.leaf, a.dim): rests[a.leaf, a.dim] + a.length for a in segmentation.axes}
    return tuple(rests.get((i, d), n) for i, shape in enumerate(shapes) for d, n in enumerate(shape))


def _rests(args: Any, kwargs: Any, segmentation: Segmentation) -> dict[tuple[int, int], int]:
    shapes = _shapes(args, kwargs)
    count, rest = segmentation.count(shapes)
    whole = count - (rest > 0)
    return {(a.leaf, a.dim): shapes[a.leaf][a.dim] - whole * a.length for a in segmentation.axes}


def lengths_of(args: Any, kwargs: Any, segmentation: Segmentation) -> list[int | None]:
    """For each place of the size vector, the length of a whole segment, or of the parts of it that are begun;
    None where nothing is cut."""
    shapes, parts = _shapes(args, kwargs), segmentation.parts
    if parts > 1:
        parts = segmentation.pieces(segmentation.count(shapes)[1]) or parts
    cut = {(a.leaf, a.dim): a.length * parts // segmentation.parts for a in segmentation.axes}
    return [cut.get((i, d)) for i, shape in enumerate(shapes) for d in range(len(shape))]


def shapes_at(vector: Vector, args: Any, kwargs: Any, segmentation: Segmentation) -> list[list[int]]:
    """Shapes of the inputs at another size vector, with as many segments."""
    rests, values = _rests(args, kwargs, segmentation), iter(vector)
    return [
        [next(values) + (n - rests[i, d] if (i, d) in rests else 0) for d, n in enumerate(shape)]
        for i, shape in enumerate(_shapes(args, kwargs))
    ]


def moved(a: Vector, b: Vector) -> list[Columns]:
    """The free sizes between two vectors: places that change from one value to one other, together."""
    found: dict[tuple[int, int], list[int]] = {}
    for i, pair in enumerate(zip(a, b, strict=True)):
        if pair[0] != pair[1]:
            found.setdefault(pair, []).append(i)
    return [tuple(columns) for columns in found.values()]


def _with(vector: Vector, other: Vector, columns: Columns) -> Vector:
    """A vector with some places as in another one."""
    return tuple(other[i] if i in columns else v for i, v in enumerate(vector))


def boxes(known: list[Vector], new: Vector, lengths: Sequence[int | None]) -> Iterator[list[Vector]]:
    """Corners from which rules could be read that hold at `new`, in the order in which to try them."""
    near = sorted((v for v in known if v != new), key=lambda v: len(moved(v, new)))
    for other in near[:3]:
        free = moved(other, new)
        if len(free) == 1:
            for third in near:
                side = moved(other, third)
                if len(side) == 1 and not set(side[0]) & set(free[0]):
                    yield [other, new, third, _with(new, third, side[0])]
            yield [other, new]
        elif len(free) == 2:
            yield [other, new, _with(other, new, free[0]), _with(other, new, free[1])]
    for other in near[:1]:
        free = moved(other, new)
        ones = [columns for columns in free if 1 in (other[columns[0]], new[columns[0]])]
        ones = [columns for columns in ones if lengths[columns[0]] is None] or ones  # batches first
        if len(ones) != 1 or len(free) > 2:
            continue
        base = new if other[ones[0][0]] == 1 else other
        up = _larger(base, ones[0], lengths)
        if up is not None and len(free) == 1:
            yield [base, up]
        elif up is not None:
            rest = next(columns for columns in free if columns is not ones[0])
            there = other if base is new else new
            yield [base, up, _with(base, there, rest), _with(up, there, rest)]


def _larger(vector: Vector, columns: Columns, lengths: Sequence[int | None]) -> Vector | None:
    """The vector with one free size made larger by one, or smaller where a segment ends."""
    size, length = vector[columns[0]], lengths[columns[0]]
    size = size + 1 if length is None or size + 1 < length else size - 1
    return tuple(size if i in columns else v for i, v in enumerate(vector)) if size > 1 else None


def free_sizes(corners: Sequence[Vector], lengths: Sequence[int | None]) -> dict[str, Columns] | None:
    """Names of the free sizes and where they stand: R for what is left over, B for the first axis of an
    input. None where corners are missing."""
    groups = _groups(corners)
    if 2 ** len(groups) != len(set(corners)):
        return None
    found: dict[str, Columns] = {}
    for columns in groups.values():
        _name("R" if lengths[columns[0]] is not None else "B", columns, found)
    return found


def _groups(corners: Sequence[Vector]) -> dict[tuple[int, ...], Columns]:
    """Places that change together, by their values at the corners."""
    groups: dict[tuple[int, ...], Columns] = {}
    for i, values in enumerate(zip(*corners, strict=True)):
        if len(set(values)) > 1:
            groups[values] = (*groups.get(values, ()), i)
    return groups


def _name(letter: str, columns: Columns, found: dict[str, Columns]) -> str:
    name = letter if letter not in found else f"{letter}{len(found)}"
    found[name] = columns
    return name


# ---- integers that the model keeps -------------------------------------------------------------------------

LOOKED_AT = 5
"""Vectors, the newest ones, among which those are looked for that rules are read from."""

Tie = tuple[str, int, int]
"""(K, factor, constant): a place holds factor * K + constant."""


@dataclass(frozen=True)
class Counted:
    """Free sizes among which are integers that the model keeps.

    Attributes:
        columns: see `free_sizes`; integers that the model keeps are called K.
        counts: these names.
        ties: places whose integers follow from one of these.
    """

    columns: dict[str, Columns]
    counts: frozenset[str]
    ties: dict[int, Tie]


def counted(
    known: Sequence[Vector], new: Vector, lengths: Sequence[int | None]
) -> Iterator[tuple[list[Vector], Counted]]:
    """Vectors from which rules could be read that hold at `new`, where the integers that the model keeps
    change, in the order in which to try them. A program for others of these cannot be captured, so that
    vectors are taken as they came, the newest ones first.

    Args:
        known: in the order in which they came.
        lengths: see `lengths_of`; places behind these are the integers.
    """
    others = [vector for vector in reversed(known) if vector != new][:LOOKED_AT]
    for count in range(1, LOOKED_AT):
        for some in itertools.combinations(others, count):
            corners = [new, *some]
            found = _counted(corners, lengths)
            sizes = len(found.columns) - len(found.counts)
            if found.counts and 2**sizes + len(found.counts) == len(corners):
                yield corners, found


def _counted(corners: Sequence[Vector], lengths: Sequence[int | None]) -> Counted:
    """The free sizes between vectors."""
    found: dict[str, Columns] = {}
    counts: dict[str, tuple[int, ...]] = {}
    ties: dict[int, Tie] = {}
    groups = sorted(_groups(corners).items(), key=lambda item: max(item[0]) - min(item[0]))
    for values, columns in groups:
        dims = tuple(i for i in columns if i < len(lengths))
        kept = tuple(i for i in columns if i >= len(lengths))
        if dims:
            _name("R" if lengths[dims[0]] is not None else "B", dims, found)
        if kept:
            tie = next((tie for name, others in counts.items() if (tie := _tie(name, others, values))), None)
            if tie is None:
                counts[_name(KEPT, kept, found)] = values
            else:
                ties |= dict.fromkeys(kept, tie)
    return Counted(found, frozenset(counts), ties)


def _tie(name: str, others: Sequence[int], values: Sequence[int]) -> Tie | None:
    """How values follow from those of another place, if they do."""
    pairs = sorted(set(zip(others, values, strict=True)))
    (a, x), (b, y) = pairs[0], pairs[-1]
    if a == b or (y - x) % (b - a):
        return None
    factor = (y - x) // (b - a)
    tie = name, factor, x - factor * a
    return tie if all(value == factor * other + tie[2] for other, value in pairs) else None

