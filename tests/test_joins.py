"""Results that are joined, cut and joined again: joins in joins, empty parts, first segments that are short,
buffers that fill up and then slide; whole models, with and without gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, Layer, assert_equal_runs, assert_same, made

import rmtcompile

ENDS = (12, 3, 10, 31, 1)
"""Lengths: whole and ragged, of one and of many segments, shorter than one."""


class Joins(nn.Module):
    """Two layers over segments; subclasses say how these are cut and what is made of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.memory = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def cut(self, x: Tensor) -> list[Tensor]:
        return list(x.split(SEGMENT, 1))

    def enter(self, h: Tensor, s: int) -> Tensor:
        return h

    def leave(self, h: Tensor, s: int) -> Tensor:
        return h

    def join(self, out: list[Tensor], x: Tensor) -> Tensor:
        return self.head(torch.cat(out, 1))

    def forward(self, x: Tensor) -> Tensor:
        states, out = [x.new_zeros(x.shape[0], WIDTH)] * 2, []
        for s, h in enumerate(self.cut(x)):
            h = self.enter(h, s)
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h, states[l])
            out.append(self.leave(h, s))
        return self.join(out, x)


class JoinInJoin(Joins):
    def leave(self, h: Tensor, s: int) -> Tensor:
        return torch.cat([torch.cat([h, h[:, :1].sin()], 1), h[:, -1:]], 1)


class OtherAxis(Joins):
    def leave(self, h: Tensor, s: int) -> Tensor:
        return torch.cat([h, h.sin()], 2)

    def join(self, out: list[Tensor], x: Tensor) -> Tensor:
        return self.head(torch.cat(out, 1)[..., :WIDTH])


class Twice(Joins):
    def join(self, out: list[Tensor], x: Tensor) -> Tensor:
        whole = torch.cat(out, 1)
        return self.head(torch.cat([whole, whole], 1)).amax(-1)


class CutAgain(Joins):
    """A row-wise region over the join is a region over all batches in one axis."""

    def join(self, out: list[Tensor], x: Tensor) -> Tensor:
        return self.head(torch.cat(out, 1).transpose(0, 1).flatten(0, 1)).amax(-1)


class EmptyParts(Joins):
    def leave(self, h: Tensor, s: int) -> Tensor:
        return torch.cat([h[:, :0].sin(), h, h[:, 5:]], 1)


class EmptyFirst(Joins):
    """The first segment gives nothing, and what was joined before is a `tensor([])` without a shape."""

    def leave(self, h: Tensor, s: int) -> Tensor:
        return h[:, :0] if s == 0 else h

    def join(self, out: list[Tensor], x: Tensor) -> Tensor:
        return self.head(torch.cat([torch.tensor([]), *out], 1)).amax(-1)


class NormOfAll(JoinInJoin):
    """Whole-input operations behind the joins."""

    def join(self, out: list[Tensor], x: Tensor) -> Tensor:
        whole = self.head(torch.cat(out, 1))
        return (whole / whole.norm()).cumsum(1).flip(1)


class Right(Joins):
    """Aligned at the right, so that the first segment is the short one; memory is put behind each segment and
    cut off its result."""

    def borders(self, x: Tensor) -> list[tuple[int, int]]:
        cuts = sorted({0, *range(x.shape[1], 0, -SEGMENT)})
        return list(pairwise(cuts))

    def cut(self, x: Tensor) -> list[Tensor]:
        return [x[:, a:b] for a, b in self.borders(x)]

    def enter(self, h: Tensor, s: int) -> Tensor:
        return torch.cat([h, self.memory.expand(h.shape[0], -1, -1)], 1)

    def leave(self, h: Tensor, s: int) -> Tensor:
        return self.head(h)[:, :-2]

    def join(self, out: list[Tensor], x: Tensor) -> Tensor:
        whole = torch.cat(out, 1)
        return torch.cat([whole[:, a:b].cumsum(1) for a, b in self.borders(x)], 1)


class MaskInBlocks(Joins):
    """A mask of the whole input, joined of one piece a segment and cut into blocks."""

    def cut(self, x: Tensor) -> list[Tensor]:
        pieces = list(x.split(SEGMENT, 1))
        masks = [torch.cat([x.new_zeros(1), x.new_ones(h.shape[1] - 1)]) for h in pieces]
        rows = torch.cat(masks)
        whole = rows[:, None] + 2 * rows[None]
        starts = range(0, x.shape[1], SEGMENT)
        return [
            h + whole[a : a + h.shape[1], a : a + h.shape[1]].sum(1, keepdim=True)
            for a, h in zip(starts, pieces, strict=True)
        ]


MODELS: list[Callable[[], nn.Module]] = [
    JoinInJoin, OtherAxis, Twice, CutAgain, EmptyParts, EmptyFirst, NormOfAll, Right, MaskInBlocks,
]  # fmt: skip


