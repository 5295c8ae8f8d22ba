"""What layers, prologues and epilogues do to a segment: `f(module, x: f[B, T, D]) -> f[B, T, D]`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 4


class Weights(nn.Module):
    """The weights of one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.norm, self.conv = nn.LayerNorm(WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.gain = nn.Parameter(torch.ones(WIDTH))


Operation = Callable[[Weights, Tensor], Tensor]


def heads(m: Weights, x: Tensor) -> Tensor:
    """Causal attention in two heads."""
    q, k = m.up(x).chunk(2, -1)
    q, k, v = (t.view(*t.shape[:2], 2, 2).transpose(1, 2) for t in (q, k, m.linear(x)))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return x + out.transpose(1, 2).reshape(x.shape)


def masked(m: Weights, x: Tensor) -> Tensor:
    """Attention with a mask written out."""
    n = x.shape[1]
    scores = m.linear(x) @ x.mT
    future = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
    return x + scores.masked_fill(future, float("-inf")).softmax(-1) @ x


def experts(m: Weights, x: Tensor) -> Tensor:
    """The better of two experts for each position."""
    weight, index = x[..., :2].softmax(-1).topk(1)
    both = m.up(x).unflatten(-1, (2, WIDTH))
    chosen = both.gather(2, index[..., None].expand(-1, -1, -1, WIDTH))[:, :, 0]
    return x + weight * chosen


def rotary(m: Weights, x: Tensor) -> Tensor:
    """Turned by positions in the segment."""
    angle = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None] * 0.3
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def in_place(m: Weights, x: Tensor) -> Tensor:
    """Writes into a tensor of its own, through a slice."""
    y = m.linear(x).clone()
    y[:, :1] = y[:, :1] * 2
    y[..., 0].add_(1.0)
    return x + y.tanh()


def filled(m: Weights, x: Tensor) -> Tensor:
    """A new tensor, filled position by position."""
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        out[:, t] = torch.tanh(m.linear(x[:, t]))
    return x + out


def scanned(m: Weights, x: Tensor) -> Tensor:
    """A recurrence over the positions of the segment."""
    h, out = x[:, 0], []
    for t in range(x.shape[1]):
        h = torch.tanh(m.linear(h) + x[:, t])
        out.append(h)
    return torch.stack(out, 1)


def padded(m: Weights, x: Tensor) -> Tensor:
    """Each position with the one before."""
    return x + m.linear(F.pad(x, (0, 0, 1, 0))[:, :-1])


def counted(m: Weights, x: Tensor) -> Tensor:
    """Divided by the number of positions."""
    return x + x.sum(1, keepdim=True) / x.shape[1]


OPERATIONS: dict[str, Operation] = {
    "linear": lambda m, x: m.linear(x),
    "tanh": lambda m, x: x + torch.tanh(x),
    "norm": lambda m, x: m.norm(x),
    "gate": lambda m, x: x * torch.sigmoid(m.linear(x)),
    "double": lambda m, x: 2 * x,
    "roll": lambda m, x: x.roll(1, 1),
    "flip": lambda m, x: x + m.linear(x.flip(1)),
    "attention": lambda m, x: x + torch.softmax(x @ m.linear(x).mT, -1) @ x,
    "heads": heads,
    "masked": masked,
    "experts": experts,
    "rotary": rotary,
    "in place": in_place,
    "filled": filled,
    "scanned": scanned,
    "padded": padded,
    "counted": counted,
    "glu": lambda m, x: x + F.glu(m.up(x), -1),
    "conv": lambda m, x: x + m.conv(x.mT).mT,
    "einsum": lambda m, x: x + torch.einsum("btd,ed->bte", x, m.linear.weight),
    "rms": lambda m, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * m.gain,
    "cumsum": lambda m, x: x + x.cumsum(1) * m.gain,
    "deviation": lambda m, x: x / (1 + x.std(-1, keepdim=True)),
    "where": lambda m, x: torch.where(x > 0, m.linear(x), x),
    "flat": lambda m, x: x + torch.addmm(m.linear.bias, x.flatten(0, 1), m.linear.weight).view(x.shape),
    "dropout": lambda m, x: F.dropout(m.linear(x), 0.5, m.training) + x,
    "sorted": lambda m, x: x + x.sort(-1).values * m.gain,
    "largest": lambda m, x: x + m.up.weight[x.argmax(-1)],
    "without gradient": lambda m, x: x + m.linear(x.detach()),
}
