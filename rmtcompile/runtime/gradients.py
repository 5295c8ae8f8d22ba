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
        room: memory for the sum of gradients; each backward makes its own where it is None.
    """

    def __init__(self, stack: torch.Tensor, room: torch.Tensor | None = None) -> None:
        self._total = _Total(room)
        self._stack: torch.Tensor = _Collected.apply(stack, self._total)

    def of(self, ranks: Sequence[int]) -> torch.Tensor:
        """Rows of these ranks, [n, ...]; a view where they are evenly spaced."""
        found: torch.Tensor = _Window.apply(self._stack, self._total, tuple(ranks))
        return found


class _Total:
    """The sum of the windows' gradients while a backward is on its way.

    Args:
        room: see `Rows`.
    """

    def __init__(self, room: torch.Tensor | None) -> None:
        self._room = room
        self._value: torch.Tensor | None = None
        self._begun: set[int] = set()  # rows that hold something; what comes first is stored, not added

    def add(self, ranks: tuple[int, ...], grad: torch.Tensor, shape: torch.Size) -> None:
        """Add the gradient of a window."""
        if self._value is None:
            fresh = self._room is None
            self._value = torch.empty(shape, dtype=grad.dtype, device=grad.device) if fresh else self._room
        assert self._value is not None
        for is_begun in (True, False):
            here = [place for place, rank in enumerate(ranks) if (rank in self._begun) == is_begun]
            there = [ranks[place] for place in here]
            if not here:
                continue
            part = grad[_index(here)]
            if isinstance(rows := _index(there), slice):
                target = self._value[rows]
                target.add_(part) if is_begun else target.copy_(part)
            else:
                index = torch.tensor(rows, device=grad.device)
                store = self._value.index_add_ if is_begun else self._value.index_copy_
                store(0, index, part)
        self._begun.update(ranks)

    def take(self) -> torch.Tensor | None:
        """The sum of all windows; the next backward begins anew. Rows that no window had are zero."""
        value, self._value = self._value, None
        if value is not None:
            for rank in set(range(value.shape[0])) - self._begun:
                value[rank].zero_()
        self._begun.clear()
        return value


def _index(ranks: list[int]) -> slice | list[int]:
    return as_slice(ranks) or ranks


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
        return ctx.total.take(), None


class _Window(torch.autograd.Function):
    """Rows of the stack. Backward adds to the total, and hands nothing on itself."""

    @staticmethod
    def forward(ctx: Any, stack: torch.Tensor, total: _Total, ranks: tuple[int, ...]) -> torch.Tensor:
        ctx.total, ctx.ranks, ctx.shape = total, ranks, stack.shape
        ctx.set_materialize_grads(False)
        rows = stack[_index(list(ranks))]
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[None, None, None]:
        if grad is not None:
            ctx.total.add(ctx.ranks, grad, ctx.shape)
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
        ctx.set_materialize_grads(False)
        return stack.view_as(stack)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        check_unwritten(ctx.parameters, ctx.versions)
        if grad is None:  # nobody reads what the cells make of it
            return None, None, *(None for _ in ctx.parameters)
        return None, None, *split(grad, ctx.parts, ctx.parameters)


def split(
    grad: torch.Tensor, parts: Sequence[int], parameters: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The gradient of a stack as those of its parameters, views; for the arguments see `Stacked`."""
    found: list[torch.Tensor] = []
    remaining = iter(parameters)
    for layer, count in enumerate(parts):
        start = 0
        for _ in range(count):
            size = next(remaining).shape[0] if count > 1 else None
            found.append(grad[layer] if size is None else grad[layer, start : start + size])
            start += size or 0
    return found


def check_unwritten(parameters: Sequence[torch.Tensor], versions: Sequence[int]) -> None:
    """Raise RuntimeError where parameters were written since they had these versions, which autograd does not
    see where it knows them as a part of something else."""
    if [parameter._version for parameter in parameters] != list(versions):
        raise RuntimeError(
            "a parameter was written in place between the forward and its backward (an optimizer's step, "
            "say): the gradient would be that of other weights. Call backward before, or run the "
            "forward again"
        )


__all__ = ["Rows", "Stacked", "check_unwritten", "is_transformed", "split"]
