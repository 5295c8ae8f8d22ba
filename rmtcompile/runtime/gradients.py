"""Gradients of stacked weights: what the windows of all levels give is added up in one tensor.

    stack [L, ...] -> rows of a window [n, ...] -> cells          forward
    total[rows] += gradient of the window                         backward, a level after the other
    gradient of layer l = total[l], a view                        when all levels have given theirs

Autograd by itself makes each window's gradient as large as the stack, fills it with zeros, and adds one such
tensor a level: half the time of a training step (2026-11-28, H100, 16 layers of width 2048).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rmtcompile.runtime.storage import as_slice


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is on its way, in which autograd has to see all there is."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class Rows:
    """The rows of one stack that windows read in one run, under gradients.

    Args:
        stack: [L, ...], with gradients.
    """

    def __init__(self, stack: torch.Tensor) -> None:
        self._total = _Total()
        self._stack: torch.Tensor = _Collected.apply(stack, self._total)

    def of(self, ranks: Sequence[int]) -> torch.Tensor:
        """Rows of these ranks, [n, ...]; a view where they are evenly spaced."""
        found: torch.Tensor = _Window.apply(self._stack, self._total, as_slice(ranks) or list(ranks))
        return found


class _Total:
    """The sum of the windows' gradients while a backward is on its way."""

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None


class _Collected(torch.autograd.Function):
    """The stack itself. Backward gives what windows have added; it runs when all of them have."""

    @staticmethod
    def forward(ctx: Any, stack: torch.Tensor, total: _Total) -> torch.Tensor:
        ctx.total = total
        ctx.set_materialize_grads(False)
        return stack.view_as(stack)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        assert grad is None  # nothing but windows reads it
        value, ctx.total.value = ctx.total.value, None
        return value, None


class _Window(torch.autograd.Function):
    """Rows of the stack. Backward adds to the total, and hands nothing on itself."""

    @staticmethod
    def forward(ctx: Any, stack: torch.Tensor, total: _Total, index: slice | list[int]) -> torch.Tensor:
        ctx.total, ctx.index = total, index
        ctx.kind = stack.shape, stack.dtype, stack.device
        ctx.set_materialize_grads(False)
        rows = stack[index]
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[None, None, None]:
        if grad is not None:
            shape, dtype, device = ctx.kind
            if ctx.total.value is None:
                ctx.total.value = torch.zeros(shape, dtype=dtype, device=device)
            if isinstance(ctx.index, slice):
                ctx.total.value[ctx.index].add_(grad)
            else:
                index = torch.tensor(ctx.index, device=device)
                ctx.total.value = ctx.total.value.index_add(0, index, grad)
        return None, None, None


class Stacked(torch.autograd.Function):
    """A stack of which the parameters are views. Backward gives each of them its part of the stack's
    gradient, a view as well.

    Raises:
        RuntimeError: in backward, where a parameter was written after the forward: autograd does not see
            that the stack is the same memory.
    """

    @staticmethod
    def forward(
        ctx: Any, stack: torch.Tensor, parts: Sequence[int], *parameters: torch.Tensor
    ) -> torch.Tensor:
        """The stack, [L, ...].

        Args:
            parts: how many parameters each layer has, concatenated along dim 0.
            parameters: layer by layer.
        """
        ctx.parts = parts
        ctx.parameters = parameters
        ctx.versions = [parameter._version for parameter in parameters]
        return stack.view_as(stack)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if [parameter._version for parameter in ctx.parameters] != ctx.versions:
            raise RuntimeError(
                "a parameter was written in place between the forward and its backward (an optimizer's step, "
                "say): the gradient would be that of other weights. Call backward before, or run the "
                "forward again"
            )
        found: list[torch.Tensor | None] = []
        parameters = iter(ctx.parameters)
        for layer, count in enumerate(ctx.parts):
            start = 0
            for _ in range(count):
                size = next(parameters).shape[0] if count > 1 else None
                found.append(grad[layer] if size is None else grad[layer, start : start + size])
                start += size or 0
        return None, None, *found


__all__ = ["Rows", "Stacked", "is_transformed"]
