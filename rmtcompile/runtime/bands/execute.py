"""Execute a program in bands of layers, all of them from one process.

    level t    band 0: cells of its layers, what it sends is on its way to band 1
               band 1: cells of its layers, with what was sent before level t
    level t+1  ...

The host launches level after level, band after band. On CUDA it is far ahead of the devices: each of them
works when what it reads has arrived, so that band p is a level behind band p - 1, and all are busy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from rmtcompile.compiler.loading import load, unload
from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.ir.bands import Band, Cut
from rmtcompile.ir.segmentation import Segmentation
from rmtcompile.ir.weights import Weight
from rmtcompile.passes.bands import check_cut, cut
from rmtcompile.passes.emit.readers import CALLER
from rmtcompile.runtime.bands.balance import divided
from rmtcompile.runtime.bands.copies import Copies, OnDevice, Way
from rmtcompile.runtime.bands.engines import BandEngines
from rmtcompile.runtime.bands.links import Links, Value
from rmtcompile.runtime.bands.packed import BandedPack
from rmtcompile.runtime.bands.replays import BandReplays
from rmtcompile.runtime.bands.run import BandRun
from rmtcompile.runtime.base import BaseRun, OnLevel, OnValue
from rmtcompile.runtime.contexts import own_modes
from rmtcompile.runtime.crossing import Crossing
from rmtcompile.runtime.engine import Engine, backend_for
from rmtcompile.runtime.execute import Executor
from rmtcompile.runtime.graphs import Started


@dataclass(frozen=True)
class Member:
    """A band and what runs it.

    Attributes:
        functions: the emitted module's namespace, with the band's device in it.
    """

    band: Band
    way: Way
    functions: Mapping[str, Any]
    copies: Copies

    @contextmanager
    def current(self) -> Iterator[None]:
        """What is launched here is launched on the band's device."""
        device = self.way.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield


