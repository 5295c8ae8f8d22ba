"""Execute a compiled program: weights stacked once, cell functions compiled, one `Run` a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rmtcompile.pipeline import Compiled
from rmtcompile.runtime.run import Run
from rmtcompile.runtime.stacks import Stacks


class Executor:
    """Runs one compiled program for any number of segments.

    Args:
        backend: "eager", "inductor", another `torch.compile` backend, or "auto" (inductor on CUDA, eager elsewhere).
        cuda_graphs: "auto", True or False.
    """

    def __init__(self, compiled: Compiled, backend: str | Callable[..., Any], cuda_graphs: str | bool) -> None:
        self.compiled = compiled
        self.program = compiled.program
        weights = {
            f"{group.name}.{port.name}": port.source
            for group in self.program.groups
            for port in group.ports
            if port.role == "weight"
        }
        self.stacks = Stacks(weights, compiled.leaves)
        self.device = next((lane.device for lane in self.program.lanes), torch.device("cpu"))
        self.backend = ("inductor" if self.device.type == "cuda" else "eager") if backend == "auto" else backend
        self.cuda_graphs = cuda_graphs
        self.cells: dict[str, Callable[..., Any]] = {}
        if self.backend != "eager":
            for cell in compiled.emitted.cells:
                function = compiled.namespace[cell.name]
                self.cells[cell.name] = torch.compile(function, backend=self.backend, dynamic=True)

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
            if (now.shape, now.dtype, now.device) != (leaf.tensor.shape, leaf.tensor.dtype, leaf.tensor.device):
                return False
        return True

    def run(self, segments: int, inputs: list[torch.Tensor]) -> tuple[Any, ...]:
        """Run the program over `segments` segments; returns the captured graph's outputs."""
        leaves = {name: leaf.fetch() for name, leaf in self.compiled.leaves.items()}
        named = dict(zip(self.compiled.input_names, inputs, strict=True))
        functional = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*leaves.values(), *inputs)
        )
        run = Run(self.program, segments, named, leaves, self.stacks.current(), functional)
        run.compiled = self.cells
        return self.compiled.namespace["forward"](run)  # type: ignore[no-any-return]
