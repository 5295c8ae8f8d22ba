"""Recorded levels of one band: each kind of level is recorded once, and serves runs of any length.

    level t of a run  ->  its kind: which cells run, counted from the segment that enters, which of them are
                          of the first or last segments, what arrives, what is held  ->  one recording

Levels of one kind do the same, whatever their number and the number of segments. What arrives is put into the
lanes by the host before a replay, and what leaves is taken from the recording after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.ir.bands import Band, Cut, Sent
from rmtcompile.passes.emit.borders import Borders
from rmtcompile.runtime.bands.links import Value
from rmtcompile.runtime.bands.run import BandRun, Message
from rmtcompile.runtime.bands.traffic import received_on
from rmtcompile.runtime.base import BaseRun, Engine
from rmtcompile.runtime.block_run import BlockRun, Device, Parts, Recording
from rmtcompile.runtime.blocks import Block, Key
from rmtcompile.runtime.copies import copy_all, is_tensor, paired, room_for
from rmtcompile.runtime.recorded import RecordedBlocks
from rmtcompile.schedule import Grid

KEPT = 64
"""Numbers of segments whose levels' kinds are kept."""

_NO_TENSORS = "a band sends something else than tensors"

Incoming = tuple[Sent, int]
"""What arrives, and its segment, counted from the base."""


@dataclass(frozen=True)
class BandRecording(Recording):
    """A recorded level.

    Attributes:
        incoming: taps that arrive before it, and where it reads them.
        outgoing: what it sends, with the segment, counted from the base, and the tensors of the values.
    """

    incoming: tuple[tuple[Incoming, Any], ...] = ()
    outgoing: tuple[tuple[Incoming, torch.Tensor], ...] = ()


class BandBlockRun(BandRun, BlockRun):
    """The run of one level while it is recorded. On levels of odd parity lanes with two buffers have changed
    their roles."""

    takes_at_once = True

    def settle(self) -> None:
        """Nothing is moved: the next level is of the other parity."""


