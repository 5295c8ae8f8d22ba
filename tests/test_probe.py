"""rmtcompile/frontend/probe.py: however a forward cuts its input, the axis and the length are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import rmtcompile
from rmtcompile.errors import PartitionError
from rmtcompile.frontend.probe import probe, recounted
from rmtcompile.ir.segmentation import Axis, Segmentation


def sliced(x: Tensor) -> Tensor:
    return torch.cat([x[:, i : i + 3].sin() for i in range(0, x.shape[1], 3)], 1)


def split(x: Tensor) -> Tensor:
    return torch.cat([piece.sin() for piece in x.split(3, 1)], 1)


def narrowed(x: Tensor) -> Tensor:
    return torch.cat([x.narrow(1, i, 3).sin() for i in range(0, x.shape[1], 3)], 1)


def unfolded(x: Tensor) -> Tensor:
    pieces = x.unflatten(1, (-1, 3))
    return torch.cat([pieces[:, i].sin() for i in range(pieces.shape[1])], 1)


def embedded(x: Tensor) -> Tensor:
    h = x.sin() * 2
    return torch.cat([piece.cos() for piece in h.split(3, 1)], 1)


@pytest.mark.parametrize("fn", [sliced, split, narrowed, unfolded, embedded])
@pytest.mark.parametrize("length", [12, 6, 3])
def test_ways_to_cut(fn: Callable[[Tensor], Tensor], length: int) -> None:
    assert probe(fn, (torch.randn(2, length, 4),), {}) == Segmentation((Axis(0, 1, 3),))


@pytest.mark.parametrize("fn", [sliced, split])
@pytest.mark.parametrize("length", [1, 2, 7, 11])
def test_lengths_that_are_no_multiple(fn: Callable[[Tensor], Tensor], length: int) -> None:
    assert probe(fn, (torch.randn(2, length, 4),), {}) == Segmentation((Axis(0, 1, 3),))


def test_one_step_a_segment() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.stack([step.sin() for step in x.unbind(1)], 1)

    assert probe(fn, (torch.randn(2, 5, 4),), {}) == Segmentation((Axis(0, 1, 1),))


def walked(h: Tensor) -> Tensor:
    return torch.stack([h[:, t].sin() for t in range(h.shape[1])], 1)


def swapped(h: Tensor) -> Tensor:
    half = h.shape[-1] // 2
    return torch.cat([-h[..., half:], h[..., :half]], -1)


def projected(h: Tensor) -> Tensor:
    q, k, v = F.linear(h, torch.ones(24, 8)).chunk(3, -1)
    return q * k + v


@pytest.mark.parametrize("layer", [walked, swapped, projected])
@pytest.mark.parametrize("length", [8, 16, 24, 32])
@pytest.mark.parametrize("is_embedded", [True, False])
def test_cuts_inside_of_a_segment(
    layer: Callable[[Tensor], Tensor], length: int, is_embedded: bool
) -> None:
    """Eight features and segments of eight, so that cuts of one look like cuts of the other."""

    def fn(x: Tensor) -> Tensor:
        table = torch.ones(9, 8)
        parts = [F.embedding(part, table) if is_embedded else part * 2 for part in x.split(8, 1)]
        return torch.cat([layer(part) for part in parts], 1)

    x = torch.zeros(2, length, dtype=torch.long) if is_embedded else torch.randn(2, length, 8)
    assert probe(fn, (x,), {}) == Segmentation((Axis(0, 1, 8),))


@pytest.mark.parametrize("length", [16, 24, 32, 40])
def test_batches_as_large_as_other_axes(length: int) -> None:
    """Eight inputs and eight features; a longer batch may be as long as the inputs are."""

    def rotated(h: Tensor) -> Tensor:
        low, high = h[..., :4], h[..., 4:]
        return torch.cat([-high, low], -1)

    def fn(x: Tensor) -> Tensor:
        h = F.embedding(x, torch.ones(9, 8))
        return torch.cat([rotated(h[:, i : i + 8].sin()) for i in range(0, h.shape[1], 8)], 1)

    assert probe(fn, (torch.zeros(8, length, dtype=torch.long),), {}) == Segmentation((Axis(0, 1, 8),))


def test_first_axis() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.cat([piece.sin() for piece in x.split(3)])

    assert probe(fn, (torch.randn(9, 2),), {}) == Segmentation((Axis(0, 0, 3),))


def test_partners_are_cut_alike() -> None:
    def fn(ids: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        pieces = [slice(i, i + 3) for i in range(0, ids.shape[1], 3)]
        return torch.cat([F.embedding(ids[:, p], table) * mask[:, p, None] for p in pieces], 1)

    ids, mask = torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, 9)
    found = probe(fn, (ids,), {"mask": mask, "table": torch.randn(5, 4)})
    assert set(found.axes) == {Axis(0, 1, 3), Axis(1, 1, 3)}


def test_override() -> None:
    def fn(x: Tensor) -> Tensor:
        return x.sin()

    assert probe(fn, (torch.randn(2, 12, 4),), {}, 4) == Segmentation((Axis(0, 1, 4),))


def test_nothing_is_cut() -> None:
    with pytest.raises(PartitionError) as caught:
        probe(lambda x: x.sin(), (torch.randn(2, 6),), {})
    lines = str(caught.value).splitlines()
    assert lines[0] == "the forward does not cut any of its inputs into segments"
    assert lines[1] == "  input 0: shape (2, 6)"
    assert "segment_size=" in lines[2]


def test_a_forward_without_cuts_is_not_walked_ever_longer() -> None:
    """Pieces of what is one token longer than the input are not seen."""
    lengths = []

    def prefixed(x: Tensor) -> Tensor:
        lengths.append(x.shape[1])
        x = torch.cat([x[:, :1] * 0, x], 1)
        return torch.cat([piece.sin() for piece in x.split(3, 1)], 1)

    with pytest.raises(PartitionError, match="does not cut"):
        probe(prefixed, (torch.zeros(2, 20, 4),), {})
    assert lengths == [20, 80, 320]


def test_operations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(x: Tensor) -> Tensor:
        while True:
            x = x.sin()

    monkeypatch.setattr("rmtcompile.frontend.views.MOST", 100)
    with pytest.raises(PartitionError, match="does not cut"):
        probe(endless, (torch.zeros(2, 20, 4),), {})


def test_no_tensor_at_all() -> None:
    with pytest.raises(PartitionError):
        probe(lambda: torch.zeros(1), (), {})


def test_values_are_not_computed() -> None:
    calls: list[Any] = []

    def fn(x: Tensor) -> Tensor:
        calls.append(type(x).__name__)
        return sliced(x)

    probe(fn, (torch.randn(2, 6),), {})
    assert set(calls) == {"FakeTensor"}


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 5), st.integers(1, 8))
def test_counts_and_shapes(length: int, whole: int, rest: int, wanted: int) -> None:
    rest %= length
    segmentation = Segmentation((Axis(0, 1, length), Axis(1, 0, 2 * length)))
    total = whole * length + rest
    shapes = [torch.Size((2, total)), torch.Size((2 * total, 3))]
    count = whole + (rest > 0)
    assert segmentation.count(shapes) == (count, rest)
    assert segmentation.shapes(shapes, count) == shapes
    resized = segmentation.shapes(shapes, wanted)
    if wanted > 1 or not rest:
        assert segmentation.count(resized)[0] == wanted
    assert segmentation.shapes(resized, count) == shapes


@pytest.mark.parametrize("length", [3, 2, 12])
def test_halves_of_features_are_no_segments(length: int) -> None:
    """One segment is not cut at all, and what it is made of is."""

    def halves(x: Tensor) -> Tensor:
        out = []
        for piece in x.split(3, 1):
            a, b = piece.chunk(2, -1)
            out.append(torch.cat([-b, a], -1) * torch.linspace(0, 1, 4, dtype=x.dtype))
        return torch.cat(out, 1)

    assert probe(halves, (torch.randn(2, length, 4),), {}) == Segmentation((Axis(0, 1, 3),))


@pytest.mark.parametrize("batch", [3, 12, 2])
def test_a_batch_as_large_as_a_text_is_long(batch: int) -> None:
    """Layers that walk the tokens of the only segment, and features as many as there are tokens."""

    def walked(x: Tensor) -> Tensor:
        out = []
        for piece in (2 * x).split(3, 1):
            out += [token.sin() for token in piece.unbind(1)]
        return torch.stack(out, 1)

    assert probe(walked, (torch.randn(batch, 3, 4),), {}) == Segmentation((Axis(0, 1, 3),))


def test_one_token_and_its_mask() -> None:
    def masked(x: Tensor, mask: Tensor) -> Tensor:
        pieces = zip(x.split(2, 1), mask.split(2, 1), strict=True)
        return torch.cat([piece * m[..., None] for piece, m in pieces], 1)

    found = probe(masked, (torch.randn(2, 1, 4), torch.ones(2, 1)), {})
    assert {(axis.leaf, axis.dim, axis.length) for axis in found.axes} == {(0, 1, 2), (1, 1, 2)}


class Ends(nn.Module):
    """Cuts both ends off its segments of two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        last, out = x[:, :1] * 0, []
        for start in range(0, x.shape[1], 2):
            h = x[:, start : start + 2]
            last, h = h[:, -1:], torch.cat([last, h[:, :-1]], 1)
            for layer in self.layers:
                h = layer(h)
            out.append(h)
        return torch.cat(out, 1)


