"""Execute a compiled program: weights stacked once, an engine for the cells, one `Run` a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rmtcompile.pipeline import Compiled
from rmtcompile.probe import Segmentation
from rmtcompile.runtime.engine import DirectEngine, GraphEngine
from rmtcompile.runtime.run import Run
from rmtcompile.runtime.stacks import Stacks


class Executor:
    """Runs one compiled program for any number of segments.

    Args:
        backend: "eager", "inductor", another `torch.compile` backend, or "auto" (inductor on CUDA, eager
            elsewhere).
        cuda_graphs: "auto" (on CUDA, where no gradients are recorded), True or False.
    """

    def __init__(
        self,
        compiled: Compiled,
        segmentation: Segmentation,
        backend: str | Callable[..., Any],
        cuda_graphs: str | bool,
    ) -> None:
        self.compiled = compiled
        self.segmentation = segmentation
        self._prepared = False
        self._lengths: set[int] = set()
        self.program = compiled.program
        weights = {
            f"{group.name}.{port.name}": port.source
            for group in self.program.groups
            for port in group.ports
            if port.role == "weight"
        }
        self.stacks = Stacks(weights, compiled.leaves)
        device = next((lane.device for lane in self.program.lanes), torch.device("cpu"))
        self.backend = ("inductor" if device.type == "cuda" else "eager") if backend == "auto" else backend
        self.use_graphs = device.type == "cuda" and cuda_graphs is not False
        self.direct = DirectEngine(self.program, self.backend)
        self._graphed: GraphEngine | None = None
        self.shared = {
            port.source.name
            for group in self.program.groups
            for port in group.ports
            if port.role == "shared" and port.source.kind == "leaf"
        }

    @property
    def graphed(self) -> GraphEngine:
        """The engine that replays CUDA graphs, made when it is first needed."""
        if self._graphed is None:
            self._graphed = GraphEngine(self.program, self.backend)
        return self._graphed

    def fits(self) -> bool:
        """Whether the model still holds tensors of the captured shapes, dtypes and devices."""
        for leaf in self.compiled.leaves.values():
            try:
                now = leaf.fetch()
            except (KeyError, IndexError):
                return False
            if now is leaf.tensor:
                continue
            if not isinstance(now, torch.Tensor):
                return False
            if (now.shape, now.dtype, now.device) != (
                leaf.tensor.shape,
                leaf.tensor.dtype,
                leaf.tensor.device,
            ):
                return False
        return True

    def run(self, segments: int, inputs: list[torch.Tensor]) -> tuple[Any, ...]:
        """Run the program over `segments` segments; returns the captured graph's outputs.

        The first run compiles all forms of the cell functions that any number of segments needs, on inputs of
        zeros where `segments` itself does not need them all; the first two lengths shorter than the number of
        layers get forms of their own. Later runs compile nothing.
        """
        if self.direct.is_compiled:
            self._lengths.add(segments)
            if len(self._lengths) <= 2:
                for engine in filter(None, (self.direct, self.graphed if self.use_graphs else None)):
                    engine.fix_width(segments)
            if not self._prepared:
                self._prepared = True
                enough = self.program.n_layers + 1
                if segments < enough and self.compiled.rolled.fixed is None:
                    self._run(enough, self._zeros(enough, inputs))
        return self._run(segments, inputs)

    def _zeros(self, wanted: int, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        shapes = self.segmentation.shapes([tensor.shape for tensor in inputs], wanted)
        return [
            torch.zeros(shape, dtype=x.dtype, device=x.device)
            for shape, x in zip(shapes, inputs, strict=True)
        ]

    def _run(self, segments: int, inputs: list[torch.Tensor]) -> tuple[Any, ...]:
        leaves = {name: leaf.fetch() for name, leaf in self.compiled.leaves.items()}
        named = dict(zip(self.compiled.input_names, inputs, strict=True))
        functional = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*leaves.values(), *inputs)
        )
        weights = self.stacks.current()
        engine: DirectEngine = self.direct
        if self.use_graphs and not functional:
            engine = self.graphed
            self.graphed.check_addresses([*weights.values(), *(leaves[name] for name in sorted(self.shared))])
        run = Run(self.program, segments, named, leaves, weights, engine, functional)
        return self.compiled.namespace["forward"](run)
