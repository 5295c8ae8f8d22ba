"""Layers that read positions of their segment where it is a part of the input itself: these are numbered from
the start of the segment, as in any other layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, Layer, assert_same, made

import rmtcompile


class Reads(nn.Module):
    """`read(segment) -> f[B, D]`, which is added to the memory."""

    def __init__(self, read: Callable[[Tensor], Tensor], enter: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.read, self.enter = read, enter

    def forward(self, x: Tensor) -> Tensor:
        states, out = [x.new_zeros(x.shape[0], WIDTH)] * 3, []
        for h in self.enter(x).split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                first = self.read(h)
                h, states[l] = layer(h, states[l] + first)
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize("enter", [lambda x: x, torch.sin], ids=["input", "of the input"])
@pytest.mark.parametrize(
    "read",
    [
        lambda h: h[:, -1],
        lambda h: h[:, 0],
        lambda h: h[:, ::2].mean(1),
        lambda h: sum(h.unbind(1)),
        lambda h: h[:, 1:][:, -1] if h.shape[1] > 1 else h[:, 0],
    ],
    ids=["last", "first", "every second", "all", "behind the first"],
)
@torch.no_grad()
def test_positions_of_a_segment(read: Callable[[Tensor], Tensor], enter: Callable[[Tensor], Tensor]) -> None:
    model = made(lambda: Reads(read, enter))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for length in (12, 15, 11, 2, 3, 31):
        x = torch.randn(2, length, WIDTH, dtype=torch.float64)
        assert_same(model(x), fast(x))
    assert (fast.schedule.level_rule, fast.schedule.width) == ("s + l", 3)


class Shifted(nn.Module):
    """Segments of the input itself, each behind the last token of the one before."""

    def __init__(self, segment: int, cut: str) -> None:
        super().__init__()
        self.layers, self.mix = nn.ModuleList(Layer() for _ in range(3)), nn.Linear(WIDTH, WIDTH)
        self.segment, self.cut = segment, cut

    def forward(self, x: Tensor) -> Tensor:
        states, out, last = [x.new_zeros(x.shape[0], WIDTH)] * 3, [], x[:, :1] * 0
        n, starts = self.segment, range(0, x.shape[1], self.segment)
        parts = x.split(n, 1) if self.cut == "split" else [x[:, a : a + n] for a in starts]
        for part in parts:
            h = part + self.mix(torch.cat([last, part[:, :-1]], 1))
            last = part[:, -1:]
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h, states[l])
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize("cut", ["split", "slices"])
@pytest.mark.parametrize("segment", [2, 3])
@torch.no_grad()
def test_a_shift_of_tokens_in_parts(segment: int, cut: str) -> None:
    model = made(lambda: Shifted(segment, cut))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for length, border in ((12, 6), (14, 5), (12, 4)):
        x = torch.randn(2, length, WIDTH, dtype=torch.float64)
        assert_same(model(x), fast(x))
        first, state = fast.run(x[:, :border])
        second, _ = fast.run(x[:, border:], state=state)
        kept = first[:, : first.shape[1] - state.pending_tokens]
        assert_same(model(x), torch.cat([kept, second], 1))
