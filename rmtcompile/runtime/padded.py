"""Recordings of last blocks whose last segment is incomplete: its cells run at the size of a whole one.

    host            the last segment's prologue at the size of the rest, filled into places of the whole size
    replayed        the last levels of all segments; cells of the last one know how much of it is valid
    host            its results cut to the rest; its epilogue

So a text of any length is put together of recordings, and a rest that comes for the first time costs what any
other does. See `passes/cell/padded` for the cells, and `passes/emit/padding.py` for when that is possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.ir.program import Lane
from rmtcompile.passes.emit.padding import Padding
from rmtcompile.passes.grid.partition import PROLOGUE
from rmtcompile.passes.sizes import at
from rmtcompile.runtime.base import BaseRun, Engine
from rmtcompile.runtime.block_run import BlockRun, Event, Parts
from rmtcompile.runtime.blocks import Block
from rmtcompile.runtime.recorded import Ending, RecordedBlocks

_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest relative differences of results. In 16 bits, 0.2: the last levels round what rounding has left.
Models in float64 take norms in float32, which other kernels sum in another order."""


class PaddedBlocks(RecordedBlocks):
    """The last blocks of runs of any rest.

    Args:
        others: the recordings of all other blocks; what these read is read here, too.
        compiled: the program at the size of a whole segment.
        engine: runs it on the lane buffers of the others.
    """

    def __init__(self, others: RecordedBlocks, compiled: Compiled, engine: Engine) -> None:
        super().__init__(
            compiled.program, others.borders, compiled.namespace, engine, others.device, others.leaves,
            others._weights,
        )  # fmt: skip
        self.others, self.compiled = others, compiled  # which keeps its module
        self.padding: Padding = compiled.emitted.padding
        self.inputs, self.init, self.stacked = others.inputs, others.init, others.stacked
        self.weights, self._static = others.weights, others._static
        self._example, self._rooms, self._places = others._example, others._rooms, others._places
        lanes = {lane.name: lane for lane in compiled.program.lanes}
        self.places = {
            tap: _room(lanes[name]) for taps in self.padding.entering.values() for tap, name in taps.items()
        }
        self.remainder = torch.ones((), dtype=torch.int64, device=next(iter(lanes.values())).device)

    # ---- recording -----------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Run the last levels of a text once, so that everything is compiled."""
        segments = self.example_segments
        (block,) = self._recorded_part(segments)
        run = self._block_run(block, segments, self._make_parts(block, segments))
        for level in block.levels:
            run.level(level, self.functions["step"])

    def record_all(self) -> None:
        """See `RecordedBlocks`. Texts shorter than those that rules were read from are recorded, too: whether
        rules hold there is found out for each, and where they do not there may be nothing to record."""
        rolled = self.program.rolled
        proved = min(rolled.proved_on, default=1)
        for segments in reversed(range(max(rolled.minimum, 1), self.example_segments + 1)):
            (block,) = self._recorded_part(segments)
            if block.key not in self._recordings:
                with suppress(*(() if segments >= proved else (RuntimeError, LookupError, ValueError))):
                    self._recordings[block.key] = self._recorded(block, segments)

    def _recorded_part(self, segments: int) -> tuple[Block, ...]:
        return self._cut(segments)[-1:]

    def _enters(self, segment: int, segments: int) -> bool:
        """See `RecordedBlocks`; the host does that for the last segment."""
        return segment < segments - 1

    def _block_run(self, block: Block, segments: int, parts: Parts) -> BlockRun:
        return PaddedRun(self, block, segments, parts)

    # ---- running -------------------------------------------------------------------------------------------

    def has(self, block: Block, ending: Ending) -> bool:
        """See `LastBlocks`."""
        return block.key in self._recordings and ending.sizes[self.padding.rest] >= self.padding.least

    def host(self, segments: int, inputs: Mapping[str, torch.Tensor], ending: Ending) -> BaseRun:
        """See `LastBlocks`."""
        run = _Host(ending.program, segments, inputs, self.leaves, ending.engine)
        run.shapes = at(dict(self.padding.shapes), ending.sizes)
        return run

    def finish(self, block: Block, host: BaseRun, ending: Ending) -> bool:
        """See `LastBlocks`."""
        functions, last = ending.functions, host.segments - 1
        parts = self._given(block, host, functions)
        if parts is None:
            return False
        functions["enter"](host, last)
        self._fill(host, ending)
        self._replay(block, parts, host, functions)
        for name in ("enter_rest", "leave", "leave_rest"):
            if name in functions:
                host.rest(functions[name], last)
        return True

    def _fill(self, host: BaseRun, ending: Ending) -> None:
        """Put what the last segment's prologue gives to cells where they read it."""
        self.remainder.fill_(ending.sizes[self.padding.rest])
        shapes = {lane.name: lane.shape for lane in ending.program.lanes}
        for tap, lane in self.entering(host.segments).items():
            place = _first_part(self.places[tap], shapes[lane])
            place.copy_(host.taps[tap][host.segments - 1])

    def entering(self, segments: int) -> Mapping[str, str]:
        """What the last segment's prologue gives to cells, and a lane for each value."""
        number = self.program.rolled.classes[(PROLOGUE, -1)].of(segments - 1, segments)
        return self.padding.entering[number]