def test_segments_are_counted_by_the_calls_of_layers() -> None:
    model, args = Ends(), (torch.randn(2, 8, 4),)
    short = Segmentation((Axis(0, 1, 1),))
    assert recounted(model, args, {}, short) == Segmentation((Axis(0, 1, 2),))
    assert recounted(model, args, {}, Segmentation((Axis(0, 1, 2),))) is None
    assert recounted(split, (torch.randn(2, 12, 4),), {}, short) is None


class Remembers(nn.Module):
    """Its memories are an argument, one a layer, taken apart before the text is cut."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.dim = dim

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        memories, outs = list(memory.unbind(self.dim)), []
        for h in x.split(6, 1):
            for i, mix in enumerate(self.mix):
                h = torch.tanh(mix(h) + memories[i])
                memories[i] = h.mean(1, keepdim=True)
            outs.append(h)
        return torch.cat(outs, 1), torch.stack(memories, self.dim)


class RemembersFirst(Remembers):
    """The same with the memories as first argument."""

    def forward(self, memory: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x, memory)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("segments", [3, 5])
@torch.no_grad()
def test_layers_take_a_memory_apart_before_the_text_is_cut(dim: int, segments: int) -> None:
    x = torch.randn(2, 6 * segments, 4, dtype=torch.float64)
    memory = torch.randn((3, 2, 1, 4) if dim == 0 else (2, 3, 1, 4), dtype=torch.float64)
    for build, args in ((Remembers, (x, memory)), (RemembersFirst, (memory, x))):
        model = build(dim).double()
        found = probe(model, args, {})
        assert [(axis.leaf, axis.dim, axis.length) for axis in found.axes] == [(int(args[1] is x), 1, 6)]
        for one, other in zip(model(*args), rmtcompile.optimize(model)(*args), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


class Numbered(nn.Module):
    """Each segment takes its part of the positions, which have no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.pos, self.mix = nn.Embedding(20, 4), nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        memory, out = torch.zeros(ids.shape[0], 1, 4, dtype=self.mix.weight.dtype), []
        for i, p in zip(ids.split(6, 1), positions.split(6), strict=False):
            h = torch.tanh(self.mix(self.emb(i) + self.pos(p)) + memory)
            memory = h.mean(1, keepdim=True)
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize("tokens", [4, 6, 12, 15, 18])
def test_positions_without_a_batch(tokens: int) -> None:
    ids, positions = torch.randint(20, (2, tokens)), torch.arange(tokens) % 6
    found = probe(Numbered(), (ids, positions), {})
    assert [(axis.leaf, axis.dim, axis.length) for axis in found.axes] == [(0, 1, 6), (1, 0, 6)]


