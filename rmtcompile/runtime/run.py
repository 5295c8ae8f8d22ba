"""One run of an emitted program: which cells are alive on a level, their storage, and what is read and
written for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from rmtcompile.ir.program import Feed, Lane, Program
from rmtcompile.runtime.base import BaseRun, Engine, OnLevel, OnValue, Outputs
from rmtcompile.runtime.crossing import Crossing
from rmtcompile.runtime.gradients import Rows, is_transformed
from rmtcompile.runtime.storage import LaneStore, Target, as_slice, is_kept


@dataclass(frozen=True)
class Window:
    """The cells of one group on one level: layers, ascending, with the segment and class of each.

    Windows with equal keys run the same code on the same storage.
    """

    group: str
    layers: tuple[int, ...]
    segments: tuple[int, ...]
    classes: tuple[int, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.group, self.layers, self.classes)


Stored = tuple[str, tuple[int, ...], str]
"""An output of a window's cells: group, layers, output."""


class Run(BaseRun):
    """State of one run over S segments, with a skew of 1 and more: cells of several layers run together.

    Attributes:
        weights: stacked weights by "group.port".
        lanes: what cells read of other cells; those that are given are shared with other runs.
        rooms: memory for sums of gradients of stacked weights, by their names, where it is given.
    """

    def __init__(
        self,
        program: Program,
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        engine: Engine,
        functional: bool,
        on_level: OnLevel | None = None,
        on_value: OnValue | None = None,
        crossing: Crossing | None = None,
        lanes: Mapping[str, LaneStore] | None = None,
    ) -> None:
        super().__init__(program, segments, inputs, leaves, engine, on_level, on_value, crossing)
        self.weights = weights
        given = lanes or {}
        self.lanes = {
            lane.name: given[lane.name]
            if lane.name in given
            else LaneStore(lane, functional, None if functional else engine.buffers(lane))
            for lane in program.lanes
        }
        self._groups = {group.name: group for group in program.groups}
        self.rooms: Mapping[str, torch.Tensor] = {}
        self._rows: dict[str, Rows] = {}  # of weights with gradients
        self._feeds_of = _feeds_by_producer(program)
        self.stored: dict[Stored, Target] = {}  # what cells of this level have stored themselves
        self._ports = {
            (group.name, port.source): port.name
            for group in program.groups
            for port in group.ports
            if port.role == "lane"
        }

    def copied(self) -> Self:
        """See `BaseRun`."""
        other = super().copied()
        other.lanes = {name: store.copied() for name, store in self.lanes.items()}
        other.stored = {}
        return other

    # ---- levels --------------------------------------------------------------------------------------------

    def resume(self, level: int, crossing: Crossing) -> None:
        """See `BaseRun`."""
        for segment, layer in self.grid.alive(level, range(self.grid.n_layers)):
            for lane, value in crossing.refills(segment, layer):
                self.lanes[lane].fill(layer, value)

    @property
    def ramp_up(self) -> range:
        """Levels before full width."""
        return self.grid.phases.ramp_up

    @property
    def steady(self) -> range:
        """Levels of full width."""
        return self.grid.phases.steady

    @property
    def ramp_down(self) -> range:
        """Levels after full width."""
        return self.grid.phases.ramp_down

    def entering(self, level: int) -> int | None:
        """The segment that enters layer 0 on this level."""
        return self.grid.entering(level)

    def leaving(self, level: int) -> int | None:
        """The segment that left the last layer on this level."""
        return self.grid.leaving(level)

    def alive(
        self, level: int, layers: Sequence[int], classes: Sequence[int] | None = None, last: int | None = None
    ) -> list[tuple[int, int]]:
        """(segment, layer) of this level's cells among `layers`, of some classes only, up to segment
        `last`."""
        return [
            (segment, layer)
            for segment, layer in self.grid.alive(level, layers)
            if (last is None or segment <= last)
            and (classes is None or self.class_of(layer, segment) in classes)
        ]

    def windows(self, level: int) -> list[Window]:
        """The cells of this level, one window a group."""
        found: list[Window] = []
        for group in self.program.groups:
            alive = self.grid.alive(level, group.layers)
            cells = [(layer, s, self.class_of(layer, s)) for s, layer in alive]
            cells = [cell for cell in cells if cell[2] in group.classes]
            if cells:
                layers, segments, classes = zip(*cells, strict=True)
                found.append(Window(group.name, layers, segments, classes))
        return found

    # ---- reading and writing for a window ------------------------------------------------------------------

    def read(self, lane: str, window: Window) -> torch.Tensor:
        """Lane values of a window's cells, [n, ...]."""
        return self.lanes[lane].read(window.layers)

    def read_each(self, lane: str, window: Window) -> tuple[torch.Tensor, ...]:
        """Values of a lane that grows, one a cell."""
        return self.lanes[lane].each(window.layers)

    def weight(self, name: str, window: Window) -> torch.Tensor:
        """Stacked weights of a window's layers, [n, ...], a view."""
        group, stack = self._groups[window.group], self.weights[name]
        ranks = [group.layers.index(layer) for layer in window.layers]
        if not (stack.requires_grad and torch.is_grad_enabled()) or is_transformed():
            return _rows(stack, ranks)
        if name not in self._rows:
            self._rows[name] = Rows(stack, self.rooms.get(name))
        return self._rows[name].of(ranks)

    def invariant(self, name: str, window: Window) -> torch.Tensor:
        """Values computed once a run, stacked by layer, for a window's layers."""
        group = self._groups[window.group]
        return _rows(self.stacked[name], [group.layers.index(layer) for layer in window.layers])

    def call(
        self, function: Callable[..., tuple[torch.Tensor, ...]], window: Window, *args: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Run a cell function for a window, in the form that the engine has compiled for its width; results
        that a lane may receive directly are stored there."""
        outputs = self._groups[window.group].outputs
        targets = [self._target(window, output) for output in outputs]
        given = zip(outputs, targets, strict=True)
        self.stored.update({(window.group, window.layers, name): t for name, t in given if t})
        if len(window.layers) == 1 and self.segments > 1 and torch.is_grad_enabled():
            args = self.engine.likened(function, args)
        width = len(window.layers)
        return self.passing(function, args, lambda given: self.engine.call(function, width, given, targets))

    def _target(self, window: Window, output: str) -> Target | None:
        """The lane that receives an output of a window's cells directly, if one may."""
        for lane, feed in self._feeds_of.get(window.group, ()):
            places = [layer + feed.offset[1] for layer in window.layers]
            read = [layer in feed.layers for layer in window.layers]
            fits = (is_read or p in lane.spare for is_read, p in zip(read, places, strict=True))
            if feed.source == output and any(read) and all(fits):
                place = self.lanes[lane.name].target(places)
                if place is not None:
                    port = self._ports.get((window.group, lane.name))
                    return Target(
                        lane.name, feed.offset, place, port if lane.placement == "in_place" else None
                    )
        return None

    def is_only(self, window: Window, classes: set[int]) -> bool:
        """Whether to run the window by the function for these classes alone."""
        return set(window.classes) <= classes and not self.engine.prefers_mixed(len(window.layers))

    def moves(self, level: int) -> list[tuple[LaneStore, list[int], Any]]:
        """Values that move from lane to lane with their segment, also past cells that compute nothing; read
        before anything of this level is written."""
        found = []
        for lane, feed in self._feeds_of.get("", ()):
            layers = [layer for _, layer in self.alive(level, feed.layers)]
            if layers:
                source = self.lanes[feed.source]
                values: Any = source.each(layers) if source.spec.grows else source.read(layers)
                values = values if source.functional else values.clone()
                found.append((self.lanes[lane.name], [layer + feed.offset[1] for layer in layers], values))
        return found

    def write(self, windows: Sequence[Window], results: Sequence[Outputs]) -> None:
        """Store the results of a level in the lanes that they feed, where the cells have not done so, and
        keep those that are read outside the cells."""
        for window, outputs in zip(windows, results, strict=True):
            self.show_cells(
                window.group, zip(window.layers, window.segments, window.classes, strict=True), outputs
            )
            self.store(window, outputs)
            self.keep_cells(window, outputs, range(len(window.layers)), self.stored)
            if self.crossing is not None:
                self.crossing.keep_cells(window.group, window.layers, window.segments, outputs)
        for store in self.lanes.values():
            store.turn()
        self.stored.clear()

    def store(self, window: Window, outputs: Outputs) -> None:
        """Store what a window's cells have given in the lanes that it feeds, where they have not done so."""
        for lane, feed in self._feeds_of.get(window.group, ()):
            layers = [layer for layer in window.layers if layer in feed.layers]
            stored = self.stored.get((window.group, window.layers, feed.source))
            if not layers or (stored and (stored.lane, stored.offset) == (lane.name, feed.offset)):
                continue
            values = outputs[feed.source]
            if len(layers) < len(window.layers):
                values = _rows(values, [window.layers.index(layer) for layer in layers])
            self.lanes[lane.name].write([layer + feed.offset[1] for layer in layers], values)

    def keep_cells(
        self, window: Window, outputs: Outputs, rows: range, stored: Mapping[Stored, Target]
    ) -> None:
        """Keep what is read outside the cells.

        Args:
            rows: which rows of the window and its outputs are cells of this run.
            stored: the outputs that stand in lanes, whose places will be written again.
        """
        for tap in self._cell_taps:
            if tap.value.layer not in window.layers:
                continue
            row = window.layers.index(tap.value.layer)
            segment = window.segments[row]
            if row not in rows or not is_kept(tap.when, segment, self.segments):
                continue
            for group, output in tap.group_outputs:
                if group == window.group:
                    value = outputs[output][row]
                    is_stored = (group, window.layers, output) in stored
                    self.keep_cell(tap.name, segment, value.clone() if is_stored else value)

    def keep_cell(self, name: str, segment: int, value: torch.Tensor) -> None:
        """Keep a cell's result for its readers outside the cells."""
        self.keep_tap(name, segment, value)


def move(moved: list[tuple[LaneStore, list[int], Any]]) -> None:
    """Store the values that `Run.moves` has read."""
    for lane, layers, values in moved:
        lane.write(layers, values)


def _rows(stacked: Any, ranks: Sequence[int]) -> Any:
    if isinstance(stacked, tuple):  # values that grow, one a cell
        return tuple(stacked[i] for i in ranks)
    window = as_slice(ranks)
    return stacked[window] if window is not None else stacked[list(ranks)]


def _feeds_by_producer(program: Program) -> dict[str, list[tuple[Lane, Feed]]]:
    found: dict[str, list[tuple[Lane, Feed]]] = {}
    for lane in program.lanes:
        for feed in lane.feeds:
            kept = tuple(layer for layer in feed.layers if layer + feed.offset[1] in lane.places)
            if kept:
                found.setdefault(feed.group, []).append(
                    (lane, Feed(feed.group, feed.source, feed.offset, kept))
                )
    return found

