"""Ranges of one dimension, and the dimensions that a reshape maps onto each other: integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True)
class Range:
    """What a load keeps of a dimension: `n` indices from `lo` on; `drop` removes the dimension."""

    lo: int
    n: int
    step: int = 1
    drop: bool = False

    def at(self, k: int) -> int:
        """The k-th index."""
        return self.lo + k * self.step

    def part(self, first: int, count: int, lo: int, step: int) -> Range:
        """`count` of the indices from the `first` on, seen from elsewhere: they start at `lo` with `step`."""
        return Range(lo, count, step if count > 1 else 1, self.drop)


def slice_range(size: int, start: Any, end: Any, step: Any) -> Range | None:
    """A Python slice of a dimension, clamped; None if it is empty or not constant."""
    if not all(x is None or isinstance(x, int) for x in (start, end)) or not isinstance(step, int):
        return None
    indices = range(*slice(start, end, step).indices(size))
    return Range(indices[0], len(indices), step if len(indices) > 1 else 1) if len(indices) else None


def covers(outer: Range, inner: Range) -> bool:
    """Whether all indices of one range are in the other."""
    indices = range(outer.lo, outer.at(outer.n - 1) + 1, outer.step)
    if outer.step == 1:
        return inner.lo in indices and inner.at(inner.n - 1) in indices
    return all(inner.at(k) in indices for k in range(inner.n))


def runs_of(r: Range, stored: Range) -> list[tuple[bool, Range]] | None:
    """A load, cut where it enters and leaves what was stored: (inside?, range there)."""
    end = stored.at(stored.n - 1) + 1
    first = min(r.n, max(0, -((r.lo - stored.lo) // r.step)))
    last = max(first, min(r.n, -((r.lo - end) // r.step)))
    runs: list[tuple[bool, Range]] = []
    if first:
        runs.append((False, r.part(0, first, r.lo, r.step)))
    if first < last:
        place, offset = divmod(r.at(first) - stored.lo, stored.step)
        step, between = divmod(r.step, stored.step)
        if last - first > 1 and between:
            return None  # every now and then inside
        if last - first == 1 or not between:
            piece = r.part(first, last - first, place, step)
            around = r.part(first, last - first, r.at(first), r.step)
            runs.append((False, around) if offset else (True, piece))
    if last < r.n:
        runs.append((False, r.part(last, r.n - last, r.at(last), r.step)))
    return runs if any(inside for inside, _ in runs) else [(False, r)]


def blocks(inner: Sequence[int], outer: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of dimensions that a reshape maps onto each other."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(inner) or j < len(outer):
        if i < len(inner) and inner[i] == 1 and not (j < len(outer) and outer[j] == 1):
            groups.append(([i], []))
            i += 1
            continue
        if j < len(outer) and outer[j] == 1 and not (i < len(inner) and inner[i] == 1):
            groups.append(([], [j]))
            j += 1
            continue
        a, b = [i], [j]
        i, j = i + 1, j + 1
        while (left := prod(inner[k] for k in a)) != (right := prod(outer[k] for k in b)):
            if left < right:
                a.append(i)
                i += 1
            else:
                b.append(j)
                j += 1
        groups.append((a, b))
    return groups
