"""Memory that a schedule needs between cells: the bytes alive on each level, for any number of segments.

A value is alive from the level that writes it to the last level that reads it, both included.  What no cell
reads (the results, what the model keeps) does not count, nor does what a cell needs inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from rmtcompile.schedule.grid import Grid

if TYPE_CHECKING:
    from rmtcompile.schedule.data import Schedule
    from rmtcompile.schedule.parts import Carry

_MOST_CELLS = 100_000


class Length(NamedTuple):
    """Levels of a number of segments, and the most bytes that are alive on one of them."""

    n_segments: int
    n_levels: int
    carried: int
    values: int


def alive_bytes(grid: Grid, values: Sequence[Carry]) -> tuple[int, ...]:
    """The bytes of some values that are alive on each level of a grid.

    A value that is read by several offsets is named once for each; it lives until the last of them.
    """
    by_value: dict[tuple[object, ...], list[Carry]] = {}
    for one in values:
        by_value.setdefault((one.name, one.dtype, one.shape, one.source), []).append(one)
    changes = [0] * (grid.n_levels + 1)
    for readings in by_value.values():
        for layer in range(grid.n_layers):
            offsets = [one.offset for one in readings if layer in one.writers(grid.n_layers)]
            for segment in range(grid.n_segments) if offsets else ():
                read = [
                    grid.level_of((segment + ds, layer + dl))
                    for ds, dl in offsets
                    if segment + ds < grid.n_segments
                ]
                if read:
                    changes[grid.level_of((segment, layer))] += readings[0].nbytes
                    changes[max(read) + 1] -= readings[0].nbytes
    return tuple(accumulate(changes[:-1]))


def growth(schedule: Schedule, values: Sequence[Carry] = ()) -> tuple[Length, ...]:
    """How levels and bytes grow with the number of segments, by the skew of a schedule.

    Up to twice as many segments as it has, as long as that is quickly counted.
    """
    found = []
    for n in _lengths(schedule):
        grid = Grid(schedule.n_layers, n, schedule.alpha, schedule.block)
        peaks = (max(alive_bytes(grid, some)) for some in (schedule.carries, values))
        found.append(Length(n, grid.n_levels, *peaks))
    return tuple(found)


def _lengths(schedule: Schedule) -> Iterator[int]:
    """Numbers of segments, denser where they are small, with the schedule's own."""
    own, cells = schedule.n_segments, 0
    last = max(2 * own, 8)
    numbers = {n for n in range(1, last + 1) if n <= 8 or n % (1 << (n.bit_length() - 4)) == 0}
    for n in sorted(numbers | {own}):
        cells += n * schedule.n_layers
        if n > own and cells > _MOST_CELLS:
            return
        yield n
