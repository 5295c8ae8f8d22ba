"""Recordings of runs that go on: texts in parts, whose parts come in few lengths.

    host        what earlier segments have left, and parts of the inputs, are put where the levels read them
    replayed    all levels of the part
    host        its results; what it leaves to later parts

A part is recorded as a whole, when one of its kind has come before: nothing in its levels depends on the
numbers of its segments but for the first few and the last few of a text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.binding.captured import Leaf
from rmtcompile.ir.program import Program
from rmtcompile.passes.emit.borders import Borders
from rmtcompile.runtime.base import BaseRun, Engine
from rmtcompile.runtime.block_recorder import unowned
from rmtcompile.runtime.block_run import Event, Part, Parts, RecordedRun, perform
from rmtcompile.runtime.copies import copies_of, copy_all, is_tensor, paired, room_for
from rmtcompile.runtime.crossing import Crossing, Key
from rmtcompile.runtime.graphs import Recordings, Workspaces
from rmtcompile.runtime.workspaces import own_workspaces

Outputs = tuple[Any, ...]


@dataclass(frozen=True)
class Kind:
    """Parts of one kind run alike.

    Attributes:
        segments: of the part.
        first: the first of them in the text, as far as the first few differ from later ones.
        border: segments behind the one before which the next part starts.
        left: names of what earlier segments have left, with the segment: counted from the first one and
            so below 0, but for what all later segments read of one of the first few.
        shapes: of the inputs, and of what was left.
    """

    segments: int
    first: int
    border: int
    left: tuple[Key, ...]
    shapes: tuple[torch.Size, ...]


@dataclass(frozen=True)
class RecordedPart:
    """A recorded part.

    Attributes:
        places, parts: where it reads parts of the inputs, and which they are, counted from the first segment.
        inputs, init, stacked, weights, left: where it reads these: arguments that levels read whole, what
            comes before the first level, of all that what is no memory of the model's, and what earlier
            segments have left.
        state: where it reads what the forward replaces in the model.
        addresses: of the model's other tensors.
        kept: that memory.
        events: what is left to the host.
        found: what it leaves to later parts, with segments counted from the first one.
        values: the tensors of the events, then those of `found`.
    """

    graph: Any
    parts: tuple[Part, ...]
    places: tuple[torch.Tensor, ...]
    inputs: Mapping[str, torch.Tensor]
    init: Mapping[int, Any]
    stacked: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]
    left: tuple[torch.Tensor, ...]
    state: Mapping[str, torch.Tensor]
    addresses: Mapping[str, int]
    kept: tuple[torch.Tensor, ...]
    events: tuple[Event, ...]
    found: tuple[Key, ...]
    values: tuple[torch.Tensor, ...]


class PartRecorder(Recordings):
    """Records parts of texts, and replays them.

    Args:
        functions: the emitted module's namespace.
        weights: gives the stacked weights of the model's tensors.
    """

    LIMIT = 8
    """Recordings kept; the least recently used one is dropped."""

    KINDS = 64
    """Kinds of parts that are remembered until they come again."""

    LONGEST = 4096
    """Levels of a part that is recorded."""

    LARGEST = 1 << 28
    """Bytes of the results of a part that is recorded: they are held twice, and a part that gives more keeps
    the device at work anyway."""

    MOST = 3
    """Times that recordings are dropped since weights have moved; after that parts are launched."""

    def __init__(
        self,
        program: Program,
        borders: Borders,
        functions: Mapping[str, Any],
        engine: Engine,
        leaves: Mapping[str, Leaf],
        replaced: frozenset[str],
        weights: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]],
    ) -> None:
        super().__init__(leaves, replaced)
        self.program, self.borders, self.functions, self.engine = program, borders, functions, engine
        self.weights = weights
        self._recordings: OrderedDict[Kind, RecordedPart] = OrderedDict()
        self._seen: OrderedDict[Kind, None] = OrderedDict()
        self._dropped = 0

    @property
    def count(self) -> int:
        """Kinds that are recorded."""
        return len(self._recordings)

    def kind(self, segments: int, inputs: Mapping[str, torch.Tensor], crossing: Crossing) -> Kind:
        """The kind of a part that ends the text so far, of `segments` segments."""
        first = crossing.first
        left = sorted(crossing.values)
        at = {tap.name: tap.at for tap in crossing.carried.taps}
        tensors = (*inputs.values(), *(crossing.values[key] for key in left))
        return Kind(
            segments - first,
            min(first, self.borders.head),
            segments - crossing.border,
            tuple((name, s if s in at.get(name, ()) else s - first) for name, s in left),
            tuple(x.shape for x in tensors),
        )

    def wants(self, kind: Kind, outputs: Outputs) -> bool:
        """Whether to record this kind now, which gives such outputs; notes that it was seen."""
        has_come = kind in self._seen
        self._seen[kind] = None
        self._seen.move_to_end(kind)
        while len(self._seen) > self.KINDS:
            self._seen.popitem(last=False)
        results = sum(x.nbytes for x in pytree.tree_leaves(outputs) if is_tensor(x))
        fits = self.program.grid(kind.segments).n_levels <= self.LONGEST and results <= self.LARGEST
        return has_come and fits and kind not in self._recordings and self._dropped < self.MOST

    def forget(self) -> None:
        """Drop all recordings: weights have moved."""
        self._dropped += bool(self._recordings)
        self._recordings.clear()

    def record(
        self,
        kind: Kind,
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        crossing: Crossing,
        workspaces: Workspaces = own_workspaces,
    ) -> None:
        """Record a part that has run before, so that all is compiled."""
        leaves = {name: leaf.fetch() for name, leaf in self.leaves.items()}
        state = {name: leaves[name].clone() for name in sorted(self.replaced)}
        host = self._host(segments, inputs, leaves, crossing)
        parts = self._parts(host)
        weights, again = self.weights(leaves), self.weights(leaves)
        moved = {name for name, x in weights.items() if again[name].data_ptr() != x.data_ptr()}
        room = {name: room_for(x) if name in moved else x for name, x in weights.items()}
        left = {key: room_for(crossing.values[key]) for key in sorted(crossing.values)}
        recorded_inputs = {name: room_for(inputs[name]) for name in self.borders.inputs}
        own = {_memory(x) for x in leaves.values()}
        # The model's own memory is read where it is, and never written.
        copied = {name: room_for(x) for name, x in host.stacked.items() if _memory(x) not in own}
        stacked = {**host.stacked, **copied}
        init = {i: host.init[i] for i in self.borders.init}
        init = pytree.tree_map_only(torch.Tensor, room_for, init)
        made: list[PartRun] = []

        def body() -> list[torch.Tensor]:
            going_on = Crossing(crossing.carried, crossing.first, crossing.border, left, owned=False)
            read = recorded_inputs, {**leaves, **state}, room
            run = PartRun(self, segments, *read, going_on, parts)
            run.init, run.stacked = init, stacked
            made.append(run)
            for level in run.grid.levels:
                run.level(level, self.functions["step"])
            return [*tensors_of(run.events), *going_on.found.values()]

        self.wait()
        graph, values = self._captured(body, workspaces)
        run = made[-1]
        assert run.crossing is not None
        self._recordings[kind] = RecordedPart(
            graph,
            tuple(parts),
            tuple(x for x in pytree.tree_leaves(list(parts.values())) if is_tensor(x)),
            recorded_inputs,
            init,
            copied,
            {name: room[name] for name in moved},
            tuple(left.values()),
            state,
            {name: x.data_ptr() for name, x in leaves.items() if name not in state},
            tuple(x.detach() for x in leaves.values()),
            tuple(run.events),
            tuple((name, segment - crossing.first) for name, segment in run.crossing.found),
            tuple(values),
        )
        while len(self._recordings) > self.LIMIT:
            self._recordings.popitem(last=False)

    def _captured(
        self, body: Callable[[], list[torch.Tensor]], workspaces: Workspaces
    ) -> tuple[Any, list[torch.Tensor]]:
        """A recording, and its values, whose memory is free for the recordings that follow: it is copied out
        before another one is replayed."""
        graph, values = self.captured(body, workspaces)
        return graph, [unowned(value) for value in values]

    def replay(
        self, kind: Kind, segments: int, inputs: Mapping[str, torch.Tensor], crossing: Crossing
    ) -> Outputs | None:
        """Run a part; gives what the emitted `forward` returns, and notes in `crossing` what is left. None
        where its kind is not recorded, or values have other shapes or addresses than recorded."""
        recording = self._recordings.get(kind)
        state = self.state_like(recording.state) if recording is not None else None
        if recording is None or state is None:
            return None
        if not self.at_addresses(recording.addresses):
            self.forget()
            return None
        self._recordings.move_to_end(kind)
        leaves = {name: leaf.fetch() for name, leaf in self.leaves.items()}
        host = self._host(segments, inputs, leaves, crossing)
        pairs = self._read(recording, state, host, leaves)
        if any(place.shape != value.shape for place, value in pairs):
            return None
        with self.alone():
            copy_all([place for place, _ in pairs], [value for _, value in pairs])
            recording.graph.replay()
            copies = iter(copies_of(recording.values))
        perform(recording.events, host, self.functions, crossing.first, copies)
        keys = ((name, segment + crossing.first) for name, segment in recording.found)
        crossing.take(dict(zip(keys, copies, strict=True)))
        outputs: Outputs = self.functions["outputs"](host)
        return outputs

    def _host(
        self,
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
        crossing: Crossing,
    ) -> BaseRun:
        """The part as far as the host has to do with it, before its first level."""
        host = BaseRun(self.program, segments, inputs, leaves, self.engine, crossing=crossing)
        self.functions["setup"](host)
        return host

    def _parts(self, host: BaseRun) -> Parts:
        """Room for all parts of the inputs that the levels read."""
        found: Parts = {}
        assert host.crossing is not None
        for level in host.grid.levels:
            for name, segment in (("enter", host.grid.entering(level)), ("leave", host.grid.leaving(level))):
                function = self.functions.get(f"{name}_parts")
                if function is not None and segment is not None:
                    values = pytree.tree_map_only(torch.Tensor, room_for, function(host, segment))
                    found[function, segment - host.crossing.first] = values
        return found

    def _read(
        self,
        recording: RecordedPart,
        state: list[torch.Tensor],
        host: BaseRun,
        leaves: Mapping[str, torch.Tensor],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(place, value) of all that a recording reads of this part."""
        crossing = host.crossing
        assert crossing is not None
        given = [function(host, crossing.first + offset) for function, offset in recording.parts]
        pairs = [*zip(recording.places, (x for x in pytree.tree_leaves(given) if is_tensor(x)), strict=True)]
        pairs += zip(recording.left, (crossing.values[key] for key in sorted(crossing.values)), strict=True)
        pairs += zip(recording.state.values(), state, strict=True)
        pairs += [(place, host.inputs[name]) for name, place in recording.inputs.items()]
        pairs += [(place, host.stacked[name]) for name, place in recording.stacked.items()]
        pairs += [pair for i, place in recording.init.items() for pair in paired(place, host.init[i])]
        if recording.weights:
            weights = self.weights(leaves)
            pairs += [(place, weights[name]) for name, place in recording.weights.items()]
        return pairs


class PartRun(RecordedRun):
    """The run of a part while it is recorded."""

    def __init__(
        self,
        recorder: PartRecorder,
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        crossing: Crossing,
        parts: Parts,
    ) -> None:
        program, engine = recorder.program, recorder.engine
        super().__init__(program, segments, inputs, leaves, weights, engine, False, crossing=crossing)
        self.base, self.places, self.outer = crossing.first, parts, recorder.borders.outer


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def tensors_of(events: list[Event]) -> list[torch.Tensor]:
    """The tensors of events, in their order."""
    return [x for event in events for x in pytree.tree_leaves(event.values) if is_tensor(x)]


__all__ = ["Kind", "Outputs", "PartRecorder"]