class Placed(Numbered):
    """The positions come first, and are looked up as a whole."""

    def forward(self, positions: Tensor, ids: Tensor) -> Tensor:
        h = self.emb(ids) + self.pos(positions)
        return torch.cat([torch.tanh(self.mix(x)) for x in h.split(6, 1)], 1)


@pytest.mark.parametrize("tokens", [4, 12, 15, 30])
def test_positions_in_front_of_the_text(tokens: int) -> None:
    found = probe(Placed(), (torch.arange(tokens) % 6, torch.randint(20, (2, tokens))), {})
    assert {(axis.leaf, axis.dim, axis.length) for axis in found.axes} == {(0, 0, 6), (1, 1, 6)}


@pytest.mark.parametrize("length", [None, 6])
def test_as_many_texts_as_memories(length: int | None) -> None:
    """Memories [L, B, ...] and [B, L, ...] in front of the text, with a batch of L, and the length given."""
    for dim, batch in ((0, 3), (1, 3), (1, 2)):
        memory = torch.randn(3, batch, 1, 4) if dim == 0 else torch.randn(batch, 3, 1, 4)
        args = memory, torch.randn(batch, 24, 4)
        assert probe(RemembersFirst(dim), args, {}, length).axes == (Axis(1, 1, 6),)


class Weighed(Numbered):
    """What has one number a text is no position."""

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        out = [self.mix(self.emb(i)) * weights[:, None, None] for i in ids.split(6, 1)]
        return torch.cat(out, 1)


