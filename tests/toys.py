"""Layer-recurrent models of a few lines, and what every comparison with the model as it is asserts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

SEGMENT = 3
"""Positions in a segment of every toy."""

WIDTH = 4
"""Features of every toy."""

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Layer(nn.Module):
    """One layer with a state of its own: `forward(x: f[B, T, D], m: f[B, D]) -> (x', m')`."""

    def __init__(self, d: int = WIDTH) -> None:
        super().__init__()
        self.mix, self.read = nn.Linear(d, d), nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        x = x + torch.tanh(self.mix(x) + self.read(m)[:, None])
        return x, 0.5 * m + x.mean(1)


class Toy(nn.Module):
    """f[B, T, D] -> f[B, T, D]: layer l of segment s reads what layer l - `up` wrote `back` segments before.

    With the defaults the offsets are {(0, 1), (1, 0)}; states that no cell has written are zeros.
    """

    def __init__(self, n_layers: int = 3, back: int = 1, up: int = 0, d: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(d) for _ in range(n_layers))
        self.back, self.up = back, up

    def forward(self, x: Tensor) -> Tensor:
        zero = x.new_zeros(x.shape[0], x.shape[2])
        written: dict[tuple[int, int], Tensor] = {}
        out = []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            for l, layer in enumerate(self.layers):
                h, written[s, l] = layer(h, written.get((s - self.back, l - self.up), zero))
            out.append(h)
        return torch.cat(out, 1)


class Uneven(nn.Module):
    """As `Toy`, with feed-forward networks of these widths, and a head of so many outputs a segment."""

    def __init__(self, widths: Sequence[int], head: int = 0, d: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WideLayer(d, width) for width in widths)
        self.head = nn.Linear(d, head) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        states = [x.new_zeros(x.shape[0], x.shape[2]) for _ in self.layers]
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h, states[l])
            out.append(torch.tanh(self.head(h)))
        return torch.cat(out, 1)


class WideLayer(Layer):
    """A layer with a feed-forward network."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__(d)
        self.up, self.down = nn.Linear(d, width), nn.Linear(width, d)

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        x, m = super().forward(x, m)
        return x + self.down(torch.relu(self.up(x))), m


class AttributeState(nn.Module):
    """State in plain attributes that the forward resets and reassigns, with a Python flag and a counter."""

    def __init__(self, n_layers: int = 3, d: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AttributeLayer(d) for _ in range(n_layers))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            layer.reset()
        out = []
        for h in x.split(SEGMENT, 1):
            for layer in self.layers:
                h = layer(h)
            out.append(h)
        return {"all": torch.cat(out, 1), "last": out[-1]}


class AttributeLayer(nn.Module):
    """Skips its memory in the first segment, as ARMT does."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.inner = Layer(d)
        self.reset()

    def reset(self) -> None:
        self.first, self.count = True, 0
        self.memory = self.inner.mix.weight.new_zeros(1, self.inner.mix.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if not self.first:
            x = x + torch.sigmoid(self.memory)[:, None]
        x, self.memory = self.inner(x, self.memory)
        self.first = False
        self.count += 1
        return x


def made(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A model with random weights that depend on the seed alone, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().to(dtype).eval()


def features(segments: int, batch: int = 2, dtype: torch.dtype = torch.float64, d: int = WIDTH) -> Tensor:
    """Random f[batch, segments * SEGMENT, d]."""
    generator = torch.Generator().manual_seed(segments)
    return torch.randn(batch, segments * SEGMENT, d, generator=generator, dtype=torch.float64).to(dtype)


def assert_same(expected: Any, got: Any, tolerance: float | None = None) -> None:
    """Same structure and keys; tensors of one type, equal within their dtype's tolerance; the rest equal."""
    a, spec_a = pytree.tree_flatten(expected)
    b, spec_b = pytree.tree_flatten(got)
    assert spec_a == spec_b, f"{spec_a}\nis not\n{spec_b}"
    for x, y in zip(a, b, strict=True):
        if not isinstance(x, Tensor):
            assert type(x) is type(y) and x == y
            continue
        assert isinstance(y, Tensor)
        x, y = x.detach(), y.detach()
        assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
        if not x.is_floating_point():
            assert torch.equal(x, y)
            continue
        if not x.numel():
            continue
        if x.dtype == torch.float64:
            error = float((x - y).abs().max() / x.abs().max().clamp_min(1e-300))
        else:
            error = float((x - y).norm() / x.norm().clamp_min(1e-30))
        limit = TOLERANCE[x.dtype] if tolerance is None else tolerance
        assert error <= limit, f"relative error {error:.1e} > {limit:.0e}"


@torch.no_grad()
def assert_equal_runs(
    model: Any, fast: Any, inputs: Iterable[Tensor], tolerance: float | None = None
) -> None:
    """The optimized module gives what the model gives, for each input."""
    for x in inputs:
        assert_same(model(x), fast(x), tolerance)


def leave_quietly(destroys: bool = True) -> None:
    """End a rank that has done its work, without the end of the interpreter.

    Threads of gloo may still hold tensors then, and abort the process when they let them go
    (https://github.com/pytorch/pytorch/pull/179291).

    Args:
        destroys: whether the group is destroyed before, for which the other ranks have to be there.
    """
    if destroys:
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