class BandedExecutor(Executor):
    """Runs one compiled program in bands of layers, each on a device of its own.

    Args:
        devices: of each band, in order.
        group: the processes that run a band each, if several do.
        counts: of layers of each band, where they are given.

    Attributes:
        home: where the model, its arguments and results are.
        cut: the program cut into bands.

    Raises:
        UnsupportedError: the program cannot be cut into so many bands.
    """

    is_whole = False

    def __init__(
        self,
        compiled: Compiled,
        segmentation: Segmentation,
        backend: str | Callable[..., Any],
        cuda_graphs: str | bool,
        like: Executor | None,
        recompute: str | int,
        devices: Sequence[torch.device],
        group: Any = None,
        counts: Sequence[int] = (),
    ) -> None:
        super().__init__(compiled, segmentation, backend, False, like, recompute)
        program = compiled.program
        self.home = torch.device(self.device)
        if isinstance(like, BandedExecutor):
            compiled.division = like.cut.division
        known = compiled.division  # it may have been cut before, in another process, where its graphs were
        if known is None or len(known.layers) != len(devices):
            check_cut(program, len(devices), compiled.dependences, compiled.layer_paths)
            compiled.division = known = divided(program, devices, group, counts)
        self.cut: Cut = cut(program, compiled.emitted.readers, known)
        self.links = Links()
        self._growing = {lane.name for lane in program.lanes if lane.grows}
        self.members = [self._member(band, devices[band.index], like) for band in self.cut.bands]
        self.device = devices[0]
        self.backend = backend_for(backend, self.device)
        self._use_graphs = self.device.type == "cuda" and cuda_graphs is not False
        self.replays: Any = BandReplays(self)
        self.whole = {group.name: group.layers for group in program.groups}

    def _member(self, band: Band, device: torch.device, like: Executor | None) -> Member:
        way = Way(self.home, device)
        copies = like.members[band.index].copies if isinstance(like, BandedExecutor) else Copies(way)
        here, there = (f'torch.device("{x}")' for x in (self.home, device))
        module = load(self.compiled.emitted.source.replace(here, there), self.compiled.sizes)
        weakref.finalize(self, unload, module.__name__)
        return Member(band.on(device), way, vars(module), copies)

    def new_engine(self, backend: str | Callable[..., Any], keeps_buffers: bool) -> Any:
        """See `Executor`: an engine for each band."""
        passes_off = self.compiled.passes_off if self.device.type == "cuda" else None
        has_one = 1 in self.compiled.sizes.values()
        return BandEngines(
            [Engine(m.band.program, backend, keeps_buffers, passes_off, has_one) for m in self.members]
        )

    @property
    def bands(self) -> list[str]:
        """See `Executor`."""
        return self.cut.described([member.way.device for member in self.members])

    def pack(self) -> Any:
        """See `Executor`."""
        return BandedPack(self)

    def measure(self, inputs: list[torch.Tensor]) -> None:
        """Nothing is measured: bands run on wavefronts."""

    def gets_form(self, segments: int) -> bool:
        """See `Executor`: short lengths have no forms of their own."""
        return False

    # ---- running -------------------------------------------------------------------------------------------

    def finish(self, started: Started) -> tuple[Any, ...] | None:
        """See `Executor`; recordings read copies, which are made again in the same place."""
        outputs: tuple[Any, ...] | None = started.results() if started.is_current() else None
        return outputs

    def has_held(self) -> bool:
        """Whether what the last run has read still is a copy of the model's memory; see `Copies.hold`."""
        held = [member.copies.hold() for member in self.members]  # each notes what it has to copy again
        return all(held)

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
        weights, named = self.stacks.current(leaves), self.named(inputs)
        looking = on_level, on_value
        with own_modes():
            while True:
                for member in self.members:
                    member.copies.begin()
                runs = [
                    self.band_run(m, segments, named, leaves, weights, functional, *looking, crossing)
                    for m in self.members
                ]
                self.run_levels(runs)
                outputs = self.outputs_of(runs, segments, named, leaves, crossing)
                if self.has_held():
                    return outputs

    def band_run(
        self,
        member: Member,
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        functional: bool,
        on_level: OnLevel | None = None,
        on_value: OnValue | None = None,
        crossing: Crossing | None = None,
    ) -> BandRun:
        """A band's part of a run, with what is the same for all segments."""
        band, way = member.band, member.way
        given = self.given_to(member, inputs, leaves, weights, functional)
        shown = _at_home(on_value, way, band.index == 0)
        mine = _part(crossing, band, way) if crossing is not None else None
        looking = on_level, shown, mine
        run = BandRun(band.program, segments, *given, functional, *looking)
        run.join(band, self.whole, functional)
        with member.current():
            member.functions["setup"](run)
        return run

    def given_to(
        self,
        member: Member,
        inputs: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        functional: bool,
    ) -> tuple[OnDevice, OnDevice, dict[str, torch.Tensor], Engine]:
        """Arguments, leaves and stacked weights of a run, on a band's device, and what executes its cells."""
        given = OnDevice(inputs, member.way.moving)
        held = OnDevice(leaves, lambda name, x: self.copied(member, name, x, [x], functional))
        stacked = self.weights_of(member, leaves, weights, functional)
        return given, held, stacked, self.engine_of(member.band)

    def engine_of(self, band: Band) -> Engine:
        engines: Any = self.engine
        found: Engine = engines[band.index]
        return found

    def copied(
        self,
        member: Member,
        name: str,
        value: torch.Tensor,
        written: Sequence[torch.Tensor],
        functional: bool,
    ) -> torch.Tensor:
        if functional or name in self.replaced:
            moved: torch.Tensor = member.way.to(value)
            return moved
        return member.copies.of(name, value, written)

    def weights_of(
        self,
        member: Member,
        leaves: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        functional: bool,
    ) -> dict[str, torch.Tensor]:
        """The stacked weights of a band's layers, on its device."""
        found = {}
        for group in member.band.program.groups:
            whole = self.whole[group.name]
            first = whole.index(group.layers[0])
            rows = range(first, first + len(group.layers))
            for port in group.ports:
                if port.role != "weight":
                    continue
                name = f"{group.name}.{port.name}"
                part = self.part_of(name, port.source, rows, weights, leaves)
                written = [leaves[leaf] for row in rows for leaf in port.source.leaves[row]]
                is_new = functional or any(
                    leaf in self.replaced for row in rows for leaf in port.source.leaves[row]
                )
                found[name] = self.copied(member, f"stacked {name}", part, written, is_new)
        return found

    def part_of(
        self,
        name: str,
        weight: Weight,
        rows: range,
        weights: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Rows of a stacked weight.

        Args:
            weight: the whole one.
            weights: stacked ones, by name.
        """
        return weights[name][rows.start : rows.stop]

    def run_levels(self, runs: Sequence[BandRun]) -> None:
        """Run all levels of all bands."""
        whole = self.program.grid(runs[0].segments, runs[0].first)
        for level in whole.levels:
            for member, run in zip(self.members, runs, strict=True):
                if level in run.grid.levels:
                    with member.current():
                        run.level(level, member.functions["step"])
                        self.send(member, run, runs)

    def send(self, member: Member, run: BandRun, runs: Sequence[BandRun]) -> None:
        """Send what a band's part of a run has made for the others."""
        for message in run.outgoing:
            target = self.members[message.sent.target].way.device
            if run.functional or message.sent.name in self._growing:  # no memory that is used again
                value: Any = Value(Way(member.way.device, target).to(message.value))
            else:
                value = self.links.send(message.sent, message.value, member.way.device, target)
            runs[message.sent.target].arrive(replace(message, value=value))
        run.outgoing.clear()

    def outputs_of(
        self,
        runs: Sequence[BaseRun],
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
        crossing: Crossing | None,
    ) -> tuple[Any, ...]:
        """What the forward returns and leaves behind, where the model's own would be."""
        first, way = runs[0], self.members[0].way
        host = BaseRun(self.program, segments, inputs, leaves, first.engine, crossing=crossing)
        host.init = way.back(first.init)
        for member, run in zip(self.members, runs, strict=True):
            for name in member.band.makes:
                if CALLER in self.compiled.emitted.readers.get(name, ()):
                    for segment, value in run.taps[name].values.items():
                        host.taps[name].values[segment] = member.way.back(value)
            if crossing is not None and run.crossing is not None:
                crossing.take({key: member.way.back(value) for key, value in run.crossing.found.items()})
        outputs: tuple[Any, ...] = self.compiled.namespace["outputs"](host)
        return outputs


def _at_home(on_value: OnValue | None, way: Way, is_first: bool) -> OnValue | None:
    """Shows values where the model is; what is the same for all segments once."""
    if on_value is None:
        return None

    def shown(kind: str, segment: int, layer: int, place: int, value: Any) -> None:
        if is_first or kind != "init":
            on_value(kind, segment, layer, place, way.back(value))

    return shown


def _part(crossing: Crossing, band: Band, way: Way) -> Crossing:
    """What crosses the borders of a run at one band."""
    carried = crossing.carried
    names = {refill.name for refill in carried.refills if refill.layer in band.layers}
    names |= {tap.name for tap in carried.taps}
    values = {key: way.to(value) for key, value in crossing.values.items() if key[0] in names}
    return crossing.like(values)


__all__ = ["BandedExecutor", "Member"]
