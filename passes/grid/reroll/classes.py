"""Which segments of a region share one body: peeled ones at the start, peeled ones at the end, the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from rmtcompile.errors import RerollError
from rmtcompile.passes.grid.partition import CELL
from rmtcompile.passes.grid.reroll.rules import Classes
from rmtcompile.passes.grid.reroll.sources import affine
from rmtcompile.passes.grid.reroll.unrolled import Key, Unrolled, body_at, region_name, typed


def classes_of(key: Key, small: Unrolled, large: Unrolled) -> Classes:
    """The fewest peeled segments such that repeating the body before the tail gives the larger capture, and
    such that the integers of what is repeated follow one rule (a short last segment ends early, a short first
    one shifts those behind it)."""
    found = list(_candidates(key, small, large))
    for classes, repeated in found:
        if classes.tail == found[0][0].tail or repeated >= 2:  # integers of one segment follow any rule
            if _all_follow(key, classes, small, large):
                return classes
    further = [
        Classes(head, classes.tail)
        for classes, repeated in found
        for head in range(classes.head + 1, classes.head + repeated - 1)
    ]
    for classes in sorted(further, key=lambda c: (c.head + c.tail, c.tail)):
        if _all_follow(key, classes, small, large):
            return classes
    if found:
        return found[0][0]
    evidence = list(_difference(key, small, large))
    if constants := _constants(key, large):
        raise RerollError(
            f"a constant in {region_name(key)} changes from segment to segment: "
            + ", ".join(f"{a!r} and {b!r}" for a, b in constants),
            evidence,
            "make a table before the segments and index it, table = 1 / torch.arange(1, n + 1) and table[s] "
            "instead of 1 / (s + 1); fallback='sequential' runs the model as it is",
        )
    raise RerollError(
        f"the segments of {region_name(key)} do not follow one rule",
        evidence,
        "segments that differ from each other by more than a special start and end cannot be run on "
        "diagonals; use fallback='sequential' to run the model as it is",
    )


def _candidates(key: Key, small: Unrolled, large: Unrolled) -> Iterator[tuple[Classes, int]]:
    """For each number of segments that may be peeled off the end, the fewest that have to be peeled off the
    front for their operations, and how many segments of `small` are left to repeat."""
    short = [body_at(small, key, s).key for s in range(small.count)]
    long = [body_at(large, key, s).key for s in range(large.count)]
    more = large.count - small.count
    for tail in range(small.count):
        middle = small.count - tail
        if short[:middle] + [short[middle - 1]] * more + short[middle:] != long:
            continue
        head = middle - 1
        while head and short[head - 1] == short[middle - 1]:
            head -= 1
        yield Classes(head, tail), middle - head


def _all_follow(key: Key, classes: Classes, small: Unrolled, large: Unrolled) -> bool:
    """Whether the integers of every class follow one rule."""
    return all(_follow(key, ofclass) for ofclass in members_of(key, classes, small, large).values())


def _constants(key: Key, large: Unrolled) -> list[tuple[Any, Any]]:
    """The numbers in which two segments in the middle differ, if they differ in nothing else."""

    def pairs(left: Any, right: Any) -> Iterator[tuple[Any, Any]]:
        if left == right:
            return
        if not (isinstance(left, tuple) and isinstance(right, tuple) and len(left) == len(right)):
            raise _OtherwiseError
        if len(left) == 2 and left[0] == right[0] and left[0] in ("float", "int", "bool"):
            yield left[1], right[1]
            return
        for x, y in zip(left, right, strict=True):
            yield from pairs(x, y)

    for s in range(1, large.count - 1):
        try:
            found = list(pairs(body_at(large, key, s).key, body_at(large, key, s + 1).key))
        except _OtherwiseError:
            continue
        if found:
            return found
    return []


class _OtherwiseError(Exception):
    """Two bodies differ in more than numbers."""


def _difference(key: Key, small: Unrolled, large: Unrolled) -> Iterator[str]:
    """Evidence: the first operation at which two segments in the middle differ, or the last ones of the two
    captures; failing that, operations by segment."""
    middle = small.count - 1
    for (one, s), (other, t) in (
        ((large, middle - 1), (large, middle)),
        ((small, small.count - 1), (large, large.count - 1)),
    ):
        a, b = body_at(one, key, s), body_at(other, key, t)
        for left, right, x, y in zip(a.key, b.key, a.nodes, b.nodes, strict=False):
            if left != right:
                for segment, unrolled, node in ((s, one, x), (t, other, y)):
                    where = f"segment {segment} of {unrolled.count}"
                    operands = ", ".join(typed(operand) for operand in node.all_input_nodes)
                    yield f"{where}: {node.format_node()} of {operands}   {node.meta.get('source')}"
                return
    for unrolled in (small, large):
        counts = ", ".join(str(len(body_at(unrolled, key, s).nodes)) for s in range(unrolled.count))
        yield f"operations of {unrolled.count} segments, one by one: {counts}"


def members_of(
    key: Key, classes: Classes, small: Unrolled, large: Unrolled
) -> dict[int, list[tuple[Unrolled, int]]]:
    """The instances of each class of a region in both captures."""
    members: dict[int, list[tuple[Unrolled, int]]] = defaultdict(list)
    for unrolled in (small, large) if large is not small else (small,):
        for s in range(unrolled.count):
            members[classes.of(s, unrolled.count)].append((unrolled, s))
    return members


def _follow(key: Key, members: list[tuple[Unrolled, int]]) -> bool:
    """Whether every integer of a class is affine, those of cells in the segment alone."""
    unrolled, segment = members[0]
    try:
        for j in range(len(body_at(unrolled, key, segment).ints)):
            if affine(key, j, members).by_count and key[0] == CELL:
                return False
    except RerollError:
        return False
    return True
