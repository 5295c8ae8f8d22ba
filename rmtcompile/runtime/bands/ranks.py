"""Bands in several processes of `torch.distributed`, one band a rank.

    rank 0    level t ─ sends ─> level t + 1 ...
    rank 1    level t - 1 .....  level t, with what rank 0 has sent on level t - 1

Every rank calls with the same model and the same arguments, runs its own band, and gets the whole result.
Ranks agree on what they are about to run before its first level. A rank that fails goes on receiving, and
sends zeros, until its levels are over: then all ranks say what has happened on which one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.errors import RankError, UnsupportedError
from rmtcompile.ir.segmentation import Segmentation
from rmtcompile.passes.emit.readers import CALLER
from rmtcompile.runtime.bands.copies import version
from rmtcompile.runtime.bands.execute import BandedExecutor
from rmtcompile.runtime.bands.mail import Mail, Trail
from rmtcompile.runtime.bands.rank_gradients import with_gradients
from rmtcompile.runtime.bands.run import BandRun, Message
from rmtcompile.runtime.bands.traffic import received_on, sent_on
from rmtcompile.runtime.base import OnLevel, OnValue
from rmtcompile.runtime.contexts import own_modes
from rmtcompile.runtime.crossing import Crossing, Key
from rmtcompile.runtime.execute import Executor
from rmtcompile.runtime.gradients import is_transformed

_SAMPLES = 64
_TENSOR = object()


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
        super().__init__(*given, [torch.device(home)] * self.count)
        self.mail = Mail(group, self.cut, compiled.program, self.home)
        self._use_graphs = False
        self._weighed: tuple[Any, str] = ((), "")

    @property
    def bands(self) -> list[str]:
        """See `Executor`."""
        return self.cut.described([f"rank {rank}" for rank in range(self.count)])

    # ---- before the first level ----------------------------------------------------------------------------

    def _agree(
        self, segments: int, inputs: Sequence[torch.Tensor], crossing: Crossing | None, wanted: Sequence[str]
    ) -> None:
        """Find out whether all ranks are about to run the same.

        Raises:
            UnsupportedError: they are not.
        """
        state = crossing.values if crossing is not None else {}
        mine = {
            "rmtcompile's program": _digest(self.compiled.emitted.source, self.home),
            "torch": torch.__version__,
            "the number of segments": segments,
            "the arguments' shapes": [(tuple(x.shape), str(x.dtype)) for x in inputs],
            "the arguments' values": _sampled(inputs),
            "the weights": self._weights_digest(),
            "the state": None if crossing is None else (crossing.first, crossing.border, sorted(state)),
            "the state's values": _sampled([value for _, value in sorted(state.items())]),
            "what has gradients": list(wanted),
        }
        everyone = self.mail.gathered(mine)
        for what, value in mine.items():
            told = [one.get(what) for one in everyone]
            if any(other != value for other in told):
                raise UnsupportedError(
                    f"ranks are about to run different things: {what}",
                    [f"rank {rank}: {other}" for rank, other in enumerate(told)],
                    "call with the same model and the same arguments on every rank",
                )

    def _weights_digest(self) -> str:
        """Equal where the weights are, as far as samples show; taken again where a write was counted."""
        leaves = {name: x for name, x in self.held().items() if isinstance(x, torch.nn.Parameter)}
        state = tuple((name, x.data_ptr(), version(x)) for name, x in leaves.items())
        if self._weighed[0] != state:
            self._weighed = state, _sampled([x for _, x in sorted(leaves.items())])
        return self._weighed[1]

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
        self._agree(segments, inputs, crossing, list(wanted))
        looking = on_level, on_value
        with own_modes(), self._own_numbers():
            if not wanted:
                outputs, found = self._whole_run(segments, named, leaves, *looking, crossing, None)
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
                    return _flat(self._whole_run(segments, given, held, *looking, state, trail), shape)

                flat = with_gradients(self.mail, list(wanted.values()), forward)
                outputs, found = _unflat(flat, shape)
        if crossing is not None:
            crossing.take(found)
        return outputs

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
        with torch.random.fork_rng([self.home] if self.home.type == "cuda" else []):
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
    ) -> tuple[tuple[Any, ...], dict[Key, torch.Tensor]]:
        """What the forward returns and leaves behind, on every rank, and what segments after it read.

        What is made of results is made on all ranks; its gradients to weights and arguments are taken on the
        first one.
        """
        member, held = self.members[self.rank], dict(leaves)
        weights, functional = self.stacks.current(held), trail is not None
        run = self.band_run(
            member, segments, inputs, held, weights, functional, on_level, on_value, crossing
        )
        self._say(self._own_levels(run, member.functions["step"], trail))
        self._share(run)
        found: dict[Key, torch.Tensor] = {}
        if run.crossing is not None:
            for rank in range(self.count):
                found |= self.mail.shared(rank, run.crossing.found if rank == self.rank else {})
        if functional and self.rank:
            inputs, held, run.init = pytree.tree_map_only(
                torch.Tensor, torch.Tensor.detach, (dict(inputs), held, run.init)
            )
        return self.outputs_of([run] * self.count, segments, inputs, held, None), found

    def _own_levels(self, run: BandRun, step: Any, trail: Trail | None) -> str:
        """Run this rank's levels; what has gone wrong on it, if something has."""
        grids = tuple(band.program.grid(run.segments, run.first) for band in self.cut.bands)
        failed = ""
        for level in run.grid.levels:
            messages = [
                Message(sent, at, segment, self.mail.receive(sent, at, trail))
                for sent, segment, at in received_on(self.cut, self.rank, grids, level)
            ]
            if not failed:
                try:
                    for message in messages:
                        run.arrive(message)
                    run.level(level, step)
                except Exception as error:
                    failed = f"rank {self.rank}, level {level}: {type(error).__name__}: {error}"
            made = {(m.sent, m.segment): m.value for m in run.outgoing}
            run.outgoing.clear()
            for sent, segment in sent_on(self.cut.bands[self.rank], run.grid, level):
                if level < grids[sent.target].levels[-1]:
                    self.mail.send(sent, None if failed else made.get((sent, segment)), level, trail)
            self.mail.wait(level)
        self.mail.wait(run.grid.levels[-1], all_of_them=True)
        return failed

    # ---- after the last level ------------------------------------------------------------------------------

    def _say(self, failed: str) -> None:
        """Raise on all ranks what has gone wrong on any of them."""
        if told := [one for one in self.mail.gathered(failed) if one]:
            raise RankError("\n".join(told))

    def _share(self, run: BandRun) -> None:
        """Give every rank what the caller reads."""
        for band in self.cut.bands:
            for name in sorted(band.makes):
                if CALLER in self.compiled.emitted.readers.get(name, ()):
                    mine = run.taps[name].values if band.index == self.rank else {}
                    run.taps[name].values = self.mail.shared(band.index, mine)


def _flat(found: Any, shape: list[Any]) -> list[torch.Tensor]:
    """The tensors in what a run gives, for `_unflat`."""
    leaves, spec = pytree.tree_flatten(found)
    shape[:] = [spec, [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _unflat(flat: Sequence[torch.Tensor], shape: list[Any]) -> Any:
    spec, others = shape
    values = iter(flat)
    return pytree.tree_unflatten([next(values) if other is _TENSOR else other for other in others], spec)


def _digest(source: str, home: torch.device) -> str:
    """Equal for programs that differ only in the device of the rank."""
    text = source.replace(f'torch.device("{home}")', "home")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sampled(values: Sequence[torch.Tensor]) -> str:
    """Equal for tensors of the same values, as far as evenly spaced samples show."""
    digest = hashlib.sha256()
    for value in values:
        flat = value.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLES)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes() if some.numel() else b"")
    return digest.hexdigest()[:16]


__all__ = ["RankExecutor"]
