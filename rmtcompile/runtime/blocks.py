"""A run cut into blocks of levels, of which there are few kinds, whatever its length.

    levels of a run      0 ........ 15 | 16 ... 31 | 32 .. 39 | 40 | 41 .. 56
    block                head          | steady 16 | steady 8 | 1  | tail

Between `head` and `tail` every segment does the same, so that what is recorded for a block of steady levels
may be replayed for any of them.  Runs that are too short for that are one block, `whole`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rmtcompile.schedule import Grid

LONGEST = 16
"""Levels of a block, unless one period of a skewed schedule is longer."""

Key = tuple[Any, ...]
"""Names a recording: ("head", 0), ("steady", periods), ("tail", 0) or ("whole", segments); in bands of
layers: all that a level does (`bands/recorded.py`)."""


@dataclass(frozen=True)
class Block:
    """Levels that are recorded together.

    Attributes:
        base: segments that have entered before the first of the levels; others are counted from it.
    """

    key: Key
    levels: range
    base: int


def blocks_of(grid: Grid, head: int, tail: int) -> tuple[Block, ...]:
    """A run cut into blocks.

    Args:
        head, tail: numbers of segments from the start and from the end that differ from all others.
    """
    skew, first = grid.skew, grid.skew * head + grid.n_layers - 1
    periods = (skew * (grid.n_segments - tail) - first) // skew
    if periods < 0:
        return (Block(("whole", grid.n_segments), range(grid.n_levels), 0),)
    found, at = [Block(("head", 0), range(first), 0)], first
    for length in _lengths(periods, skew):
        found.append(Block(("steady", length), range(at, at + length * skew), -(-at // skew)))
        at += length * skew
    return (*found, Block(("tail", 0), range(at, grid.n_levels), -(-at // skew)))


def steady_lengths(skew: int) -> list[int]:
    """Periods of the blocks of steady levels, longest first."""
    longest = 1
    while 2 * longest * skew <= LONGEST:
        longest *= 2
    return [longest >> i for i in range(longest.bit_length())]


def _lengths(periods: int, skew: int) -> Iterator[int]:
    for length in steady_lengths(skew):
        count, periods = divmod(periods, length)
        yield from [length] * count


__all__ = ["LONGEST", "Block", "Key", "blocks_of", "steady_lengths"]
