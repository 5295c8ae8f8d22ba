"""Bands in several processes of `torch.distributed`, one band a rank.

    rank 0    level t ─ sends ─> level t + 1 ...
    rank 1    level t - 1 .....  level t, with what rank 0 has sent on level t - 1

Every rank calls with the same model and the same arguments, runs its own band, and gets the whole result.
Ranks agree on what they are about to run before its first level. A rank that fails goes on receiving, and
sends zeros, until its levels are over: then all ranks say what has happened on which one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.segmentation import Segmentation
from rmtcompile.ir.weights import Weight
from rmtcompile.runtime.bands.agreement import Agreement, anywhere
from rmtcompile.runtime.bands.control import sends_from
from rmtcompile.runtime.bands.execute import BandedExecutor
from rmtcompile.runtime.bands.faults import Fault, raise_any, said
from rmtcompile.runtime.bands.levels import Launched, Levels, Made, Traffic
from rmtcompile.runtime.bands.mail import Mail
from rmtcompile.runtime.bands.rank_gradients import with_gradients
from rmtcompile.runtime.bands.rank_packed import RankPack
from rmtcompile.runtime.bands.rank_replays import RankReplays
from rmtcompile.runtime.bands.rank_results import flat_of, shared, unflat
from rmtcompile.runtime.bands.recorded import KEPT
from rmtcompile.runtime.bands.run import BandRun
from rmtcompile.runtime.bands.shards import Shards
from rmtcompile.runtime.bands.trail import Trail
from rmtcompile.runtime.base import BaseRun, OnLevel, OnValue
from rmtcompile.runtime.contexts import own_modes
from rmtcompile.runtime.crossing import Crossing, Key
from rmtcompile.runtime.execute import Executor
from rmtcompile.runtime.gradients import is_transformed
from rmtcompile.runtime.stacks import together
from rmtcompile.runtime.state import Part


class RankExecutor(BandedExecutor):
    """Runs one band of a program in this process, and the others in those of a group.

    Args:
        group: of processes; band p is run by rank p of it. Its backend is NCCL for CUDA, gloo for a CPU.
    """

    def __init__(
        self,
        compiled: Compiled,
        segmentation: Segmentation,
        backend: str | Callable[..., Any],
        cuda_graphs: str | bool,
        like: Executor | None,
        recompute: str | int,
        group: Any,
    ) -> None:
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        home = next((lane.device for lane in compiled.program.lanes), torch.device("cpu"))
        given = compiled, segmentation, backend, cuda_graphs, like, recompute
        super().__init__(*given, [_device(group, torch.device(home))] * self.count, group)
        self.mail = Mail(group, self.cut, compiled.program, self.device)
        self.replays: RankReplays = RankReplays(self)
        self.agreement = Agreement(self.mail, anywhere(compiled.emitted.source, self.home))
        self.shards = Shards(self.compiled.emitted.carried, self.cut, self.mail, self.members[self.rank].way)
        self._traffic: dict[tuple[int, int], Traffic] = {}

    @property
    def is_cuda(self) -> bool:
        """Whether this rank runs on a CUDA device."""
        return self.device.type == "cuda"

    def stacked(self) -> dict[str, Weight]:
        """See `Executor`: weights of this rank's layers, so that no other ones are read."""
        found, own = super().stacked(), self.cut.bands[self.rank].layers
        for group in self.program.groups:
            rows = [row for row, layer in enumerate(group.layers) if layer in own]
            for port in group.ports:
                if port.role == "weight":
                    whole = found.pop(name := f"{group.name}.{port.name}")
                    if rows:
                        found[name] = replace(whole, leaves=tuple(whole.leaves[row] for row in rows))
        return found

    def part_of(
        self,
        name: str,
        weight: Weight,
        rows: range,
        weights: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """See `BandedExecutor`: what is stacked are the rows themselves; others are put together, without
        memory, where a whole run is looked at."""
        if weight.leaves[rows.start : rows.stop] == self.stacks.leaves_of(name):
            return weights[name]
        found = together([[leaves[leaf] for leaf in weight.leaves[row]] for row in rows])
        return found if weight.dtype is None else found.to(weight.dtype)

    @property
    def bands(self) -> list[str]:
        """See `Executor`."""
        return self.cut.described([f"rank {rank}" for rank in range(self.count)])

    # ---- running -------------------------------------------------------------------------------------------

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
        if detect_fake_mode(inputs) is not None:
            return super()._run(segments, inputs, leaves, functional, on_level, on_value, crossing)
        if functional and is_transformed():
            raise UnsupportedError(
                "transforms of torch.func do not go from process to process",
                remedy="use autograd, or several devices from one process",
            )
        named = self.named(inputs)
        wanted = self._differentiable(named, leaves, crossing) if functional else {}
        can_replay = crossing is None and not wanted and self._replays_now(segments)
        told = segments, inputs, self.held(), crossing, list(wanted), can_replay
        is_recorded = self.agreement.reached(*told)
        looking = on_level, on_value
        with own_modes(), self._own_numbers():
            if not wanted:
                is_recorded = is_recorded and looking == (None, None)
                given = named, leaves, *looking, crossing, None, is_recorded
                outputs, found = self._whole_run(segments, *given)
            else:
                shape: list[Any] = []

                def forward(trail: Trail, apart: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
                    def own(x: torch.Tensor) -> torch.Tensor:
                        return apart.get(id(x), x)

                    given = {name: own(x) for name, x in named.items()}
                    held = {name: own(x) for name, x in leaves.items()}
                    state = crossing
                    if crossing is not None:
                        state = crossing.like({key: own(x) for key, x in crossing.values.items()})
                    return flat_of(self._whole_run(segments, given, held, *looking, state, trail), shape)

                flat = with_gradients(self.mail, list(wanted.values()), forward)
                outputs, found = unflat(flat, shape)
        if crossing is not None:
            crossing.take(self.members[self.rank].way.back(found))
        return outputs

    def pack(self) -> Any:
        """See `Executor`."""
        return RankPack(self)

    @property
    def state_layers(self) -> range:
        """See `Executor`."""
        return self.cut.bands[self.rank].layers

    def advance(
        self,
        segments: int,
        inputs: list[torch.Tensor],
        first: int,
        border: int,
        values: Mapping[Key, torch.Tensor],
        part: Part | None = None,
    ) -> tuple[tuple[Any, ...], dict[Key, torch.Tensor], Part | None]:
        """See `Executor`; without gradients each rank keeps what its own layers read."""
        is_functional = self.records_gradients([*inputs, *values.values()])
        if part is not None and any(value.requires_grad for value in values.values()):
            raise UnsupportedError(
                "gradients of the values of a state that is in parts", [repr(part)], "pass state.gathered()"
            )
        if part is not None and is_functional:
            values, part = part.gather(part, values), None
        outputs, after, _ = super().advance(segments, inputs, first, border, values, part)
        if is_functional:
            return outputs, after, None
        return outputs, self.shards.own(after), self.shards.part()

    def _replays_now(self, segments: int) -> bool:
        return self._use_graphs and self.replays.can_replay(segments)

    def _differentiable(
        self,
        inputs: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
        crossing: Crossing | None,
    ) -> dict[str, torch.Tensor]:
        """What has gradients, by name."""
        before = sorted(crossing.values.items()) if crossing is not None else []
        state = {f"{name} of segment {s}": value for (name, s), value in before}
        computed = [
            name
            for name, x in leaves.items()
            if x.requires_grad and not x.is_leaf and name not in self.replaced
        ]
        if computed:
            raise UnsupportedError(
                "gradients of weights that are computed do not go from process to process",
                sorted(computed)[:6],
                "let the forward compute them, or use several devices from one process",
            )
        known: dict[int, tuple[str, torch.Tensor]] = {}
        for name, value in (*inputs.items(), *sorted(leaves.items()), *state.items()):
            if value.requires_grad:
                known.setdefault(id(value), (name, value))
        return dict(known.values())

    @contextmanager
    def _own_numbers(self) -> Iterator[None]:
        """Ranks draw different random numbers, whatever their generators' seeds."""
        if not self.compiled.longest.draws:
            yield
            return
        seed = int(torch.randint(1 << 60, ()))
        with torch.random.fork_rng([self.device] if self.is_cuda else []):
            torch.manual_seed(seed + self.rank)
            yield

    def _whole_run(
        self,
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
        on_level: OnLevel | None,
        on_value: OnValue | None,
        crossing: Crossing | None,
        trail: Trail | None,
        is_recorded: bool = False,
    ) -> tuple[tuple[Any, ...], dict[Key, torch.Tensor]]:
        """What the forward returns and leaves behind, on every rank, and what segments after it read.

        What is made of results is made on all ranks; its gradients to weights and arguments are taken on the
        first one.
        """
        member, held, functional = self.members[self.rank], dict(leaves), trail is not None
        traffic = self.traffic_of(segments, crossing.first if crossing is not None else 0)
        run: BaseRun | None
        levels: Levels
        while True:
            stopped: Fault | None = None
            if is_recorded:
                run, levels = self.replays.levels(segments, inputs, held, traffic)
            else:
                looking = on_level, on_value
                run, stopped = self._begun(segments, inputs, held, functional, *looking, crossing)
                levels = Launched(run, member.functions["step"], traffic, self.mail, trail)
            stopped, is_off = self._own_levels(levels, traffic, stopped)
            mine = run.crossing if run is not None else None
            found: dict[Key, torch.Tensor] = dict(mine.found) if mine is not None else {}
            stays = set() if functional else {key for key in found if self.shards.stays(key)}
            if shared(self, run, found, stays, stopped, is_off or not member.copies.hold()):
                break
            is_recorded = False
        assert run is not None
        if functional and self.rank:
            inputs, held, run.init = pytree.tree_map_only(
                torch.Tensor, torch.Tensor.detach, (dict(inputs), held, run.init)
            )
        outputs = self.outputs_of([run] * self.count, segments, inputs, held, None)
        in_order = dict(sorted(found.items()))  # the same on all ranks
        return self.replays.own(outputs) if is_recorded else outputs, in_order

    def _begun(
        self,
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        leaves: dict[str, torch.Tensor],
        functional: bool,
        on_level: OnLevel | None = None,
        on_value: OnValue | None = None,
        crossing: Crossing | None = None,
    ) -> tuple[BandRun | None, Fault | None]:
        """This rank's part of a run that is launched; or what has gone wrong before its first level."""
        member, looking = self.members[self.rank], (on_level, on_value)
        member.copies.begin()
        try:
            given = member, segments, inputs, leaves, self.stacks.current(leaves)
            return self.band_run(*given, functional, *looking, crossing), None
        except Exception as error:
            return None, Fault(f"rank {self.rank}, before its first level", error)

    def example(
        self, segments: int, inputs: Mapping[str, torch.Tensor], leaves: dict[str, torch.Tensor]
    ) -> BandRun:
        """This rank's part of a run, after its last level."""
        run, stopped = self._begun(segments, inputs, leaves, False)
        traffic, step = self.traffic_of(segments, 0), self.members[self.rank].functions["step"]
        stopped, _ = self._own_levels(Launched(run, step, traffic, self.mail, None), traffic, stopped)
        raise_any(self.mail.gathered("record levels", said(stopped)), stopped)
        assert run is not None
        return run

    def traffic_of(self, segments: int, first: int) -> Traffic:
        """What this rank receives and sends in a run of segments `first` .. `segments` - 1."""
        key = segments, first
        if key not in self._traffic:
            while len(self._traffic) >= KEPT:
                del self._traffic[next(iter(self._traffic))]
            grids = tuple(band.program.grid(segments, first) for band in self.cut.bands)
            self._traffic[key] = Traffic(self.cut, self.rank, grids)
        return self._traffic[key]

    def _own_levels(
        self, levels: Levels, traffic: Traffic, stopped: Fault | None
    ) -> tuple[Fault | None, bool]:
        """Run this rank's levels; what has gone wrong on it, if something has, and whether the run has to be
        launched instead. Whatever happens, all is received that others send, and sent what they expect."""
        grid, is_off = traffic.grid, False
        with self.members[self.rank].current():
            for level in grid.levels:
                messages = levels.receive(level)
                made: Made | None = {}
                if not (stopped or is_off):
                    try:
                        made = levels.run(level, messages)
                    except Exception as error:
                        stopped = Fault(f"rank {self.rank}, level {level}", error)
                is_off = is_off or made is None
                if stopped or is_off:
                    for message in messages:
                        message.value.take()
                        message.value.done()
                levels.before_sends(level)
                for sent, segment in traffic.sent(level):
                    levels.send(sent, made.get((sent, segment)) if made else None, level)
                self.mail.wait(level)
            self.mail.wait(grid.levels[-1], all_of_them=True)
        return stopped, is_off


def _device(group: Any, home: torch.device) -> torch.device:
    """Where this rank runs: with the model, if its group can send what is there, else on its CUDA device."""
    return home if sends_from(group, home) else torch.device("cuda", torch.cuda.current_device())


__all__ = ["RankExecutor"]
