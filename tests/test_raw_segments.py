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
