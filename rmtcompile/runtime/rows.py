"""Running with alpha = 0: the cells of a level are the segments of one layer.

The transpose of `Run`: a lane has a place for each segment, and a feed with offset (ds, dl) is read ds places
further on, dl layers later.  Nothing is overwritten: a layer's results are kept, stacked by segment, until
the last layer that reads them has run, and a lane is a slice of them where it can be.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from rmtcompile.ir.program import Feed, Lane, Program, Source
from rmtcompile.runtime.base import BaseRun, OnLevel, OnValue, Outputs
from rmtcompile.runtime.crossing import Crossing
from rmtcompile.runtime.engine import Engine
from rmtcompile.runtime.execute import Executor
from rmtcompile.runtime.stacks import Alone
from rmtcompile.runtime.storage import Target

Row = tuple[torch.Tensor, int]  # values [n, ...] of several segments, and which of them


@dataclass(frozen=True)
class RowWindow:
    """Cells of one layer in one group: segments, ascending, with the class of each."""

    group: str
    layer: int
    segments: tuple[int, ...]
    classes: tuple[int, ...]


class RowStore:
    """What cells gave, by (group, output, layer) and segment, until the last cell that reads it has run."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.rows: dict[tuple[str, str, int], dict[int, Row]] = {}
        self.reach: dict[tuple[str, str], tuple[int, int]] = {}  # furthest reader: segments, layers
        for lane in lanes:
            for feed in lane.feeds:
                ds, dl = self.reach.get((feed.group, feed.source), (0, 0))
                self.reach[feed.group, feed.source] = max(ds, feed.offset[0]), max(dl, feed.offset[1])

    def put(self, window: RowWindow, outputs: Outputs) -> None:
        """Keep the outputs of a window that a lane reads."""
        for name, values in outputs.items():
            if (window.group, name) in self.reach:
                rows = self.rows.setdefault((window.group, name, window.layer), {})
                rows.update((s, (values, i)) for i, s in enumerate(window.segments))

    def get(self, feeds: Sequence[Feed], segment: int, layer: int) -> Row | None:
        """What the cell (segment, layer) reads by the feed that reaches it; None where none does."""
        for feed in feeds:
            ds, dl = feed.offset
            row = self.rows.get((feed.group, feed.source, layer - dl), {}).get(segment - ds)
            if row is not None:
                return row
        return None

    def copied(self) -> RowStore:
        """What it keeps now, apart."""
        other = copy.copy(self)
        other.rows = {key: dict(rows) for key, rows in self.rows.items()}
        return other

    def forget(self, layer: int, block: range) -> None:
        """Drop what no cell above `layer` reads; the last segments of the block stay for the next one."""
        for key, rows in self.rows.items():
            back, up = self.reach[key[:2]]
            if key[2] + up == layer:
                kept = {s: row for s, row in rows.items() if s >= block.stop - back}
                # Copies, so that the rest of the block's values can be freed.
                self.rows[key] = {s: (values[i : i + 1].clone(), 0) for s, (values, i) in kept.items()}