class RecordedBand(RecordedBlocks):
    """The recordings of one band, a level each.

    Args:
        whole: the layers of the whole program's groups, by name.
        borders: of the whole program.
        example: the band's part of a run that shows all that segments do.

    Attributes:
        levels_read: taps that levels of any band read.
    """

    SPLITS_ENDS = True

    def __init__(
        self,
        cut: Cut,
        band: Band,
        whole: Mapping[str, tuple[int, ...]],
        borders: Borders,
        functions: Mapping[str, Any],
        engine: Engine,
        device: Device,
        example: BandRun,
        leaves: Mapping[str, torch.Tensor],
        weights: Callable[[], dict[str, torch.Tensor]],
    ) -> None:
        known = band.makes | band.reads
        reach = {name: levels for name, levels in borders.reach.items() if name in band.reads}
        inputs = tuple(name for name in borders.inputs if name in example.inputs.read)  # type: ignore[attr-defined]
        mine = replace(borders, reach=reach, inputs=inputs, outer=borders.outer & known)
        super().__init__(band.program, mine, functions, engine, device, leaves, lambda _: weights())
        self.cut, self.band, self.whole = cut, band, whole
        self.levels_read = frozenset(borders.reach)
        self._kinds: dict[int, tuple[Key, ...]] = {}
        self._lane_places: dict[tuple[Sent, int], torch.Tensor] = {}
        self._example = example
        self.inputs = {name: room_for(example.inputs[name]) for name in mine.inputs}
        self._make_places(example)
        self._make_static(example)

    # ---- kinds of levels -----------------------------------------------------------------------------------

    def _cut(self, segments: int) -> tuple[Block, ...]:
        if segments not in self._kinds:
            while len(self._kinds) >= KEPT:
                del self._kinds[next(iter(self._kinds))]
            self._kinds[segments] = self._all_kinds(segments)
        first, skew = self.grids(segments)[self.band.index].levels.start, self.program.alpha
        return tuple(
            Block(kind, range(level, level + 1), -(-level // skew))
            for level, kind in enumerate(self._kinds[segments], first)
        )

    def _all_kinds(self, segments: int) -> tuple[Key, ...]:
        """The kinds of all levels. Those of a long run are those of a short one, with the levels of two
        segments in its middle repeated."""
        skew, enough = self.program.alpha, 2 * self.example_segments
        if segments > enough + 1:
            short = enough + (segments - enough) % 2
            kinds, middle = self._all_kinds(short), skew * self.example_segments
            period = kinds[middle : middle + 2 * skew]
            return kinds[:middle] + period * ((segments - short) // 2) + kinds[middle:]
        grids = self.grids(segments)
        grid = grids[self.band.index]
        return tuple(self._kind(grids, grid, level) for level in grid.levels)

    def grids(self, segments: int) -> tuple[Grid, ...]:
        """Of all bands' parts of a run."""
        return tuple(band.program.grid(segments) for band in self.cut.bands)

    def _kind(self, grids: tuple[Grid, ...], grid: Grid, level: int) -> Key:
        """All that a level does, but for its number."""
        base, count = -(-level // grid.skew), grid.n_segments

        def told(segment: int | None) -> Any:
            if segment is None:
                return None
            early = segment if segment < self.borders.head else None
            late = count - segment if count - segment <= self.borders.tail else None
            return segment - base, early, late

        cells = tuple((layer, told(s)) for s, layer in grid.cells(level))
        got = tuple((sent, told(s), at - level) for sent, s, at in self.received(grids, level))
        held = tuple((n, told(s)) for n in self.borders.reach for s in self.held(n, level, count))
        parity = (level - grid.levels.start) % 2
        return parity, cells, told(grid.entering(level)), told(grid.leaving(level)), got, held

    def received(self, grids: tuple[Grid, ...], level: int) -> list[tuple[Sent, int, int]]:
        """See `received_on`; without values that no level reads."""
        found = received_on(self.cut, self.band.index, grids, level)
        return [one for one in found if not one[0].is_tap or one[0].name in self.levels_read]

    def _every_block(self) -> dict[Key, tuple[Block, int]]:
        found: dict[Key, tuple[Block, int]] = {}
        shortest = min(self.program.rolled.proved_on, default=1)
        for segments in range(shortest, self.example_segments + 2):
            for block in self._cut(segments):
                found.setdefault(block.key, (block, segments))
        return found

    # ---- recording -----------------------------------------------------------------------------------------

    def _recorded(self, block: Block, segments: int) -> BandRecording:
        parts: Parts = self._make_parts(block, segments)
        level, grids = block.levels.start, self.grids(segments)
        parity = (level - grids[self.band.index].levels.start) % 2
        taps = [one for one in self.received(grids, level) if one[0].is_tap]
        incoming = tuple(((sent, s - block.base), self._room(sent, i)) for i, (sent, s, _) in enumerate(taps))
        made: list[BandBlockRun] = []

        def body() -> list[torch.Tensor]:
            run = BandBlockRun(self, block, segments, parts)
            run.join(self.band, self.whole)
            made.append(run)
            for lane in run.lanes.values():
                if parity:
                    lane.turn()
            for (sent, offset), room in incoming:
                run.arrive(Message(sent, level - 1, block.base + offset, Value(room)))
            run.level(level, self.functions["step"])
            run.close(level + 1)
            run.outgoing = [m for m in run.outgoing if not m.sent.is_tap or m.sent.name in self.levels_read]
            values = [m.value for m in run.outgoing]
            if not all(is_tensor(value) for value in values):
                raise RuntimeError(_NO_TENSORS)
            return _tensors([event.values for event in run.events]) + values

        graph, values = self.device.record(body)
        run = made[-1]
        count = len(_tensors([event.values for event in run.events]))
        sends = [(m.sent, m.segment - block.base) for m in run.outgoing]
        places = tuple(_tensors(list(parts.values())))
        return BandRecording(
            graph,
            tuple(parts),
            places,
            tuple(run.events),
            tuple(values[:count]),
            incoming,
            tuple(zip(sends, values[count:], strict=True)),
        )

    def _room(self, sent: Sent, index: int) -> Any:
        """Where a level reads a tap that arrives."""
        key = ("arrives", sent, index)
        if key not in self._rooms:
            self._rooms[key] = pytree.tree_map_only(torch.Tensor, room_for, self._example_of(sent))
        return self._rooms[key]

    def _example_of(self, sent: Sent) -> Any:
        assert self._example is not None
        return next(iter(self._example.taps[sent.name].values.values()))

    def like(self, sent: Sent) -> Any:
        """Zeros in the place of a value that this band sends or receives.

        Raises:
            RuntimeError: it is something else than tensors.
        """
        if not sent.is_tap:
            lane = next(lane for lane in self.cut.whole.lanes if lane.name == sent.name)
            return torch.zeros(lane.shape, dtype=lane.dtype, device=self.program.lanes[0].device)
        value = self._example_of(sent)
        if not all(is_tensor(x) for x in pytree.tree_leaves(value)):
            raise RuntimeError(_NO_TENSORS)
        return pytree.tree_map(lambda x: x.new_zeros(x.shape), value)

    # ---- running -------------------------------------------------------------------------------------------

    def blocks(self, segments: int) -> tuple[Block, ...] | None:
        """The levels of a run; None where one of them is not recorded."""
        blocks = self._cut(segments)
        return blocks if all(block.key in self._recordings for block in blocks) else None

    def begin_run(self, host: BaseRun, weights: Mapping[str, torch.Tensor]) -> bool:
        """What comes before the first level; whether all values have the shapes that were recorded."""
        moved = [(self.weights[name], x) for name, x in weights.items()]
        moved = [(place, x) for place, x in moved if place.data_ptr() != x.data_ptr()]
        copy_all([place for place, _ in moved], [x for _, x in moved])
        self.functions["setup"](host)
        if self.borders.setup_is_fixed:
            pairs = [(a, b) for a, b in self._set_up_pairs(host) if a.data_ptr() != b.data_ptr()]
            copy_all([place for place, _ in pairs], [x for _, x in pairs])
        return self._filled(host)

    def play(self, block: Block, host: BaseRun, arrived: Sequence[Message]) -> list[Message] | None:
        """Replay a level after what has arrived; gives what it sends, in memory that is written again. None
        where parts of the inputs have other shapes than those recorded."""
        recording = self._recordings[block.key]
        given = self._given(block, host, self.functions)
        if given is None:
            return None
        assert isinstance(recording, BandRecording)
        level = block.levels.start
        parity = (level - host.grid.levels.start) % 2
        rooms = {(sent, block.base + offset): room for (sent, offset), room in recording.incoming}
        for message in arrived:
            value = message.value.take()
            if message.sent.is_tap:
                pairs = list(paired(rooms[message.sent, message.segment], value))
                copy_all([place for place, _ in pairs], [x for _, x in pairs])
            else:
                self._place_of(message.sent, parity).copy_(value)
            message.value.done()
        self._replay(block, given, host, self.functions)
        return [
            Message(sent, level, block.base + offset, value) for (sent, offset), value in recording.outgoing
        ]

    def _place_of(self, sent: Sent, parity: int) -> torch.Tensor:
        """The place of a lane that the next level reads."""
        if (sent, parity) not in self._lane_places:
            lane = next(lane for lane in self.program.lanes if lane.name == sent.name)
            buffers = self.engine.buffers(lane)
            assert buffers is not None
            self._lane_places[sent, parity] = buffers[parity][lane.places.index(sent.place)]
        return self._lane_places[sent, parity]


def _tensors(values: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(values) if is_tensor(x)]


__all__ = ["RecordedBand"]
