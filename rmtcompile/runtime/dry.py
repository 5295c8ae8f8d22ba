"""Dry runs: the shapes of what a program gives, without values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rmtcompile.runtime.contexts import plain_tensors

if TYPE_CHECKING:
    from rmtcompile.runtime.execute import Executor


def dry(
    run: Callable[[list[torch.Tensor]], Sequence[Any]],
    shapes: Sequence[Sequence[int]],
    like: Sequence[torch.Tensor],
) -> Any:
    """The shapes of the outputs of a run on fake tensors of these shapes, typed like `like`."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        inputs = [
            torch.empty(tuple(shape), dtype=x.dtype, device=x.device)
            for shape, x in zip(shapes, like, strict=True)
        ]
        outputs = run(inputs)
    return [[tuple(t.shape) for t in x] if isinstance(x, list) else tuple(x.shape) for x in outputs]


def dry_run(
    executor: Executor, segments: int, shapes: Sequence[Sequence[int]], like: list[torch.Tensor]
) -> Any:
    """The shapes of what an executor's program gives for inputs of these shapes, typed like `like`."""
    with plain_tensors():
        executor.stacks.current(executor.held())  # weights are stacked for real
    with executor.uncompiled():
        return dry(lambda inputs: executor.launch(segments, inputs), shapes, like)


__all__ = ["dry", "dry_run"]
