"""Models at the edge: no modules at all, and what a compiler of (segment, layer) grids has to refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import VOCAB, MemoryBlock


def plain_function(
    d: int = 16,
    n_layers: int = 4,
    segment: int = 4,
    dtype: torch.dtype = torch.float64,
) -> Callable[[Tensor], Tensor]:
    """A function with its weights in closed-over lists: linear attention with a decayed state, no module.

    The function maps tokens i64[B, S * segment] to logits f[B, S * segment, VOCAB].
    """

    def weights(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, dtype=torch.float64) / columns**0.5).to(dtype)

    embedding, head = weights(VOCAB, d) * d**0.5, weights(VOCAB, d)
    qkv = [weights(3 * d, d) for _ in range(n_layers)]
    up = [weights(2 * d, d) for _ in range(n_layers)]
    down = [weights(d, 2 * d) for _ in range(n_layers)]

    def layer(x: Tensor, state: Tensor, l: int) -> tuple[Tensor, Tensor]:
        q, k, v = F.linear(F.layer_norm(x, (d,)), qkv[l]).chunk(3, -1)
        scores = (q @ k.mT).tril() / d
        y = scores @ v + q @ state
        x = x + F.linear(F.silu(F.linear(F.layer_norm(x + y, (d,)), up[l])), down[l])
        return x, 0.9 * state + k.mT @ v / d

    def forward(ids: Tensor) -> Tensor:
        states = [torch.zeros(ids.shape[0], d, d, dtype=dtype, device=ids.device) for _ in range(n_layers)]
        out = []
        for piece in ids.split(segment, 1):
            x = F.embedding(piece, embedding)
            for l in range(n_layers):
                x, states[l] = layer(x, states[l], l)
            out.append(x)
        return torch.cat(out, 1) @ head.T

    return forward


class GrowingCache(nn.Module):
    """Each layer sees all of its outputs so far: the state grows by a segment each time."""

    def __init__(self, d: int = 16, heads: int = 2, n_layers: int = 3, segment: int = 4) -> None:
        super().__init__()
        self.segment = segment
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(MemoryBlock(d, heads) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x_all = self.embed(ids)
        cache = [x_all.new_zeros(x_all.shape[0], 0, x_all.shape[2]) for _ in self.layers]
        out = []
        for x in x_all.split(self.segment, 1):
            for i, layer in enumerate(self.layers):
                x = layer.block(x, cache[i])
                cache[i] = torch.cat((cache[i], x), 1)
            out.append(x)
        return self.head(torch.cat(out, 1))


class DataDependent(nn.Module):
    """Whether a layer writes its memory depends on the values it saw: a Python `if` on a tensor."""

    def __init__(
        self, d: int = 16, heads: int = 2, n_layers: int = 3, segment: int = 4, n_mem: int = 2
    ) -> None:
        super().__init__()
        self.segment, self.n_mem = segment, n_mem
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(MemoryBlock(d, heads) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x_all = self.embed(ids)
        memory = [x_all.new_zeros(x_all.shape[0], self.n_mem, x_all.shape[2]) for _ in self.layers]
        out = []
        for x in x_all.split(self.segment, 1):
            for i, layer in enumerate(self.layers):
                x, new = layer(x, memory[i])
                if x.sum() > 0:
                    memory[i] = new
            out.append(x)
        return self.head(torch.cat(out, 1))
