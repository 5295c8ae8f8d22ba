"""Steady: whether the outline of a long input is what the outlines of two short ones promise.

    add, once a segment    2 segments   a b         3 segments   a b b'
                           9 segments   a b b' b'' ...             steady from the second one on, as promised
                                        a b b' b'' c c' c''        another operation from the fifth one on

Of each label the rows that come once a segment are looked at by themselves. All but a few at the start and at
the end must grow evenly, in all their integers; those few must be as in the short outlines, and so must the
first of the steady ones. The short outlines are those of the captures that prove the rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rmtcompile.frontend.outline import Outline, Row, Rows


@dataclass(frozen=True)
class Departure:
    """The first row that is not as promised.

    Attributes:
        rank: by how much it says: calls that should not be there, calls that are missing, others.
        label, number: the row in the long outline, or the last one where there are too few.
        what: in words.
    """

    rank: int
    label: int
    number: int
    what: str


@dataclass(frozen=True)
class _Lengths:
    """Segments of the three outlines."""

    small: int
    large: int
    long: int


def departure(small: Outline, large: Outline, long: Outline) -> Departure | None:
    """Where `long` is not what `small` and `large`, which has one segment more, promise; None where it is.

    Of several such rows the one that says most is given.
    """
    counts = _Lengths(small.count, large.count, long.count)
    outlines = (small, large, long)
    found = list(_of_outlines([outline.rows for outline in outlines], counts))
    for label in small.lists.keys() | large.lists.keys() | long.lists.keys():
        told = [outline.lists.get(label, ({}, {})) for outline in outlines]
        ways = [list(_of_outlines([both[way] for both in told], counts)) for way in (0, 1)]
        if all(ways):  # each way tells all there is: one that is as promised is enough
            found += ways[0]
    return min(found, key=lambda place: (place.rank, place.number, place.label), default=None)


def _of_outlines(outlines: list[Rows], counts: _Lengths) -> Iterator[Departure]:
    """Departures among rows of the three outlines."""
    for label in {label for rows in outlines for label in rows}:
        small, large, long = (rows.get(label, []) for rows in outlines)
        yield from _of_label(label, small, large, long, counts)


def _of_label(
    label: int, small: list[Row], large: list[Row], long: list[Row], counts: _Lengths
) -> Iterator[Departure]:
    """Departures among the rows of one label, at most one for each that comes once a segment."""
    step = len(large) - len(small)
    expected = len(small) + step * (counts.long - counts.small)
    if step < 0 or len(long) != expected:
        last = max(0, min(len(long), expected) - 1)
        rank, number = (1, last) if len(long) < expected else (0, max(0, expected))
        yield Departure(rank, label, number, f"comes {len(long)} times instead of {max(0, expected)}")
        return
    if step == 0:
        for i, rows in enumerate(zip(small, large, long, strict=True)):
            if not _grows(*rows, counts):
                yield Departure(3, label, i, "has other integers, sizes or operands")
        return
    for i in range(step):
        at = _of_row(small[i::step], large[i::step], long[i::step], counts)
        if at is not None:
            yield Departure(2, label, i + at * step, "has other integers, sizes or operands")


def _of_row(small: list[Row], large: list[Row], long: list[Row], counts: _Lengths) -> int | None:
    """The first of the rows that come once a segment that departs from what the short outlines promise."""
    head, end = _steady(long)
    tail = len(long) - end
    if head + tail >= len(large):
        shown = len(large) - 1
        return end if head <= shown else min(shown, head)
    for i in range(len(large) - tail):
        before = small[i] if i < len(small) - tail else None
        if not _grows(before, large[i], long[i], counts):
            return i
    for i in range(1, tail + 1):
        if not _grows(small[-i] if i <= len(small) else None, large[-i], long[-i], counts):
            return len(long) - i
    return None


def _steady(rows: list[Row]) -> tuple[int, int]:
    """Start and end of the longest run of rows that differ by the same integers, each from the one before."""
    best = (0, min(len(rows), 1))
    start = 0
    last: tuple[int, ...] | None = None
    for i in range(1, len(rows)):
        now = _by(rows[i - 1], rows[i])
        if now is None or (now != last and last is not None):
            start = i - 1 if now is not None else i
        last = now
        if i + 1 - start > best[1] - best[0]:
            best = (start, i + 1)
    return best


def _by(a: Row, b: Row) -> tuple[int, ...] | None:
    """By how much the integers of two rows differ; None where they differ in more."""
    if a[0] != b[0] or len(a[1]) != len(b[1]):
        return None
    return tuple(y - x for x, y in zip(a[1], b[1], strict=True))


def _grows(small: Row | None, large: Row, long: Row, counts: _Lengths) -> bool:
    """Whether a row grows evenly with the number of segments (where only two are known: by whole numbers)."""
    more = counts.long - counts.large
    by = _by(large, long)
    if by is None:
        return False
    if small is None:
        return all(n % more == 0 for n in by)
    once = _by(small, large)
    return once is not None and all(n == more * m for n, m in zip(by, once, strict=True))
