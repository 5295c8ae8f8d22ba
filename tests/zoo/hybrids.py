"""Stacks that mix kinds of layers: attention with a window, a selective state space, a gated recurrence.

Maps tokens i64[B, S * segment] to logits f[B, S * segment, VOCAB].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import VOCAB, FeedForward


class WindowAttention(nn.Module):
    """Attention over the segment and the keys and values of the one before.

    `forward(x: f[B, T, D], state: (k, v), each f[B, H, T, K]) -> (y, state')`.
    """

    def __init__(self, d: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def start(self, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
        zero = x.new_zeros(x.shape[0], self.heads, length, x.shape[2] // self.heads)
        return zero, zero

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        past = state[0].shape[2]
        mask = torch.ones(t, past + t, dtype=torch.bool, device=x.device).tril(past).triu(1)
        keys, values = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(b, t, d)), (k, v)


class StateSpace(nn.Module):
    """A selective state space (2312.00752): a short convolution, then a recurrence with rates from the input.

    `forward(x: f[B, T, D], state: (last f[B, D, W - 1], h f[B, D, N])) -> (y, state')`; a loop over T.
    """

    def __init__(self, d: int, n: int = 3, width: int = 3) -> None:
        super().__init__()
        self.n, self.width = n, width
        self.enter, self.rates, self.out = nn.Linear(d, 2 * d), nn.Linear(d, d + 2 * n), nn.Linear(d, d)
        self.conv = nn.Conv1d(d, d, width, groups=d)
        self.log_a = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(d, 1))

    def start(self, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
        b, _, d = x.shape
        return x.new_zeros(b, d, self.width - 1), x.new_zeros(b, d, self.n)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        last, h = state
        u, gate = self.enter(x).chunk(2, -1)
        u = torch.cat((last, u.mT), -1)
        last, u = u[..., 1 - self.width :], F.silu(self.conv(u)).mT
        dt, b, c = self.rates(u).split((u.shape[-1], self.n, self.n), -1)
        dt = F.softplus(dt)
        out = []
        for t in range(u.shape[1]):
            decay = torch.exp(-dt[:, t, :, None] * self.log_a.exp())
            h = decay * h + (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
            out.append(torch.einsum("bdn,bn->bd", h, c[:, t]))
        return self.out(torch.stack(out, 1) * F.silu(gate)), (last, h)


class GatedRecurrence(nn.Module):
    """A linear recurrence with input and forget gates (2402.19427), as a cumulative product over the segment.

    `forward(x: f[B, T, D], state: (h f[B, D],)) -> (y, state')`.
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.gates, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def start(self, x: Tensor, length: int) -> tuple[Tensor]:
        return (torch.zeros_like(x[:, 0]),)

    def forward(self, x: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        forget, enter, value = self.gates(x).chunk(3, -1)
        keep = torch.sigmoid(forget).cumprod(1)
        h = keep * (state[0][:, None] + (torch.sigmoid(enter) * value / keep).cumsum(1))
        return self.out(h), (h[:, -1],)


class Mixed(nn.Module):
    """A residual layer around one of the mixers above."""

    def __init__(self, d: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.mixer, self.mlp = mixer, FeedForward(d)

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, state = self.mixer(self.norm1(x), state)
        x = x + y
        return x + self.mlp(self.norm2(x)), state


class Hybrid(nn.Module):
    """A recurrence, attention and a state space in turn: three kinds of layers."""

    KINDS = (GatedRecurrence, WindowAttention, StateSpace)

    def __init__(self, d: int = 8, n_layers: int = 6, segment: int = 4) -> None:
        super().__init__()
        self.segment = segment
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(Mixed(d, self.KINDS[l % 3](d)) for l in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x_all = self.embed(ids)
        states = [layer.mixer.start(x_all, self.segment) for layer in self.layers]
        out = []
        for x in x_all.split(self.segment, 1):
            for l, layer in enumerate(self.layers):
                x, states[l] = layer(x, states[l])
            out.append(x)
        return self.head(torch.cat(out, 1))
