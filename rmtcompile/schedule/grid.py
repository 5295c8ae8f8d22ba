"""The grid of cells and its levels: the one definition of what runs when.

    Grid(n_layers=4, n_segments=8, skew=1)      level of cell (s, l) = skew * s + l

    layer 3 |  3  4  5  6  7  8  9 10           levels 0..2    ramp-up
    layer 2 |  2  3  4  5  6  7  8  9           levels 3..7    steady state
    layer 1 |  1  2  3  4  5  6  7  8           levels 8..10   ramp-down
    layer 0 |  0  1  2  3  4  5  6  7

Schedules that are printed and drawn, emitted code that runs, and what levels cost are all read from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from rmtcompile.schedule.paths import Cell


class Phases(NamedTuple):
    """The levels split in three: windows grow, are full, shrink.

    `steady` holds the levels on which every layer that this level could run is alive, so what runs repeats
    every `Grid.period` levels.  It is empty when there are too few segments to fill the layers.
    """

    ramp_up: range
    steady: range
    ramp_down: range

    def of(self, level: int) -> str:
        """ "ramp-up", "steady" or "ramp-down"."""
        if level in self.ramp_up:
            return "ramp-up"
        return "steady" if level in self.steady else "ramp-down"


@dataclass(frozen=True)
class Grid:
    """The cells (segment, layer) of a run, and the level on which each of them runs.

    Attributes:
        n_layers, n_segments: size of the grid.
        skew: levels between a cell and the same layer of the next segment; level = skew * s + l.  With 0 all
            segments of a layer run together.
        block: with skew 0, how many segments run together at most; 0: all of them. Blocks run one after the
            other, each through all layers.
        first: the first segment that runs; earlier ones have run before.
        band: the layers that run here, with a skew above 0; None: all. Levels are those of the whole grid.
    """

    n_layers: int
    n_segments: int
    skew: int
    block: int = 0
    first: int = 0
    band: range | None = None

    @property
    def own(self) -> range:
        """The layers that run here."""
        return range(self.n_layers) if self.band is None else self.band

    @property
    def levels(self) -> range:
        """The steps that run one after the other."""
        if self.skew:
            start = self.skew * self.first + self.own.start
            return range(start, self.skew * (self.n_segments - 1) + self.own.stop)
        return range(self.n_layers * -(-(self.n_segments - self.first) // self._together))

    @property
    def n_levels(self) -> int:
        """How many there are."""
        return len(self.levels)

    @property
    def period(self) -> int:
        """Steady levels after which the same layers run again."""
        return self.skew or self.n_layers

    @property
    def phases(self) -> Phases:
        """Ramp-up, steady state and ramp-down as ranges of levels."""
        start, n = self.levels.start, self.levels.stop
        if not self.skew:
            return Phases(range(0), range(n), range(n, n))
        # Layers up to `full` have a cell on each level that is theirs; from `drained` on no segment enters.
        full = start + max(len(self.own) - self.skew, 0)  # a band may have fewer layers than the skew
        drained = min(self.skew * self.n_segments + self.own.start, n)
        if full >= drained:
            return Phases(range(start, drained), range(drained, drained), range(drained, n))
        return Phases(range(start, full), range(full, drained), range(drained, n))

    @property
    def blocks(self) -> tuple[range, ...]:
        """With skew 0: the segments, as many at a time as run together."""
        starts = range(self.first, self.n_segments, self._together)
        return tuple(range(s, min(s + self._together, self.n_segments)) for s in starts)

    @property
    def _together(self) -> int:
        return min(self.block or self.n_segments, self.n_segments - self.first)

    def level_of(self, cell: Cell) -> int:
        """The level on which a cell runs."""
        s, layer = cell
        if self.skew:
            return self.skew * s + layer
        return (s - self.first) // self._together * self.n_layers + layer

    def cells(self, level: int) -> tuple[Cell, ...]:
        """The cells of a level, segments ascending."""
        if not self.skew:
            block, layer = divmod(level, self.n_layers)
            return tuple((s, layer) for s in self.blocks[block])
        return self.alive(level, reversed(self.own))

    def alive(self, level: int, layers: Iterable[int]) -> tuple[Cell, ...]:
        """The cells of a level among some layers, in the order of those; for a skew above 0."""
        found = []
        for layer in layers:
            segment, rest = divmod(level - layer, self.skew)
            if not rest and self.first <= segment < self.n_segments and layer in self.own:
                found.append((segment, layer))
        return tuple(found)

    def entering(self, level: int) -> int | None:
        """The segment that enters layer 0 on this level, for a skew above 0."""
        return self._segment(level) if self.own.start == 0 else None

    def leaving(self, level: int) -> int | None:
        """The segment that has left the last layer after this level, for a skew above 0."""
        return self._segment(level - self.n_layers + 1) if self.own.stop == self.n_layers else None

    def _segment(self, distance: int) -> int | None:
        segment, rest = divmod(distance, self.skew)
        return segment if not rest and self.first <= segment < self.n_segments else None
