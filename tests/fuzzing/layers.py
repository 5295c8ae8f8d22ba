"""One layer of a random model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fuzzing.memories import MEMORIES, State, Vector
from fuzzing.operations import OPERATIONS, Weights
from fuzzing.places import holder
from fuzzing.spec import Kind


class Layer(nn.Module):
    """Reads its memory and the means of other cells, does its operations, writes its memory."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.weights = nn.ModuleList(Weights() for _ in kind.operations)
        self.memory: Vector | None = None if kind.memory == "none" else MEMORIES[kind.memory]()
        holder(self)

    def forward(
        self, x: Tensor, state: State | None, others: list[Tensor], mask: Tensor | None
    ) -> tuple[Tensor, State | None]:
        """x: f[B, T, D], what other cells have left f[B, D] each, mask b[B, T]."""
        for other in others:
            x = x + 0.5 * other[:, None]
        new = None
        if self.memory is not None:
            x, state = self.begin(x, state)
        for name, weights in zip(self.kind.operations, self.weights):
            x = OPERATIONS[name](weights, x)
        if mask is not None:
            x = x.masked_fill(~mask[:, :, None], 0.0)
        if self.memory is not None:
            new = self.memory.write(x, state)
        return x, new

    def begin(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """x with what was read, and the memory that the write goes on from."""
        if state is not None:
            return self.memory.read(x, state), state
        if self.kind.first == "none":
            return x, self.memory.zeros(x)
        if self.kind.first == "branch":
            return x - torch.tanh(x.mean(1, keepdim=True)), self.memory.zeros(x)
        state = self.memory.learned(x) if self.kind.first == "learned" else self.memory.zeros(x)
        return self.memory.read(x, state), state
