"""What runs when: the schedule as frozen data that can be checked, printed, drawn and exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmtcompile.errors import InternalError
from rmtcompile.schedule.bands import BandTimes, check_bands, goes_down
from rmtcompile.schedule.grid import Grid, Phases
from rmtcompile.schedule.parts import Carry, Operation, Window
from rmtcompile.schedule.paths import Cell, Offset, check_offsets, consumers, longest_path_levels, producers

if TYPE_CHECKING:
    import networkx as nx


@dataclasses.dataclass(frozen=True, repr=False)
class Schedule:
    """Which cells run together, and in which order: level `alpha * s + l` for cell `(s, l)`.

    Build one with `passes/grid/wavefront.py`, which finds the smallest legal `alpha`.  `levels` is
    what the runtime executes: the cells of one level run together, level after level.

    Args:
        n_layers, n_segments: size of the grid.
        alpha: levels between a cell and the same layer of the next segment (the skew).  0 runs all segments
            of a layer at once, 1 runs diagonals, `n_layers` is the sequential order.
        offsets: the dependence offsets, consumer minus producer.
        carries: the values that flow between segments.
        segment_variants: the variant of each segment's cells (`("first", "later", "later")`).
        layer_kinds: the kind of each layer; only layers of one kind can share a grouped call.
        levels: computed from `alpha`; pass it only to restore a schedule that was saved.
        block: with `alpha` 0, how many segments run together at most; 0: all of them. Blocks run one after
            the other, each through all layers.
        reads: the layers that read by each offset, as (offset, layers); an offset that is not named is read
            by every layer.  Levels keep all offsets for all layers; this says which edges there really are.
        bands: the layers of each band, lowest first, where bands run on devices or ranks of their own; none
            where one device runs all layers.
        operations: gives the operations of a cell; a schedule that was loaded from a file has none.
    """

    n_layers: int
    n_segments: int
    alpha: int
    offsets: frozenset[Offset]
    carries: tuple[Carry, ...] = ()
    segment_variants: tuple[str, ...] = ()
    layer_kinds: tuple[str, ...] = ()
    levels: tuple[tuple[Cell, ...], ...] = ()
    block: int = 0
    reads: tuple[tuple[Offset, tuple[int, ...]], ...] = ()
    bands: tuple[range, ...] = ()
    operations: Callable[[Cell], Sequence[Operation]] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.n_layers < 1 or self.n_segments < 1:
            raise ValueError(f"a grid has at least one cell, got {self.n_layers} x {self.n_segments}")
        if not 0 <= self.alpha <= self.n_layers:
            raise ValueError(f"alpha must be 0..{self.n_layers} (n_layers is sequential), got {self.alpha}")
        if self.block < 0 or (self.block and self.alpha):
            raise ValueError(f"blocks of {self.block} segments need alpha = 0, got {self.alpha}")
        self._fill("offsets", check_offsets(self.offsets))
        self._fill("carries", tuple(self.carries))
        self._fill("segment_variants", self.segment_variants or ("cell",) * self.n_segments)
        self._fill("layer_kinds", self.layer_kinds or ("layer",) * self.n_layers)
        if len(self.segment_variants) != self.n_segments or len(self.layer_kinds) != self.n_layers:
            raise ValueError("segment_variants has one name a segment, layer_kinds one name a layer")
        self._fill("bands", check_bands(self.bands, self.n_layers, self.alpha))
        if not self.levels:
            self._fill("levels", tuple(self.grid.cells(t) for t in range(self.grid.n_levels)))

    def _fill(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "operations": None}  # they belong to a program, which is not pickled

    # -- what it says ----------------------------------------------------------------

    @property
    def grid(self) -> Grid:
        """Which cell runs on which level; the run reads the same."""
        return Grid(self.n_layers, self.n_segments, self.alpha, self.block)

    @property
    def n_cells(self) -> int:
        """Cells of the grid."""
        return self.n_layers * self.n_segments

    @property
    def n_levels(self) -> int:
        """The makespan: steps that run one after the other."""
        return len(self.levels)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The number of cells of each level."""
        return tuple(len(cells) for cells in self.levels)

    @property
    def width(self) -> int:
        """The most cells that run together."""
        return max(self.widths)

    @property
    def mean_width(self) -> float:
        """Cells per level, on average: the parallelism that the schedule has."""
        return self.n_cells / self.n_levels

    @cached_property
    def n_calls(self) -> int:
        """Grouped calls: one for each kind of layer on each level."""
        kinds = self.layer_kinds
        return sum(len({kinds[layer] for _, layer in cells}) for cells in self.levels)

    @property
    def period(self) -> int:
        """Steady levels after which the same layers run again."""
        return self.grid.period

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """The layers alive on each level."""
        step = max(self.alpha, 1)
        alive = ([layer for _, layer in cells] for cells in self.levels)
        return tuple(Window(min(layers), max(layers) + 1, step) for layers in alive)

    @property
    def phases(self) -> Phases:
        """Ramp-up, steady state and ramp-down as ranges of levels."""
        return self.grid.phases

    def level_of(self, cell: Cell) -> int:
        """The level on which `cell` runs."""
        return self.grid.level_of(cell)

    def variant_of(self, cell: Cell) -> str:
        """The variant of a cell: its segment's."""
        return self.segment_variants[cell[0]]

    def kind_of(self, cell: Cell) -> str:
        """The kind of a cell: its layer's."""
        return self.layer_kinds[cell[1]]

    def readers(self, offset: Offset) -> tuple[int, ...]:
        """The layers that read by `offset` and have something to read there."""
        layers = dict(self.reads).get(offset, range(self.n_layers))
        return tuple(layer for layer in layers if 0 <= layer - offset[1] < self.n_layers)

    def producers(self, cell: Cell) -> tuple[Cell, ...]:
        """The cells that `cell` waits for."""
        offsets = [offset for offset in sorted(self.offsets) if cell[1] in self.readers(offset)]
        return tuple(producers(cell, offsets, self.n_layers, self.n_segments))

    def consumers(self, cell: Cell) -> tuple[Cell, ...]:
        """The cells that wait for `cell`."""
        offsets = [offset for offset in sorted(self.offsets) if cell[1] + offset[1] in self.readers(offset)]
        return tuple(consumers(cell, offsets, self.n_layers, self.n_segments))

    # -- bands -----------------------------------------------------------------------

    @property
    def borders(self) -> tuple[int, ...]:
        """The first layer of each band but the lowest."""
        return tuple(band.start for band in self.bands[1:])

    def band_of(self, layer: int) -> int:
        """The number of the band that a layer belongs to; 0 where there are none."""
        return sum(border <= layer for border in self.borders)

    def band_grid(self, band: int) -> Grid:
        """Which cells of a band run on which level; levels are those of the whole schedule."""
        return dataclasses.replace(self.grid, band=self.bands[band])

    @cached_property
    def lag(self) -> int:
        """Levels by which each band is behind the one before: 1, so that what is sent has a level's time to
        arrive; 0 where values go down from band to band, or there is one band."""
        return int(len(self.bands) > 1 and not goes_down(self))

    # -- what it proves --------------------------------------------------------------

    @cached_property
    def critical_path(self) -> int:
        """Cells on the longest dependence path: no schedule has fewer levels."""
        return 1 + max(longest_path_levels(self.offsets, self.n_layers, self.n_segments).values())

    @property
    def is_optimal(self) -> bool:
        """Whether the schedule is as short as the dependences allow."""
        return self.n_levels == self.critical_path

    def verify(self) -> None:
        """Check what a schedule promises; an `InternalError` names the first cell that breaks it.

        Each cell of the grid runs exactly once, on the level that `alpha` says, and each dependence goes from
        a lower level to a higher one.
        """
        level: dict[Cell, int] = {}
        for t, cells in enumerate(self.levels):
            for cell in cells:
                if cell in level:
                    raise InternalError(f"schedule: cell {cell} runs twice, on levels {level[cell]} and {t}")
                if not (0 <= cell[0] < self.n_segments and 0 <= cell[1] < self.n_layers):
                    raise InternalError(f"schedule: cell {cell} on level {t} is outside the grid")
                level[cell] = t
        missing = next((c for c in self._grid() if c not in level), None)
        if missing is not None:
            raise InternalError(f"schedule: cell {missing} never runs")
        self._verify_dependences(level)
        for cell, t in level.items():
            if self.level_of(cell) != t:
                raise InternalError(
                    f"schedule: cell {cell} runs on level {t}, but level = {self.level_rule} "
                    f"is {self.level_of(cell)}"
                )

    def _verify_dependences(self, level: Mapping[Cell, int]) -> None:
        for ds, dl in sorted(self.offsets):
            for cell in self._grid():
                before = level.get((cell[0] - ds, cell[1] - dl))
                if before is not None and before >= level[cell]:
                    raise InternalError(
                        f"schedule: cell {cell} on level {level[cell]} reads cell "
                        f"{(cell[0] - ds, cell[1] - dl)} on level {before}, by offset ({ds},{dl})"
                    )

    def _grid(self) -> Iterable[Cell]:
        return ((s, layer) for s in range(self.n_segments) for layer in range(self.n_layers))

    @property
    def level_rule(self) -> str:
        """The level of a cell as a formula: `s + l`, `2s + l`, `l`, `l + 4 * (s // 32)`."""
        if 0 < self.block < self.n_segments:
            return f"l + {self.n_layers} * (s // {self.block})"
        return "l" if self.alpha == 0 else f"{self.alpha if self.alpha > 1 else ''}s + l"

    # -- how it is shown -------------------------------------------------------------

    def __str__(self) -> str:
        from rmtcompile.schedule.text import to_text

        return to_text(self)

    def __repr__(self) -> str:
        bands = f", {len(self.bands)} bands" * (len(self.bands) > 1)
        return (
            f"<Schedule {self.n_layers} layers x {self.n_segments} segments, level = {self.level_rule}, "
            f"{self.n_levels} levels, width {self.width}{bands}>"
        )

    def _repr_html_(self) -> str:
        from rmtcompile.schedule.html import to_html_fragment

        return to_html_fragment(self)

    def to_json(self, *, indent: int | None = None) -> str:
        """The schedule as JSON; `rmtcompile.schedule.serial.SCHEMA` documents the fields."""
        from rmtcompile.schedule.serial import to_json

        return to_json(self, indent=indent)

    @staticmethod
    def from_json(text: str | bytes) -> Schedule:
        """Read what `to_json` wrote, and verify it."""
        from rmtcompile.schedule.serial import from_json

        return from_json(text)

    def to_networkx(self) -> nx.DiGraph[Cell]:
        """The cells as a directed graph from producers to consumers.

        Nodes have `level`, `phase`, `variant` and `kind`, and `band` where there are any; edges have `offset`
        and `carries` (names).
        """
        from rmtcompile.schedule.graph import to_networkx

        return to_networkx(self)

    def to_dot(self, expand: Iterable[Cell] | Mapping[Cell, Sequence[Operation]] = ()) -> str:
        """The cells as a Graphviz graph, the cells of a level on one rank.

        Args:
            expand: cells to open to their operations, such as `[(2, 1)]`; the others stay one box.  A
                schedule without a program (from a file, say) takes a mapping from cells to operations.

        Raises:
            ValueError: a cell to open is outside the grid, or this schedule knows no operations.
        """
        from rmtcompile.schedule.graph import to_dot

        return to_dot(self, expand)

    def to_svg(self) -> str:
        """The grid as a picture: a column a segment, a row a layer, level numbers where they fit."""
        from rmtcompile.schedule.svg import to_svg

        return to_svg(self)

    def to_chrome_trace(
        self,
        times: Sequence[float] | None = None,
        backward: Sequence[float] = (),
        bands: Sequence[BandTimes] = (),
    ) -> str:
        """The schedule as trace events (open them in ui.perfetto.dev): a track a layer, a slice a cell, and
        with bands a process a band.

        Args:
            times: measured microseconds of each level.  Without them each level is drawn 100 long.
            backward: measured microseconds of each level's part of backward, which follows.
            bands: when the levels of each band ran, instead of `times`.  Without it each band is drawn `lag`
                levels behind the one before.
        """
        from rmtcompile.schedule.trace import to_chrome_trace

        return to_chrome_trace(self, times, backward, bands)

    def save(self, path: str | Path, *, times: Sequence[float] | None = None) -> Path:
        """Write the schedule in the format that the suffix names.

        `.svg`, `.png` (needs matplotlib), `.html` (the viewer), `.json`, `.dot`, `.trace.json` (Perfetto),
        `.explorer.json` (Model Explorer) or `.txt`.

        Args:
            times: measured microseconds of each level, for `.trace.json` and `.html`.
        """
        from rmtcompile.schedule.files import save

        return save(self, Path(path), times)