class PaddedRun(BlockRun):
    """The run of a last block while it is recorded: the last segment's prologue has run before, its epilogue
    runs afterwards."""

    blocks: PaddedBlocks

    def __init__(self, blocks: PaddedBlocks, block: Block, segments: int, parts: Parts) -> None:
        super().__init__(blocks, block, segments, parts)
        self.remainder = blocks.remainder
        for tap in blocks.entering(segments):
            self.taps[tap].values[segments - 1] = blocks.places[tap]

    def entering(self, level: int) -> int | None:
        """See `Run`."""
        return self._unless_last(super().entering(level))

    def leaving(self, level: int) -> int | None:
        """See `Run`."""
        return self._unless_last(super().leaving(level))

    def _unless_last(self, segment: int | None) -> int | None:
        return None if segment == self.segments - 1 else segment

    def keep_cell(self, name: str, segment: int, value: torch.Tensor) -> None:
        """See `Run`; the last epilogue reads on the host."""
        super().keep_cell(name, segment, value)
        is_read = segment == self.segments - 1 and name in self.blocks.padding.leaving
        if is_read and name not in self.blocks.borders.outer:
            self.events.append(Event("keep", name, segment - self.base, value))


class _Host(BaseRun):
    """What the host has of a run: values of the last segment's cells are cut to the rest."""

    shapes: Mapping[str, tuple[int, ...]]

    def keep_tap(self, name: str, segment: int, value: Any) -> None:
        """See `BaseRun`."""
        if segment == self.segments - 1 and name in self.shapes:
            value = _first_part(value, self.shapes[name]).contiguous()
        super().keep_tap(name, segment, value)


def _first_part(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A view of the first positions along each dim."""
    return x[tuple(slice(n) for n in shape)]


def _room(lane: Lane) -> torch.Tensor:
    return torch.zeros(lane.shape, dtype=lane.dtype, device=lane.device)


def difference(expected: Any, found: Any) -> str:
    """How far results are from those that were expected, in words; empty where it is rounding."""
    for x, y in zip(tree_leaves(expected), tree_leaves(found), strict=True):
        if x.shape != y.shape:
            return f"of shape {tuple(y.shape)} instead of {tuple(x.shape)}"
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return "integers among them"
            continue
        if not torch.equal(x.isfinite(), y.isfinite()):
            return "others of them are finite"
        one, other = (v.masked_fill(~v.isfinite(), 0).double() for v in (x, y))
        error = float((one - other).norm()) / max(float(one.norm()), 1e-30)
        if error > _ROUNDING.get(x.dtype, 0.2):
            return f"relative difference {error:.1e}"
    return ""


__all__ = ["PaddedBlocks", "difference"]
