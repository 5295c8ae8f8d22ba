"""Execute a compiled program: weights stacked once, an engine for the cells, one `Run` a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.compiler.stages import said_when_long
from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.segmentation import Segmentation
from rmtcompile.ir.weights import Weight
from rmtcompile.runtime.base import OnLevel, OnValue
from rmtcompile.runtime.contexts import own_modes, plain_tensors, same_numbers
from rmtcompile.runtime.costs import Costs, costs_of
from rmtcompile.runtime.crossing import Crossing, Key
from rmtcompile.runtime.engine import Engine, backend_for
from rmtcompile.runtime.fitting import Keeping, room_on
from rmtcompile.runtime.forms import Form
from rmtcompile.runtime.graphs import Started
from rmtcompile.runtime.packed import Pack
from rmtcompile.runtime.replays import Replays
from rmtcompile.runtime.run import Run
from rmtcompile.runtime.stacks import Alone, Stacks
from rmtcompile.runtime.state import Part
from rmtcompile.runtime.steps import Steps


@dataclass
class _Seen:
    """What executors of one code have run: whether all forms are compiled, and the lengths so far."""

    prepared: bool = False
    lengths: set[int] = field(default_factory=set)


class Executor:
    """Runs one compiled program for any number of segments.

    Args:
        backend: "eager", "inductor", another `torch.compile` backend, or "auto" (inductor on CUDA, eager
            elsewhere).
        cuda_graphs: "auto" (on CUDA, where no gradients are recorded), True or False.
        like: an executor of the same code at other sizes; weights and compiled forms are shared with it, and
            where these sizes are of the last segments alone, storage and recordings, too.
        recompute: what backward computes again; see `rmtcompile.optimize`.

    Attributes:
        keeping: what is kept for backward.
        is_whole: whether one device runs all layers: training steps are recorded, and backward may keep what
            fits into its memory.
    """

    is_whole = True

    def __init__(
        self,
        compiled: Compiled,
        segmentation: Segmentation,
        backend: str | Callable[..., Any],
        cuda_graphs: str | bool,
        like: Executor | None = None,
        recompute: str | int = "auto",
    ) -> None:
        self.compiled = compiled
        self.segmentation = segmentation
        self._like = like
        self._seen: _Seen = like._seen if like is not None else _Seen()
        self.program = compiled.program
        left = {effect.name for effect, _ in compiled.effects if effect.in_place is None}
        inside = tuple(name + end for name in left for end in ".[")  # what is in a container that is replaced
        self.replaced = frozenset(
            name for name in compiled.leaves if name in left or name.startswith(inside)
        )
        self.device = next((lane.device for lane in self.program.lanes), torch.device("cpu"))
        self.backend = backend_for(backend, self.device)
        if cuda_graphs is True and self.device.type != "cuda":
            raise UnsupportedError(
                f"cuda_graphs=True, and the model runs on {self.device}",
                remedy="move the model to a CUDA device, or leave it at 'auto'",
            )
        self._use_graphs = self.device.type == "cuda" and cuda_graphs is not False
        room = partial(room_on, self.device) if self.is_whole else None
        self.keeping = Keeping(recompute, compiled.capture.checkpoint, compiled.longest.draws, room)
        self._engine: Engine | None = None
        self.replays: Replays = Replays(self, like.replays if like is not None else None)
        self.costs: Costs | None = None
        self.compile_seconds: float | None = None  # of the first run, nearly all of it `torch.compile`

    @cached_property
    def stacks(self) -> Stacks:
        """The stacked weights."""
        if self._like is not None:
            return self._like.stacks
        return Stacks(self.stacked(), self.compiled.leaves, self.replaced)

    def stacked(self) -> dict[str, Weight]:
        """What is stacked, by the names of ports."""
        return {
            f"{group.name}.{port.name}": port.source
            for group in self.program.groups
            for port in group.ports
            if port.role == "weight"
        }

    @cached_property
    def steps(self) -> Steps:
        """Recorded training steps."""
        return Steps(self)

    @property
    def engine(self) -> Engine:
        """What runs the cells; made when it is first needed."""
        if self._engine is None:
            with plain_tensors():
                keeps_buffers = self._use_graphs and not self.replays.are_shared
                self._engine = self.new_engine(self.backend, keeps_buffers)
                if self._like is not None:
                    self._engine.share(self._like.engine)
                    if self.replays.are_shared:
                        self._engine.share_buffers(self._like.engine)
        return self._engine

    @property
    def forms(self) -> Sequence[Form]:
        """The compiled forms of cell functions; none before the first run."""
        return self._engine.forms if self._engine is not None else ()

    def new_engine(self, backend: str | Callable[..., Any], keeps_buffers: bool) -> Engine:
        """An engine for the program; for the arguments see `Engine`."""
        passes_off = self.compiled.passes_off if self.device.type == "cuda" else None
        has_one = 1 in self.compiled.sizes.values()
        return Engine(self.program, backend, keeps_buffers, passes_off, has_one)

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Run cell functions as they are for a while, and record nothing."""
        kept = self._engine, self._use_graphs
        self._engine, self._use_graphs = self.new_engine("eager", keeps_buffers=False), False
        try:
            yield
        finally:
            self._engine, self._use_graphs = kept

    def start(self, segments: int, inputs: list[torch.Tensor]) -> Started | None:
        """Start a recorded run of this length, if there is one and no gradients are wanted; checked later."""
        if not self._use_graphs or self.records_gradients(inputs):
            return None
        with plain_tensors():
            return self.replays.start(self.compiled.steps(segments), inputs)

    def finish(self, started: Started) -> tuple[Any, ...] | None:
        """The outputs of a run that was started; None where weights have moved since it was recorded."""
        if not started.is_current():
            self.replays.forget()
            return None
        with plain_tensors():
            return started.results()

    def record(self, inputs: list[torch.Tensor]) -> None:
        """Record what runs of any length need, once, where runs are recorded by blocks of levels."""
        if self._use_graphs and self.replays.wants and not self.records_gradients(inputs):
            with plain_tensors(), own_modes(), same_numbers(self.device):
                self.replays.record(inputs)

    def named(self, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(zip(self.compiled.input_names, inputs, strict=True))

    def run(
        self,
        segments: int,
        inputs: list[torch.Tensor],
        graphs: bool = True,
        on_level: OnLevel | None = None,
    ) -> tuple[Any, ...]:
        """Run the program; returns the captured graph's outputs.

        The first run without gradients compiles all forms of the cell functions that any number of segments
        needs, on repeated inputs where need be; the first two lengths shorter than the number of layers get
        forms of their own.

        Args:
            segments: number of segments.
            inputs: tensor arguments of the forward.
            graphs: whether CUDA graphs may be recorded and replayed.
            on_level: called with (run, level, step) in place of step(run, level); nothing is recorded then.
        """
        started, segments = time.perf_counter(), self.compiled.steps(segments)
        if self.compile_seconds is None and self.engine.is_compiled:
            with said_when_long("compiling the cells, once for all lengths"):
                outputs = self._outputs(segments, inputs, graphs, on_level)
            self.compile_seconds = time.perf_counter() - started
            return outputs
        return self._outputs(segments, inputs, graphs, on_level)

    def _outputs(
        self, segments: int, inputs: list[torch.Tensor], graphs: bool, on_level: OnLevel | None
    ) -> tuple[Any, ...]:
        has_new_form = self.compile_forms(segments, inputs)
        if has_new_form and self.replays.blocks is not None and on_level is None:
            return self._recorded_again(segments, inputs)
        return self._run_once(segments, inputs, graphs and on_level is None, on_level)

    @property
    def state_layers(self) -> range:
        """The layers whose values of a run state have to be in this process."""
        return range(self.program.n_layers)

    def advance(
        self,
        segments: int,
        inputs: list[torch.Tensor],
        first: int,
        border: int,
        values: Mapping[Key, torch.Tensor],
        part: Part | None = None,
    ) -> tuple[tuple[Any, ...], dict[Key, torch.Tensor], Part | None]:
        """Run segments `first` .. `segments` - 1 after what earlier ones have left.

        Args:
            segments: all of them, those that have run before included.
            inputs: tensor arguments of the forward, beginning with segment `first`.
            border: the segment before which the next run will start.
            values: what segments before `first` have left.
            part: which part of it these are, if other processes have the others.

        Returns:
            The graph's outputs, lists over these segments only; what segments before the border leave to
            later ones, and which part of it, if other processes have the others.
        """
        self.compile_forms(segments - first, inputs)
        is_functional = self.records_gradients([*inputs, *values.values()])
        given = self.compiled.emitted.carried, first, border, values, is_functional
        crossing, held = Crossing(*given, stamp=part.stamp if part else ""), self.held()
        with self.replays.alone(), nullcontext() if is_functional else plain_tensors():
            launch = partial(self._run, segments, inputs, held, is_functional, crossing=crossing)
            if is_functional:
                outputs = self.keeping.run(launch, inputs, held)
            elif self._use_graphs and self.is_whole:
                outputs = self.replays.advance(segments, inputs, crossing, launch)
            else:
                outputs = launch()
        return outputs, crossing.left(), None

    def _run_once(
        self,
        segments: int,
        inputs: list[torch.Tensor],
        graphs: bool = False,
        on_level: OnLevel | None = None,
    ) -> tuple[Any, ...]:
        if self.records_gradients(inputs):
            if graphs and self._use_graphs and self.is_whole:
                return self.steps.run(segments, inputs)
            if on_level is None:
                return self.launch_with_gradients(segments, inputs)
            return self._run(segments, inputs, self.held(), True, on_level)
        with plain_tensors():
            if not (graphs and self._use_graphs):
                return self._run(segments, inputs, self.held(), False, on_level)
            return self.replays.run(segments, inputs)

    def pack(self) -> Any:
        """A wavefront for several texts."""
        return Pack(self.program)

    def measure(self, inputs: list[torch.Tensor]) -> Costs | None:
        """What levels cost, measured once, on CUDA with compiled cells; None elsewhere."""
        if self.costs is None and self._use_graphs:
            self.costs = costs_of(self, inputs)
        return self.costs

    @property
    def recorded(self) -> str:
        """How runs are recorded, in words; empty where they are not."""
        if not self._use_graphs:
            return ""
        return f"{self.replays}; {self.steps}" if self.is_whole else str(self.replays)

    @property
    def bands(self) -> list[str]:
        """How the layers are cut into bands, in words; empty where they are not."""
        return []

    def has_seen(self, segments: int) -> None:
        """Note that a run of this length is on its way."""
        self._seen.lengths.add(segments)

    def gets_form(self, segments: int) -> bool:
        """Whether this length is short and one of the first two, so that its width gets a form of its own."""
        is_early = len(self._seen.lengths | {segments}) <= 2 and not self.replays.ends_vary
        return is_early and self.engine.is_compiled and self.engine.can_fix(segments)

    def _recorded_again(self, segments: int, inputs: list[torch.Tensor]) -> tuple[Any, ...]:
        """Run a short length whose width has a form of its own now, and record it with that."""
        with self.replays.alone():
            outputs = self._run_once(segments, inputs)
        if not self.records_gradients(inputs):
            with plain_tensors(), own_modes(), same_numbers(self.device):
                self.replays.record_again(segments)
        return outputs

    def compile_forms(self, segments: int, inputs: list[torch.Tensor]) -> bool:
        """Make sure that all forms are compiled; whether this length's width has got one of its own.

        Runs with gradients are not cheap, and lengths of training are few: each compiles what it needs."""
        if not self.engine.is_compiled:
            return False
        has_new_form = self.gets_form(segments)
        if has_new_form:
            self.engine.fix_width(segments)
        self.has_seen(segments)
        if not self._seen.prepared and not self.records_gradients(inputs):
            self._seen.prepared = True
            borders = self.compiled.emitted.borders
            enough = self.program.n_layers + 1 + borders.head + borders.tail
            if segments < enough and self.compiled.rolled.fixed is None:
                with same_numbers(self.device):
                    self._run_once(enough, self.resized(enough, inputs))
        return has_new_form

    def resized(self, wanted: int, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Inputs of `wanted` segments, the given ones repeated or cut."""
        return self.segmentation.resized(inputs, wanted)

    def launch(
        self,
        segments: int,
        inputs: list[torch.Tensor],
        leaves: dict[str, torch.Tensor] | None = None,
        on_level: OnLevel | None = None,
        on_value: OnValue | None = None,
    ) -> tuple[Any, ...]:
        """Run without gradients, level by level; the leaves are the model's own where none are given."""
        leaves = self.held() if leaves is None else leaves
        return self._run(segments, inputs, leaves, False, on_level, on_value)

    def launch_with_gradients(
        self,
        segments: int,
        inputs: list[torch.Tensor],
        leaves: dict[str, torch.Tensor] | None = None,
        alone: Sequence[Alone] = (),
        rooms: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """Run with gradients, level by level.

        Args:
            leaves: in place of the model's own.
            alone: stacked weights that are read apart from their parameters.
            rooms: memory for sums of their gradients, by name.
        """
        leaves = self.held() if leaves is None else leaves
        if not alone:
            return self.keeping.run(partial(self._run, segments, inputs, leaves, True), inputs, leaves)
        weights, named = self.stacks.current(leaves, alone), self.named(inputs)

        def launch(on_level: OnLevel | None) -> tuple[Any, ...]:
            run = Run(self.program, segments, named, leaves, weights, self.engine, True, on_level)
            run.rooms = rooms or {}
            return self._execute(run)

        return self.keeping.run(launch, inputs, leaves)

    def held(self) -> dict[str, torch.Tensor]:
        """The model's tensors as they are now, by the name in the program."""
        return {name: leaf.fetch() for name, leaf in self.compiled.leaves.items()}

    def records_gradients(self, inputs: list[torch.Tensor]) -> bool:
        """Whether a run records what its gradients need."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *self.held().values()))

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
        weights, looking = self.stacks.current(leaves), (on_level, on_value)
        given = self.named(inputs), leaves, weights, self.engine, functional
        return self._execute(Run(self.program, segments, *given, *looking, crossing))

    @property
    def is_replayed(self) -> bool:
        """Whether runs without gradients are put together of recordings."""
        return self._use_graphs

    def _execute(self, run: Any) -> tuple[Any, ...]:
        with own_modes():
            return self.compiled.namespace["forward"](run)