class RowLane:
    """One live-in of the cells of a layer, by segment."""

    def __init__(self, lane: Lane, store: RowStore) -> None:
        self.spec = lane
        self.store = store
        self.given: dict[int, torch.Tensor] = {}
        self.zero = torch.zeros((), dtype=lane.dtype, device=lane.device)

    def copied(self, store: RowStore) -> RowLane:
        """The same on another store."""
        other = copy.copy(self)
        other.store, other.given = store, dict(self.given)
        return other

    def fill(self, segment: int, value: torch.Tensor) -> None:
        """What the segment's cell of the next layer reads from outside the cells."""
        self.given[segment] = value

    def read(self, layer: int, segments: Sequence[int]) -> torch.Tensor:
        """Values for these segments, [n, ...]; zeros where a class of segments does not use the lane."""
        feeds = [feed for feed in self.spec.feeds if layer - feed.offset[1] in feed.layers]
        parts: list[list[Any]] = []  # [values, first row, last row]; the first row of a given value is None
        for s in segments:
            row = (self.given[s], None) if s in self.given else self.store.get(feeds, s, layer)
            values, i = row if row is not None else (self.zero, None)
            if parts and parts[-1][0] is values and i is not None and i == parts[-1][2] + 1:
                parts[-1][2] = i
            elif parts and parts[-1][1] is None and i is None:
                parts[-1][0].append(values)
            else:
                parts.append([[values] if i is None else values, i, i])
        pieces = [self._piece(*part) for part in parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _piece(self, values: Any, first: int | None, last: int | None) -> torch.Tensor:
        if first is not None and last is not None:
            return values[first : last + 1]
        if all(value is values[0] for value in values):
            return values[0].expand(len(values), *self.spec.shape)
        return torch.stack([value.expand(self.spec.shape) for value in values])


class RowEngine(Engine):
    """Runs cell functions, compiled or not.

    A function is compiled with all sizes fixed for one segment, for a full block and for the first other
    number of segments that is seen, and with the number left open for every other one.
    """

    def __init__(self, program: Program, backend: str | Callable[..., Any]) -> None:
        super().__init__(program, backend, keeps_buffers=False)
        self._first: dict[str, int] = {}

    def share(self, other: Engine) -> None:
        """Use the compiled forms of an engine of the same code at other sizes."""
        super().share(other)
        assert isinstance(other, RowEngine)
        self._first = other._first

    def call(
        self,
        function: Callable[..., Any],
        width: int,
        args: tuple[torch.Tensor, ...],
        targets: Sequence[Target | None] = (),
    ) -> tuple[torch.Tensor, ...]:
        """Run a cell function for `width` segments; nothing is stored anywhere else."""
        assert not targets
        if not self.is_compiled:
            return function(*args)
        fixed = {1, self.program.block}
        if width not in fixed:
            fixed.add(self._first.setdefault(function.__name__, width))
        size = width if width in fixed else 0
        key = self._key(function, size)
        if key not in self._compiled:
            self._compiled[key] = self._compile(function, function, size)
        return self._compiled[key](*args)


class RowRun(BaseRun):
    """State of one run over S segments, block by block.

    Attributes:
        block: the segments that run together now.
    """

    def __init__(
        self,
        program: Program,
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
        engine: RowEngine,
        on_level: OnLevel | None = None,
        on_value: OnValue | None = None,
        crossing: Crossing | None = None,
    ) -> None:
        super().__init__(program, segments, inputs, leaves, engine, on_level, on_value, crossing)
        self.block = range(0)
        self.store = RowStore(program.lanes)
        for group, output, layer, segment, value in crossing.rows() if crossing is not None else ():
            self.store.rows.setdefault((group, output, layer), {})[segment] = (value[None], 0)
        self.lanes = {lane.name: RowLane(lane, self.store) for lane in program.lanes}
        self._own = {
            f"{group.name}.{port.name}": dict(zip(group.layers, port.source, strict=True))
            for group in program.groups
            for port in group.ports
            if port.role == "layer"
        }

    def copied(self) -> Self:
        """See `BaseRun`."""
        other = super().copied()
        other.store = self.store.copied()
        other.lanes = {name: lane.copied(other.store) for name, lane in self.lanes.items()}
        return other

    # ---- levels --------------------------------------------------------------------------------------------

    def is_last(self, level: int) -> bool:
        """Whether a layer is the last one of the block."""
        return level == self.program.n_layers - 1

    @property
    def blocks(self) -> tuple[range, ...]:
        """The segments, as many at a time as run together."""
        return self.grid.blocks

    def begin(self, block: range) -> None:
        """The segments of `block` run from now on."""
        self.block = block

    def alive(
        self, layer: int, layers: Sequence[int], classes: Sequence[int] | None = None, last: int | None = None
    ) -> list[int]:
        """Segments of the block, of some classes only, up to segment `last`; none if the layer is not one of
        `layers`."""
        if layer not in layers:
            return []
        return [
            s
            for s in self.block
            if (last is None or s <= last) and (classes is None or self.class_of(layer, s) in classes)
        ]

    def windows(self, layer: int) -> list[RowWindow]:
        """The block's cells of a layer, one window a group."""
        classes = {s: self.class_of(layer, s) for s in self.block}
        found = []
        for group in self.program.groups:
            segments = tuple(s for s, number in classes.items() if number in group.classes)
            if segments and layer in group.layers:
                found.append(RowWindow(group.name, layer, segments, tuple(classes[s] for s in segments)))
        return found

    # ---- reading and writing for a window ------------------------------------------------------------------

    def read(self, lane: str, window: RowWindow) -> torch.Tensor:
        """Lane values of a window's cells, [n, ...]."""
        return self.lanes[lane].read(window.layer, window.segments)

    def own(self, name: str, window: RowWindow) -> torch.Tensor:
        """What the cells of the window's layer share: a parameter, or an init value."""
        source: Source = self._own[name][window.layer]
        return self.leaves[source.name] if source.kind == "leaf" else self.init[source.node]

    def call(
        self, function: Callable[..., tuple[torch.Tensor, ...]], window: RowWindow, *args: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Run a cell function for a window, in the form that the engine has compiled for its width."""
        width = len(window.segments)
        return self.passing(function, args, lambda given: self.engine.call(function, width, given, ()))

    def is_only(self, window: RowWindow, classes: set[int]) -> bool:
        """Whether all cells of the window are of these classes."""
        return set(window.classes) <= classes

    def write(self, layer: int, windows: Sequence[RowWindow], results: Sequence[Outputs]) -> None:
        """Keep the results of a layer (there are none where nobody reads it) for the layers that read them,
        and those that are read outside the cells; drop what is read no more."""
        for window, outputs in zip(windows, results, strict=True):
            cells = zip([window.layer] * len(window.segments), window.segments, window.classes, strict=True)
            self.show_cells(window.group, cells, outputs)
            self.store.put(window, outputs)
            if self.crossing is not None:
                layers = [window.layer] * len(window.segments)
                self.crossing.keep_cells(window.group, layers, window.segments, outputs)
            for tap in self._cell_taps:
                for group, output in tap.group_outputs:
                    if (group, tap.value.layer) == (window.group, window.layer):
                        self._keep(tap.name, tap.when, window, outputs[output])
        for lane in self.lanes.values():
            lane.given.clear()
        self.store.forget(layer, self.block)

    def _keep(self, name: str, when: tuple[Any, ...], window: RowWindow, values: torch.Tensor) -> None:
        for row, segment in enumerate(window.segments):
            if when[0] == "each":
                self.keep_tap(name, segment, values[row])
            elif segment == (when[1] if when[0] == "at" else self.segments - 1 - when[1]):
                self.keep_tap(name, segment, values[row].clone())  # without the rest of the block


class RowExecutor(Executor):
    """Runs one program with alpha = 0 for any number of segments. Weights stay where they are."""

    def new_engine(self, backend: str | Callable[..., Any], keeps_buffers: bool) -> RowEngine:
        """An engine for the program; nothing outlives a run in it."""
        return RowEngine(self.program, backend)

    def compile_forms(self, segments: int, inputs: list[torch.Tensor]) -> bool:
        """Forms are compiled when they are first needed."""
        return False

    def launch_with_gradients(
        self,
        segments: int,
        inputs: list[torch.Tensor],
        leaves: dict[str, torch.Tensor] | None = None,
        alone: Sequence[Alone] = (),
        rooms: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """See `Executor`; no weights are stacked."""
        return super().launch_with_gradients(segments, inputs, leaves)

    def _run(
        self,
        segments: int,
        inputs: list[torch.Tensor],
        leaves: dict[str, torch.Tensor],
        functional: bool,
        on_level: OnLevel | None = None,
        on_value: OnValue | None = None,
        crossing: Crossing | None = None,
    ) -> tuple[Any, ...]:
        named = dict(zip(self.compiled.input_names, inputs, strict=True))
        assert isinstance(self.engine, RowEngine)
        run = RowRun(self.program, segments, named, leaves, self.engine, on_level, on_value, crossing)
        return self._execute(run)
