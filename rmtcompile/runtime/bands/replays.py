"""What a program in bands has recorded, and how runs are put together of it.

Each band's levels are recorded on its own device (`recorded.py`). The host replays level after level, band
after band, and starts what is sent on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rmtcompile.errors import RecordingWarning, warn
from rmtcompile.runtime.bands.copies import OnDevice
from rmtcompile.runtime.bands.links import Value
from rmtcompile.runtime.bands.recorded import RecordedBand
from rmtcompile.runtime.bands.run import BandRun, Message
from rmtcompile.runtime.base import BaseRun
from rmtcompile.runtime.block_recorder import unowned
from rmtcompile.runtime.block_run import Device
from rmtcompile.runtime.blocks import Block
from rmtcompile.runtime.contexts import own_modes, plain_tensors, same_numbers
from rmtcompile.runtime.copies import room_for
from rmtcompile.runtime.graphs import Recordings, Started
from rmtcompile.runtime.stops import StoppedError
from rmtcompile.runtime.workspaces import own_workspaces

if TYPE_CHECKING:
    from rmtcompile.runtime.bands.execute import BandedExecutor, Member


class BandDevice(Recordings):
    """Records on one CUDA device; see `Device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            super().__init__({}, frozenset())
            self._stream = torch.cuda.Stream(device)

    def record(self, body: Callable[[], list[torch.Tensor]]) -> tuple[Any, list[torch.Tensor]]:
        """See `Device`. Kinds of levels may have forms of their own, which are compiled and tuned at a first
        call, and that would end a recording."""
        with torch.cuda.device(self._device):
            body()
            graph, values = self.captured(body, own_workspaces)
            return graph, [unowned(value) for value in values]


class Host(BaseRun):
    """A band's part of a replayed run, as far as the host has to do with it. What it keeps outside the cells
    and other bands read goes to them."""

    peers: Mapping[str, list[Callable[[int, Any], None]]]

    def keep_tap(self, name: str, segment: int, value: Any) -> None:
        """See `BaseRun`."""
        super().keep_tap(name, segment, value)
        for hand_on in self.peers.get(name, ()):
            hand_on(segment, value)


class BandReplays:
    """The recordings of one executor of bands.

    Attributes:
        device_for: gives what records on a band's device.
    """

    MOST = 3
    """Times that all is recorded, the first one counted."""

    blocks = None
    are_shared = False
    ends_vary = False
    is_padded = False
    whole: Any = None

    def __init__(self, executor: BandedExecutor) -> None:
        self._executor = executor
        self._bands: dict[int, RecordedBand] = {}  # by number
        self._addresses: dict[int, dict[str, int]] = {}
        self._times = 0
        self._obstacle = self._found_obstacle()
        self.device_for: Callable[[torch.device], Device] = BandDevice

    def _found_obstacle(self) -> str:
        """Why levels cannot be recorded; empty if they can."""
        compiled = self._executor.compiled
        if compiled.rolled.fixed is not None or compiled.sizes:
            return "the program is one of several sizes, or of one length"
        return compiled.emitted.borders.obstacle

    def __str__(self) -> str:
        """How runs are recorded, in words."""
        if self._obstacle:
            return f"levels are launched one by one: {self._obstacle}"
        return "recorded as CUDA graphs, a level of a band each, for any number of segments"

    def are_of(self, sizes: Mapping[str, int]) -> bool:
        """Whether other sizes share these recordings: none do."""
        return False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What is launched here is launched on the current streams, as all else."""
        yield

    def start(self, segments: int, inputs: list[torch.Tensor]) -> Started | None:
        """Start a run of this length, if its levels are recorded."""
        outputs = self._replayed(segments, inputs) if self._bands else None
        return Started(self._executor.has_held, lambda: outputs) if outputs is not None else None

    def forget(self) -> None:
        """Drop all recordings: weights have moved."""
        self._bands = {}

    @property
    def measured(self) -> dict[str, float]:
        """Nothing is measured."""
        return {}

    def workspace_seconds(self, segments: int) -> dict[str, float]:
        """Nothing is measured."""
        return {}

    def run(self, segments: int, inputs: list[torch.Tensor]) -> tuple[Any, ...]:
        """Run, from recordings where there are any."""
        started = self.start(segments, inputs)
        if started is not None and started.is_current():
            outputs: tuple[Any, ...] = started.results()
            return outputs
        return self._executor.launch(segments, inputs)

    # ---- recording -----------------------------------------------------------------------------------------

    @property
    def wants(self) -> bool:
        """Whether there is anything to record."""
        return not self._bands and not self._obstacle and self._times < self.MOST

    def record(self, inputs: list[torch.Tensor]) -> None:
        """Record what runs of any length need, once."""
        if not self.wants:
            return
        self._times += 1
        try:
            with plain_tensors(), own_modes(), same_numbers(self._executor.device):
                runs = self._example(inputs)
                self._bands = {member.band.index: self._recorded(member, run) for member, run in runs}
        except (RuntimeError, LookupError, ValueError, StoppedError) as error:  # the run was right
            self._obstacle = f"recording has failed: {str(error).partition(chr(10))[0]}"
            warn(f"runs are not recorded as CUDA graphs: {self._obstacle}", RecordingWarning)

    def _example(self, inputs: list[torch.Tensor]) -> list[tuple[Member, BandRun]]:
        """The bands' parts of a run that shows all that segments do."""
        executor = self._executor
        count = self.example_segments
        named = executor.named(executor.resized(count, inputs))
        leaves = executor.held()
        weights = executor.stacks.current(leaves)
        runs = [executor.band_run(m, count, named, leaves, weights, False) for m in executor.members]
        executor.run_levels(runs)
        return list(zip(executor.members, runs, strict=True))

    @property
    def example_segments(self) -> int:
        """Segments of that run."""
        borders = self._executor.compiled.emitted.borders
        return borders.head + borders.tail + 1 + self._executor.program.n_layers

    def _recorded(self, member: Member, run: BandRun) -> RecordedBand:
        """All levels of a band.

        Args:
            run: its part of the example.
        """
        executor = self._executor
        assert isinstance(run.leaves, OnDevice)
        held = {name: room_for(x) if name in executor.replaced else x for name, x in run.leaves.read.items()}
        self._addresses[member.band.index] = _addresses(held, executor.replaced)
        with member.current():
            band = RecordedBand(
                executor.cut,
                member.band,
                executor.whole,
                executor.compiled.emitted.borders,
                member.functions,
                executor.engine_of(member.band),
                self.device_for(member.way.device),
                run,
                held,
                self._weights(member),
            )
            band.record_all()
        return band

    def _weights(self, member: Member) -> Callable[[], dict[str, torch.Tensor]]:
        executor = self._executor

        def current() -> dict[str, torch.Tensor]:
            leaves = executor.held()
            return executor.weights_of(member, leaves, executor.stacks.current(leaves), False)

        return current

    # ---- running -------------------------------------------------------------------------------------------

    def _replayed(self, segments: int, inputs: list[torch.Tensor]) -> tuple[Any, ...] | None:
        """The outputs of a replayed run; None where it is not recorded, or weights have moved meanwhile."""
        executor = self._executor
        leaves, named = executor.held(), executor.named(inputs)
        hosts, levels = [], []
        for member in executor.members:
            blocks = self._bands[member.band.index].blocks(segments)
            if blocks is None:
                return None
            hosts.append(self.host(member, segments, named))
            levels.append({block.levels.start: block for block in blocks})
        self._join(hosts)
        with own_modes():
            if not self._play(hosts, levels, leaves):
                return None
            return self._bands[0]._own(executor.outputs_of(hosts, segments, named, leaves, None))

    def host(self, member: Member, segments: int, inputs: Mapping[str, torch.Tensor]) -> Host:
        """A band's part of a replayed run, as far as the host has to do with it."""
        band = self._bands[member.band.index]
        member.copies.begin()
        given = OnDevice(inputs, member.way.moving)
        return Host(band.program, segments, given, band.leaves, band.engine)

    def begin(self, member: Member, host: Host, leaves: Mapping[str, torch.Tensor]) -> bool:
        """What comes before a band's first level; whether it can be replayed."""
        executor = self._executor
        if not self._refresh(member, leaves):
            self.forget()
            return False
        stacked = executor.weights_of(member, leaves, executor.stacks.current(leaves), False)
        return self._bands[member.band.index].begin_run(host, stacked)

    def _refresh(self, member: Member, leaves: Mapping[str, torch.Tensor]) -> bool:
        """Copy what the forward replaces to where recordings read it; whether all else is where it was."""
        executor, now = self._executor, {}
        for name, place in self._bands[member.band.index].leaves.items():
            value = executor.copied(member, name, leaves[name], [leaves[name]], False)
            if name not in executor.replaced:
                now[name] = value
            elif value.shape != place.shape or value.dtype != place.dtype:
                return False
            else:
                place.copy_(value)
        return _addresses(now, executor.replaced) == self._addresses[member.band.index]

    def _join(self, hosts: list[Host]) -> None:
        """What hosts keep outside the cells goes to the bands that read it outside of levels."""
        executor = self._executor
        outer = executor.compiled.emitted.borders.outer
        for member, host in zip(executor.members, hosts, strict=True):
            peers: dict[str, list[Callable[[int, Any], None]]] = {}
            for sent in member.band.sends:
                if sent.is_tap and sent.name in outer:
                    target, store = executor.members[sent.target], hosts[sent.target].taps[sent.name]
                    peers.setdefault(sent.name, []).append(_handing(store.put, member.way, target.way))
            host.peers = peers

    def _play(
        self, hosts: list[Host], levels: list[dict[int, Block]], leaves: Mapping[str, torch.Tensor]
    ) -> bool:
        """Replay all levels; whether that could be done. A band begins when its first level comes, while
        those before it are at work."""
        executor, bands = self._executor, self._bands
        waiting: list[list[Message]] = [[] for _ in executor.members]
        for level in executor.program.grid(hosts[0].segments).levels:
            for i, member in enumerate(executor.members):
                if level not in levels[i]:
                    continue
                arrived = [m for m in waiting[i] if m.level < level]
                waiting[i] = [m for m in waiting[i] if m.level >= level]
                with member.current():
                    if level == min(levels[i]) and not self.begin(member, hosts[i], leaves):
                        return False
                    sends = bands[i].play(levels[i][level], hosts[i], arrived)
                    if sends is None:
                        return False
                    for message in sends:
                        value = self._sent(message, member.way.device)
                        waiting[message.sent.target].append(replace(message, value=value))
        return True

    def _sent(self, message: Message, source: torch.device) -> Value:
        """A value on its way; its own memory is written again by the next level."""
        target = self._executor.members[message.sent.target].way.device
        own = message.value.clone() if source == target else message.value
        return self._executor.links.send(message.sent, own, source, target)


def _addresses(held: Mapping[str, torch.Tensor], replaced: frozenset[str]) -> dict[str, int]:
    return {name: x.data_ptr() for name, x in held.items() if name not in replaced}


def _handing(put: Callable[[int, Any], None], source: Any, target: Any) -> Callable[[int, Any], None]:
    return lambda segment, value: put(segment, target.to(source.back(value)))


__all__ = ["BandReplays"]
