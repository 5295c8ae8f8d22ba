"""The run of a block of levels while it is recorded, and what is kept of it.

Levels run as in any run, but for what belongs to the host: parts of the inputs are read from fixed places,
and what the block leaves is noted as events.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rmtcompile.ir.program import Program
from rmtcompile.passes.emit.borders import Borders
from rmtcompile.runtime.base import BaseRun, Engine
from rmtcompile.runtime.blocks import Block
from rmtcompile.runtime.copies import copy_all, filled_from, paired
from rmtcompile.runtime.run import Run

Part = tuple[Callable[[Any, int], tuple[Any, ...]], int]
"""An emitted function that gives parts of the inputs, and the segment, counted from a block's base."""

Parts = dict[Part, tuple[Any, ...]]
"""Where a block reads the results of these functions."""


class Graph(Protocol):
    """A recording."""

    def replay(self) -> None: ...


class Device(Protocol):
    """What records: calls a function, notes what it launches, and gives the tensors that it returns, which a
    replay fills anew and later replays of other recordings may overwrite."""

    def record(self, body: Callable[[], list[torch.Tensor]]) -> tuple[Graph, list[torch.Tensor]]: ...


@dataclass(frozen=True)
class Event:
    """What the host does after a block: keeps a value ("keep"), hands values on ("hand"), or runs an emitted
    function ("rest").

    Attributes:
        name: of the tap or of the handing function; for "rest" the function itself.
        segment: counted from the block's base.
        values: of "keep" and "hand"; as tensors of the recording.
    """

    kind: str
    name: Any
    segment: int
    values: Any = None


@dataclass(frozen=True)
class Recording:
    """A recorded block.

    Attributes:
        parts: emitted functions whose results the block reads, with the segment, counted from the base.
        places: where it reads the tensors of these results.
        events: what is left to the host, in order.
        values: the tensors of the events.
    """

    graph: Graph
    parts: tuple[Part, ...]
    places: tuple[torch.Tensor, ...]
    events: tuple[Event, ...]
    values: tuple[torch.Tensor, ...]


class Recorded(Protocol):
    """What a block reads of the recordings that it is one of."""

    program: Program
    borders: Borders
    engine: Engine
    has_ends: bool
    inputs: dict[str, torch.Tensor]
    leaves: Mapping[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    init: dict[int, Any]
    stacked: dict[str, torch.Tensor]

    def held(self, name: str, level: int, segments: int) -> list[int]: ...
    def place(self, name: str, age: int) -> Any: ...


class RecordedRun(Run):
    """A run while it is recorded: parts of the inputs are read from fixed places, and what is left to the
    host is noted.

    Attributes:
        base: the segment from which others are counted.
        places: where parts of the inputs are read.
        outer: taps that the host reads.
        events: what is left to the host.
    """

    base: int
    places: Parts
    outer: Collection[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.events: list[Event] = []

    def parts(self, function: Callable[[Any, int], tuple[Any, ...]], segment: int) -> tuple[Any, ...]:
        return self.places[function, segment - self.base]

    def keep(self, names: Sequence[str], segment: int, values: Sequence[Any]) -> None:
        super().keep(names, segment, values)
        for name, value in zip(names, values, strict=True):
            self._leave(name, segment, value)

    def keep_cell(self, name: str, segment: int, value: torch.Tensor) -> None:
        super().keep_cell(name, segment, value)
        self._leave(name, segment, value)

    def _leave(self, name: str, segment: int, value: Any) -> None:
        if name in self.outer:
            self.events.append(Event("keep", name, segment - self.base, value))

    def hand(self, name: str, segment: int, values: tuple[Any, ...]) -> None:
        self.events.append(Event("hand", name, segment - self.base, values))

    def rest(self, function: Callable[[Any, int], None], segment: int) -> None:
        self.events.append(Event("rest", function, segment - self.base))


class BlockRun(RecordedRun):
    """The run of a block while it is recorded."""

    def __init__(self, blocks: Recorded, block: Block, segments: int, parts: Parts) -> None:
        super().__init__(
            blocks.program, segments, blocks.inputs, blocks.leaves, blocks.weights, blocks.engine, False
        )
        self.init, self.stacked = blocks.init, blocks.stacked
        self.blocks, self.base, self.places = blocks, block.base, parts
        self.outer = blocks.borders.outer
        if not blocks.has_ends:
            self._close_lanes(self.program.open_lanes)
        for name in blocks.borders.reach:
            for segment in blocks.held(name, block.levels.start, segments):
                self.taps[name].values[segment] = blocks.place(name, block.base - segment)

    def _close_lanes(self, names: Collection[str]) -> None:
        """Do without lanes of the last segments, which run after the last recorded level."""
        self.lanes = {name: store for name, store in self.lanes.items() if name not in names}
        for feeds in self._feeds_of.values():
            feeds[:] = [(lane, feed) for lane, feed in feeds if lane.name not in names]

    def settle(self) -> None:
        """Leave what the next level reads in the first one of two buffers."""
        for lane in self.lanes.values():
            lane.settle()

    def close(self, level: int) -> None:
        """Leave lanes and values where the next block, which starts at `level`, looks for them."""
        self.settle()
        base = -(-level // self.program.alpha)
        for name in self.blocks.borders.reach:
            held = self.blocks.held(name, level, self.segments)
            for segment in held:  # the oldest first: its new place holds nothing that is still to be read
                if segment not in self.taps[name]:
                    continue
                place, value = self.blocks.place(name, base - segment), self.taps[name][segment]
                pairs = [(to, x) for to, x in paired(place, value) if to is not x]
                copy_all([to for to, _ in pairs], [x for _, x in pairs])


def perform(
    events: Iterable[Event],
    host: BaseRun,
    functions: Mapping[str, Any],
    base: int,
    values: Iterator[torch.Tensor],
) -> None:
    """Do what recorded levels have left to the host.

    Args:
        functions: the emitted module's namespace.
        base: the segment from which those of the events are counted.
        values: the tensors of the events, in memory of their own.
    """
    for event in events:
        segment = base + event.segment
        if event.kind == "rest":
            host.rest(functions[event.name.__name__], segment)
            continue
        own = filled_from(values, event.values)
        if event.kind == "keep":
            host.keep_tap(event.name, segment, own)
        else:
            host.hand(event.name, segment, own)


__all__ = [
    "BlockRun", "Device", "Event", "Graph", "Part", "Parts", "Recorded", "RecordedRun", "Recording",
    "perform",
]