def inputs(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("build", MODELS)
@torch.no_grad()
def test_every_length(build: Callable[[], nn.Module]) -> None:
    model = made(build)
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="eager")
    assert_equal_runs(model, fast, map(inputs, ENDS))


@pytest.mark.parametrize("build", [JoinInJoin, EmptyParts, NormOfAll, Right, MaskInBlocks])
def test_gradients(build: Callable[[], nn.Module]) -> None:
    model = made(build)
    other = copy.deepcopy(model)
    fast = rmtcompile.optimize(other, backend="eager")
    for length in (12, 10):
        x = inputs(length)
        expected, got = model(x), fast(x)
        assert_same(expected, got)
        weights = torch.randn_like(expected)
        theirs = torch.autograd.grad((expected * weights).sum(), list(model.parameters()), allow_unused=True)
        mine = torch.autograd.grad((got * weights).sum(), list(other.parameters()), allow_unused=True)
        assert_same(theirs, mine, 1e-9)


# ---- buffers that fill up ----------------------------------------------------------------------------------


class Buffer(nn.Module):
    """Attention to a buffer of a few segments that is filled and then slides."""

    held = 3

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))

    def put(self, buffer: Tensor, k: Tensor, s: int) -> Tensor:
        if s < self.held:
            return self.fill(buffer, k, s)
        return torch.cat([buffer[:, SEGMENT:], k], 1)

    def fill(self, buffer: Tensor, k: Tensor, s: int) -> Tensor:
        return buffer.slice_scatter(k, 1, s * SEGMENT, (s + 1) * SEGMENT)

    def forward(self, x: Tensor) -> Tensor:
        buffers, out = [x.new_zeros(x.shape[0], self.held * SEGMENT, WIDTH)] * 2, []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            for l, layer in enumerate(self.layers):
                q, k = layer(h).chunk(2, -1)
                buffers[l] = self.put(buffers[l], k, s)
                h = h + (q @ buffers[l].transpose(1, 2)).softmax(-1) @ buffers[l]
            out.append(h)
        return torch.cat(out, 1)


class IndexCopy(Buffer):
    def fill(self, buffer: Tensor, k: Tensor, s: int) -> Tensor:
        return buffer.index_copy(1, torch.arange(SEGMENT) + s * SEGMENT, k)


class IndexPut(Buffer):
    def fill(self, buffer: Tensor, k: Tensor, s: int) -> Tensor:
        buffer = buffer.clone()
        buffer[:, torch.arange(s * SEGMENT, (s + 1) * SEGMENT)] = k
        return buffer


class Assigned(Buffer):
    def fill(self, buffer: Tensor, k: Tensor, s: int) -> Tensor:
        buffer = buffer.clone()
        buffer[:, s * SEGMENT : (s + 1) * SEGMENT] = k
        return buffer


FILLS = [Buffer, IndexCopy, IndexPut, Assigned]


@pytest.mark.parametrize("build", FILLS)
@torch.no_grad()
def test_a_buffer_that_fills_up_and_then_slides(build: Any) -> None:
    model = made(build)
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="eager")
    assert_equal_runs(model, fast, [inputs(SEGMENT * n) for n in (7, 1, 3, 12)])


class Long(IndexCopy):
    """It begins to slide later than any capture shows."""

    held = 10


@torch.no_grad()
def test_what_slides_later_than_all_captures() -> None:
    """Up to ten segments there is nothing that slides."""
    model = made(Long)
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="eager")
    assert_equal_runs(model, fast, [inputs(SEGMENT * n) for n in (4, 9, 14, 40)])


class Reversed(Joins):
    """The last segment first."""

    def join(self, out: list[Tensor], x: Tensor) -> Tensor:
        return torch.cat([self.head(h) for h in reversed(out)], 1)


class Stacked(Joins):
    """A value of each segment, the last one first."""

    def join(self, out: list[Tensor], x: Tensor) -> Tensor:
        return torch.stack([h.mean(1) for h in out][::-1], 1)


class Skips(Layer):
    """Leaves the first segment as it is."""

    def forward(self, x: Tensor, m: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return (x, x.mean(1)) if m is None else super().forward(x, m)


class Untouched(nn.Module):
    """What is returned of the first segment no layer has seen."""

    def __init__(self, turn: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Skips() for _ in range(2))
        self.turn = turn

    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor | None] = [None, None]
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h, states[l])
            out.append(torch.cat([h.sin(), h.cos()], 2))
        return torch.cat(out[:: self.turn], 1)


@pytest.mark.parametrize(
    "build", [Reversed, Stacked, Untouched, lambda: Untouched(-1)], ids=["turned", "stack", "first", "both"]
)
@torch.no_grad()
def test_lists_that_end_with_the_first_segment(build: Callable[[], nn.Module]) -> None:
    model = made(build)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for length in (12, 10, 31, 12):
        x = torch.randn(2, length, WIDTH, dtype=torch.float64)
        assert_same(model(x), fast(x))
    assert fast.schedule.width == 2
