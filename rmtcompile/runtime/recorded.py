"""Recordings of blocks of levels, which are made once and serve inputs of any length.

What differs from segment to segment, or from length to length, is done by the host around the replays: the
parts of the inputs that a block's segments read are copied to where the block reads them, and what the block
leaves is copied out.  From block to block a run's state stays in the lanes, and in places for those values of
taps that a later level reads.

Where the last segments depend on sizes that change from input to input, a text's incomplete segment, the last
block is recorded with padded cells (`runtime/padded.py`), or launched instead of recorded (`Ending`): the
host does so while the device is at work on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from rmtcompile.ir.program import Program
from rmtcompile.passes.emit.borders import Borders
from rmtcompile.runtime.base import BaseRun, Engine
from rmtcompile.runtime.block_run import BlockRun, Device, Graph, Parts, Recording, perform
from rmtcompile.runtime.blocks import LONGEST, Block, Key, blocks_of, steady_lengths
from rmtcompile.runtime.copies import copies_of, copy_all, is_tensor, paired, room_for
from rmtcompile.runtime.run import Run
from rmtcompile.runtime.storage import is_kept


@dataclass(frozen=True)
class Ending:
    """What launches the last block of a run, or what comes before and after it: a program of the same code at
    other sizes, which runs on the lane buffers of the recordings.

    Attributes:
        functions: the emitted module's namespace.
        sizes: the free sizes.
    """

    program: Program
    functions: Mapping[str, Any]
    engine: Engine
    sizes: Mapping[str, int]


class LastBlocks(Protocol):
    """Recorded last blocks of runs that end with an incomplete segment."""

    def has(self, block: Block, ending: Ending) -> bool:
        """Whether this block is one of them, for these sizes."""

    def host(self, segments: int, inputs: Mapping[str, torch.Tensor], ending: Ending) -> BaseRun:
        """Such a run, as far as the host has to do with it."""

    def finish(self, block: Block, host: BaseRun, ending: Ending) -> bool:
        """Replay a last block after all others, with what comes before and after it; False where an input
        has another shape than what was recorded."""


class RecordedBlocks:
    """The recordings of one program, and what they read.

    Args:
        borders: what crosses the borders of blocks.
        functions: the emitted module's namespace.
        device: what records.
        leaves: parameters, buffers, state and constants, where recordings read them.
        weights: gives the stacked weights of these leaves.
        has_ends: whether the last blocks of runs are recorded, too, and runs that are a single block.
    """

    SPLITS_ENDS = False
    """Whether the segments that differ from all others may be of several blocks."""

    def __init__(
        self,
        program: Program,
        borders: Borders,
        functions: Mapping[str, Any],
        engine: Engine,
        device: Device,
        leaves: Mapping[str, torch.Tensor],
        weights: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]],
        has_ends: bool = True,
    ) -> None:
        self.program = program
        self.has_ends = has_ends
        self.borders = borders
        self.functions = functions
        self.engine = engine
        self.device = device
        self.leaves = leaves
        self.inputs: dict[str, torch.Tensor] = {}
        self.init: dict[int, Any] = {}
        self.stacked: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self._weights = weights
        self._example: BaseRun | None = None
        self._rooms: dict[tuple[Any, ...], Any] = {}
        self._static: frozenset[int] = frozenset()  # memory that later runs overwrite
        self._places: dict[tuple[str, int], Any] = {}
        self._recordings: dict[Key, Recording] = {}
        self.padded: LastBlocks | None = None

    # ---- what recordings read ------------------------------------------------------------------------------

    def held(self, name: str, level: int, segments: int) -> list[int]:
        """The segments whose value of a tap was made before a level and is read on it or later, ascending."""
        tap = next(tap for tap in self.program.taps if tap.name == name)
        if tap.when[0] != "each" and not self.SPLITS_ENDS:
            return []  # made and read among the segments that differ from all others
        skew, top = self.program.alpha, self.program.n_layers - 1
        made = {"prologue": 0, "epilogue": top}.get(tap.value.kind, tap.value.layer)
        last = min((level - 1 - made) // skew, segments - 1)
        first = max(-((self.borders.reach[name] - level) // skew), 0)
        return [s for s in range(first, last + 1) if is_kept(tap.when, s, segments)]

    def place(self, name: str, age: int) -> Any:
        """Where a tap's value of `age` segments before a block's base is kept from block to block."""
        return self._places[name, age]

    def _make_parts(self, block: Block, segments: int) -> Parts:
        """Room for all parts that a block reads."""
        found: Parts = {}
        grid, example = self.program.grid(segments), self._example
        for level in block.levels:
            for name, segment in (("enter", grid.entering(level)), ("leave", grid.leaving(level))):
                function = self.functions.get(f"{name}_parts")
                if function is None or segment is None or example is None:
                    continue
                if not self._enters(segment, segments):
                    continue
                values = function(example, self._like(segment, segments, example.segments))
                shapes = tuple(tuple(x.shape) for x in pytree.tree_leaves(values) if is_tensor(x))
                key = (function, segment - block.base, shapes)
                if key not in self._rooms:
                    self._rooms[key] = pytree.tree_map_only(torch.Tensor, room_for, values)
                found[function, segment - block.base] = self._rooms[key]
        return found

    def _enters(self, segment: int, segments: int) -> bool:
        """Whether a segment's prologue and epilogue are recorded."""
        return True

    def _like(self, segment: int, segments: int, of: int) -> int:
        """The segment of a run of `of` segments that does the same as one of a run of `segments`."""
        if segment < self.borders.head:
            return segment
        from_end = segments - segment
        return of - from_end if from_end <= self.borders.tail else self.borders.head

    # ---- recording -----------------------------------------------------------------------------------------

    @property
    def example_segments(self) -> int:
        """Segments of a run that shows all that segments do."""
        return self.borders.head + self.borders.tail + 1 + self.program.n_layers

    def begin(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Run once as an example of what levels read and leave, and make room for that.

        Args:
            inputs: arguments of the forward, of `example_segments` segments.
        """
        n = self.example_segments
        example = Run(self.program, n, inputs, self.leaves, self._weights(self.leaves), self.engine, False)
        self.functions["forward"](example)
        self._example = example
        self.inputs = {name: room_for(inputs[name]) for name in self.borders.inputs}
        self._make_places(example)
        self._make_static(example)

    def record_all(self) -> None:
        """Record everything that runs of any length need."""
        for block, segments in self._every_block().values():
            self._recordings[block.key] = self._recorded(block, segments)

    def steady(self) -> Graph:
        """Record the longest block of steady levels, to be timed."""
        longest = ("steady", steady_lengths(self.program.alpha)[0])
        return self._recorded(*self._every_block()[longest]).graph

    def record_again(self, segments: int) -> None:
        """Record a short length once more, since there are faster forms for its width now."""
        block = self._cut(segments)[0]
        if block.key in self._recordings and block.key[0] == "whole":
            self._recordings[block.key] = self._recorded(block, segments)

    def _cut(self, segments: int) -> tuple[Block, ...]:
        return blocks_of(self.program.grid(segments), self.borders.head, self.borders.tail)

    def _every_block(self) -> dict[Key, tuple[Block, int]]:
        """Each block that any run has, with the number of segments of a run that has it.  Lengths below those
        that rules were read from may have other programs, and are left out."""
        found: dict[Key, tuple[Block, int]] = {}
        shortest = min(self.program.rolled.proved_on, default=1)
        for segments in range(shortest, self.example_segments + 2 * LONGEST):
            for block in self._recorded_part(segments):
                found.setdefault(block.key, (block, segments))
        return found

    def _recorded_part(self, segments: int) -> tuple[Block, ...]:
        blocks = self._cut(segments)
        return blocks if self.has_ends else blocks[:-1]

    def _make_places(self, example: Run) -> None:
        """Room for the values of taps that a level may read after the block that made them."""
        skew = self.program.alpha
        for name, reach in self.borders.reach.items():
            like = next(iter(example.taps[name].values.values()), None)
            for age in range(1, reach // skew + 2):
                if like is not None:
                    self._places[name, age] = pytree.tree_map_only(torch.Tensor, room_for, like)

    def _make_static(self, example: Run) -> None:
        """Room for what comes before the first level: stacked weights that are no memory of the model's, and
        what is the same for all segments."""
        again = self._weights(self.leaves)
        moved = {name for name, x in example.weights.items() if again[name].data_ptr() != x.data_ptr()}
        self.weights = {name: room_for(x) if name in moved else x for name, x in example.weights.items()}
        own = {x.untyped_storage().data_ptr() for x in self.leaves.values()}
        is_own = {name: x.untyped_storage().data_ptr() in own for name, x in example.stacked.items()}
        self.stacked = {name: x if is_own[name] else room_for(x) for name, x in example.stacked.items()}
        is_fixed = self.borders.setup_is_fixed
        kept = {i: x for i, x in example.init.items() if is_fixed or i in self.borders.init}
        self.init = pytree.tree_map_only(torch.Tensor, room_for, kept)
        held = pytree.tree_leaves([self.weights, self.init, self.stacked, dict(self.leaves)])
        self._static = frozenset(x.untyped_storage().data_ptr() for x in held if is_tensor(x))

    def _set_up(self) -> None:
        """Compute what comes before the first level and reads no input."""
        pairs = [(self.weights[name], x) for name, x in self._weights(self.leaves).items()]
        if self.borders.setup_is_fixed:
            run = BaseRun(self.program, 1, {}, self.leaves, self.engine)
            self.functions["setup"](run)
            pairs += self._set_up_pairs(run)
        pairs = [(place, value) for place, value in pairs if place.data_ptr() != value.data_ptr()]
        copy_all([place for place, _ in pairs], [value for _, value in pairs])

    def _set_up_pairs(self, run: BaseRun) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(place, value) of what a run has that is the same for all segments."""
        pairs = [(place, run.stacked[name]) for name, place in self.stacked.items()]
        return pairs + [pair for i, place in self.init.items() for pair in paired(place, run.init[i])]

    def _recorded(self, block: Block, segments: int) -> Recording:
        """Record one block of a run of so many segments."""
        parts = self._make_parts(block, segments)
        made: list[BlockRun] = []

        def body() -> list[torch.Tensor]:
            if block.key[0] in ("head", "whole"):
                self._set_up()
            run = self._block_run(block, segments, parts)
            made.append(run)
            for level in block.levels:
                run.level(level, self.functions["step"])
            if block.key[0] in ("head", "steady"):
                run.close(block.levels.stop)
            return [x for event in run.events for x in pytree.tree_leaves(event.values) if is_tensor(x)]

        graph, values = self.device.record(body)
        places = tuple(x for x in pytree.tree_leaves(list(parts.values())) if is_tensor(x))
        return Recording(graph, tuple(parts), places, tuple(made[-1].events), tuple(values))

    def _block_run(self, block: Block, segments: int, parts: Parts) -> BlockRun:
        return BlockRun(self, block, segments, parts)

    # ---- running -------------------------------------------------------------------------------------------

    def run(
        self, segments: int, inputs: Mapping[str, torch.Tensor], ending: Ending | None = None
    ) -> tuple[Any, ...] | None:
        """Replay a run; gives what the emitted `forward` returns, in memory of its own. None where this
        length is not recorded, or where the input's values have other shapes than those recorded.

        Args:
            ending: launches the last block, or what is around it, where ends are not recorded.
        """
        blocks, last = self._recorded_part(segments), self._cut(segments)[-1]
        padded = self.padded if self._is_padded(last, ending) else None
        if not (blocks or padded) or any(block.key not in self._recordings for block in blocks):
            return None
        functions = self.functions if ending is None else ending.functions
        host = self._host(segments, inputs, ending, padded)
        if self.borders.setup_is_fixed:
            host.init, host.stacked = self.init, self.stacked
        else:
            functions["setup"](host)
        given: list[list[torch.Tensor]] = []
        for block in blocks:
            parts = self._given(block, host, functions)
            if parts is None:
                return None
            given.append(parts)
        if not self._filled(host):
            return None
        for block, parts in zip(blocks, given, strict=True):
            self._replay(block, parts, host, functions)
        if ending is not None and padded is None:
            self._launch(last, host, functions)
        elif ending is not None and padded is not None and not padded.finish(last, host, ending):
            return None
        return self._own(functions["outputs"](host))

    def _is_padded(self, last: Block, ending: Ending | None) -> bool:
        """Whether the last block of a run is a recorded one with padded cells."""
        return ending is not None and self.padded is not None and self.padded.has(last, ending)

    def _host(
        self,
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        ending: Ending | None,
        padded: LastBlocks | None,
    ) -> BaseRun:
        """The run, as far as the host has to do with it."""
        if ending is None:
            return BaseRun(self.program, segments, inputs, self.leaves, self.engine)
        if padded is not None:
            return padded.host(segments, inputs, ending)
        return Run(ending.program, segments, inputs, self.leaves, self.weights, ending.engine, False)

    def _launch(self, block: Block, run: BaseRun, functions: Mapping[str, Any]) -> None:
        """Run the levels of a block one by one, after what the recordings of earlier ones have left."""
        for name in self.borders.reach:
            for segment in self.held(name, block.levels.start, run.segments):
                if segment not in run.taps[name]:
                    run.taps[name].values[segment] = self.place(name, block.base - segment)
        for level in block.levels:
            functions["step"](run, level)

    def _filled(self, host: BaseRun) -> bool:
        """Copy what levels read of this input; whether it all has the recorded shapes."""
        pairs = [(self.inputs[name], host.inputs[name]) for name in self.borders.inputs]
        if not self.borders.setup_is_fixed:
            pairs += self._set_up_pairs(host)
        if any(place.shape != value.shape for place, value in pairs):
            return False
        copy_all([place for place, _ in pairs], [value for _, value in pairs])
        return True

    def _given(self, block: Block, host: BaseRun, functions: Mapping[str, Any]) -> list[torch.Tensor] | None:
        """The parts of the inputs that a block reads; None if they have other shapes than those recorded."""
        recording = self._recordings[block.key]
        given = [functions[part.__name__](host, block.base + offset) for part, offset in recording.parts]
        found = [x for x in pytree.tree_leaves(given) if is_tensor(x)]
        shapes = [x.shape for x in found]
        return found if shapes == [place.shape for place in recording.places] else None

    def _replay(
        self, block: Block, given: Sequence[torch.Tensor], host: BaseRun, functions: Mapping[str, Any]
    ) -> None:
        """Fill what a block reads, replay it, and do what it leaves to the host."""
        recording, base = self._recordings[block.key], block.base
        copy_all(recording.places, given)
        recording.graph.replay()
        perform(recording.events, host, functions, base, iter(copies_of(recording.values)))

    def _own(self, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The outputs; copies where they are memory that later runs overwrite."""

        def own(x: torch.Tensor) -> torch.Tensor:
            return x.clone() if x.untyped_storage().data_ptr() in self._static else x

        return pytree.tree_map_only(torch.Tensor, own, outputs)


__all__ = ["Ending", "LastBlocks", "RecordedBlocks"]
