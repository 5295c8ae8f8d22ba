"""Stacked parameters: the weights of all layers of a kind in one tensor, of which the model's own parameters are views."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rmtcompile.capture import Leaf
from rmtcompile.errors import UnsupportedError
from rmtcompile.runtime.storage import as_slice
from rmtcompile.weights import Weight


class Stack:
    """One stacked weight [layers, rows, ...]; leaf p of layer l is `tensor[l, start:stop]`, the same memory."""

    def __init__(self, weight: Weight, leaves: dict[str, Leaf]) -> None:
        self.weight = weight
        self.leaves = [[leaves[name] for name in parts] for parts in weight.leaves]
        self.tensor: torch.Tensor | None = None
        self.pointers: list[int] = []

    def current(self) -> torch.Tensor:
        """The stack, made again where a parameter was replaced, moved or cast since."""
        tensors = [[leaf.fetch() for leaf in parts] for parts in self.leaves]
        if torch.is_grad_enabled() and any(t.requires_grad for parts in tensors for t in parts):
            return torch.stack([parts[0] if len(parts) == 1 else torch.cat(parts) for parts in tensors])
        flat = [tensor for parts in tensors for tensor in parts]
        if self.tensor is None or [t.data_ptr() for t in flat] != self.pointers or flat[0].dtype != self.tensor.dtype:
            self._stack(tensors)
        assert self.tensor is not None
        return self.tensor

    def _stack(self, tensors: Sequence[Sequence[torch.Tensor]]) -> None:
        first = tensors[0]
        for layer, parts in enumerate(tensors):
            for i, tensor in enumerate(parts):
                if (tensor.shape, tensor.dtype, tensor.device) != (first[i].shape, first[i].dtype, first[i].device):
                    raise UnsupportedError(
                        "parameters of one kind of layer differ in shape, dtype or device",
                        [f"{self.leaves[0][i].name}: {tuple(first[i].shape)} {first[i].dtype} {first[i].device}",
                         f"{self.leaves[layer][i].name}: {tuple(tensor.shape)} {tensor.dtype} {tensor.device}"],
                    )
        rows = sum(part.shape[0] if part.dim() else 1 for part in first)
        shape = (rows, *first[0].shape[1:]) if len(first) > 1 else first[0].shape
        with torch.no_grad():
            stack = torch.empty((len(tensors), *shape), dtype=first[0].dtype, device=first[0].device)
            for layer, parts in enumerate(tensors):
                start = 0
                for tensor in parts:
                    view = stack[layer]
                    if len(parts) > 1:
                        view = view[start : start + tensor.shape[0]]
                        start += tensor.shape[0]
                    view.copy_(tensor)
                    tensor.data = view
        self.tensor = stack
        self.pointers = [tensor.data_ptr() for parts in tensors for tensor in parts]

    def window(self, ranks: Sequence[int], stacked: torch.Tensor) -> torch.Tensor:
        """Rows `ranks` of the stack: a view where they are evenly spaced."""
        where = as_slice(ranks)
        return stacked[where] if where is not None else stacked[list(ranks)]


class Stacks:
    """All stacked weights of a program; a leaf that is part of two different stacks is copied into the second."""

    def __init__(self, weights: dict[str, Weight], leaves: dict[str, Leaf]) -> None:
        shared: dict[Weight, Stack] = {}
        self.stacks = {name: shared.setdefault(weight, Stack(weight, leaves)) for name, weight in weights.items()}
        owner: dict[str, Stack] = {}
        for stack in shared.values():
            for name in (name for parts in stack.weight.leaves for name in parts):
                if owner.setdefault(name, stack) is not stack:
                    raise UnsupportedError(
                        "one parameter is used in two different roles by the layers", [name],
                        "layers that share single weights across roles are not supported yet",
                    )

    def current(self) -> dict[str, torch.Tensor]:
        """Stacked tensors by port name, checked against the model's parameters."""
        return {name: stack.current() for name, stack in self.stacks.items()}
