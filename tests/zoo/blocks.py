"""Small parts that zoo models share: attention with a context, feed-forward, and a memory writer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 11
"""Number of tokens that every token model of the zoo knows."""


class Attention(nn.Module):
    """Causal attention over x, with an optional context that every position sees.

    `forward(x: f[B, T, D], context: f[B, M, D] | None) -> f[B, T, D]`.
    """

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(d, d, bias=False)
        self.kv = nn.Linear(d, 2 * d, bias=False)
        self.o = nn.Linear(d, d)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, length, d = x.shape
        source = x if context is None else torch.cat((context, x), 1)
        seen = source.shape[1] - length
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.kv(source).chunk(2, -1))
        mask = torch.ones(length, seen + length, dtype=torch.bool, device=x.device).tril(seen)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(y.transpose(1, 2).reshape(batch, length, d))


class FeedForward(nn.Module):
    """`forward(x: f[..., D]) -> f[..., D]`: two linears with a GELU between them."""

    def __init__(self, d: int, hidden: int | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(d, hidden or 2 * d)
        self.down = nn.Linear(hidden or 2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A pre-norm transformer block: `forward(x: f[B, T, D], context: f[B, M, D] | None) -> f[B, T, D]`."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(d, heads)
        self.mlp = FeedForward(d)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))


class Writer(nn.Module):
    """Memory slots look at a segment and are moved towards what they see.

    `forward(memory: f[B, M, D], x: f[B, T, D]) -> f[B, M, D]`.
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.value, self.gate = nn.Linear(d, d), nn.Linear(2 * d, d)

    def forward(self, memory: Tensor, x: Tensor) -> Tensor:
        scores = torch.softmax(self.query(memory) @ self.key(x).mT * x.shape[-1] ** -0.5, -1)
        new = torch.tanh(scores @ self.value(x))
        gate = torch.sigmoid(self.gate(torch.cat((memory, new), -1)))
        return gate * memory + (1 - gate) * new


class MemoryBlock(nn.Module):
    """A block that reads and writes its memory: `forward(x, memory) -> (x', memory')`, as in `Writer`."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.block, self.writer = Block(d, heads), Writer(d)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        x = self.block(x, memory)
        return x, self.writer(memory, x)


def tokens(batch: int, segments: int, segment: int, seed: int = 0) -> tuple[Tensor]:
    """Random tokens i64[batch, segments * segment]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, VOCAB, (batch, segments * segment), generator=generator),)


def features(
    batch: int, steps: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor]:
    """Random features f[batch, steps, d]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, steps, d, generator=generator, dtype=torch.float64).to(dtype),)