@pytest.mark.parametrize("tokens", [6, 12])
def test_weights_of_texts_are_no_positions(tokens: int) -> None:
    for batch in (3, 12):
        found = probe(Weighed(), (torch.randint(20, (batch, tokens)), torch.rand(batch)), {})
        assert [(axis.leaf, axis.dim, axis.length) for axis in found.axes] == [(0, 1, 6)]


class Chunks(Remembers):
    """Its memories are an argument that is cut into as many chunks as there are layers."""

    def forward(self, memory: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        memories, outs = list(memory.chunk(3, 1)), []
        for h in x.split(6, 1):
            for i, mix in enumerate(self.mix):
                h = torch.tanh(mix(h) + memories[i][:, 0])
                memories[i] = h.mean(1, keepdim=True)[:, None]
            outs.append(h)
        return torch.cat(outs, 1), torch.cat(memories, 1)


@pytest.mark.parametrize("tokens", [4, 6, 12, 20])
@torch.no_grad()
def test_a_memory_in_front_of_the_text(tokens: int) -> None:
    x, positions = torch.randn(2, tokens, 4, dtype=torch.float64), torch.rand(2, tokens).double()

    class Placed(RemembersFirst):
        def forward(self, memory: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(memory, x + positions.sin()[..., None])

    cases: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
        (RemembersFirst(0), (torch.randn(3, 2, 1, 4), x)),
        (Placed(1), (torch.randn(2, 3, 1, 4), x, positions)),
        (Chunks(1), (torch.randn(2, 3, 1, 4), x)),
    ]
    for model, (memory, *rest) in cases:
        args = memory.double(), *rest
        assert probe(model.double(), args, {}).axes[0] == Axis(1, 1, 6)
        fast = rmtcompile.optimize(model)
        for one, other in zip(model(*args), fast(*args), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
