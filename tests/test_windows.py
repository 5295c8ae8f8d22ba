"""Memories of the last few segments: what is cut and put together anew in each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rmtcompile

VOCAB, WIDTH, LAYERS = 32, 8, 3


class Segments(nn.Module):
    """Embed a segment, run the layers with a state each, head.

    Attributes:
        size: positions of a segment.
    """

    size = 3

    def __init__(self, n_layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.layers = nn.ModuleList(self.layer() for _ in range(n_layers))

    def layer(self) -> nn.Module:
        raise NotImplementedError

    def start(self, ids: Tensor) -> Any:
        raise NotImplementedError

    def zeros(self, ids: Tensor, n: int) -> Tensor:
        return torch.zeros(ids.shape[0], n, WIDTH, dtype=self.head.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        states, out = [self.start(ids)] * len(self.layers), []
        for segment in ids.split(self.size, 1):
            x = self.emb(segment)
            for i, layer in enumerate(self.layers):
                x, states[i] = layer(x, states[i])
            out.append(self.head(x))
        return torch.cat(out, 1)


class Attention(nn.Module):
    """A layer that attends to what it is given: (x, memory) -> x'."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        seen = torch.cat([memory, x], 1)
        return x + self.o(torch.softmax(self.q(x) @ seen.transpose(1, 2), -1) @ seen)


# ---- windows that layers keep of their inputs: all segments of a layer at once -------------------------


class Kept(Attention):
    """Transformer-XL with a memory of two segments, kept by the layer."""

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x, memory), torch.cat([memory, x], 1)[:, -2 * Segments.size :]


class TwoSegments(Segments):
    def layer(self) -> nn.Module:
        return Kept()

    def start(self, ids: Tensor) -> Tensor:
        return self.zeros(ids, 2 * self.size)


class MovedOutside(Segments):
    """The same with the memories moved in the model's loop, without gradients, as Transformer-XL does it."""

    segments = 2

    def layer(self) -> nn.Module:
        return Attention()

    def forward(self, ids: Tensor) -> Tensor:
        n, out = self.segments * self.size, []
        memories = [self.zeros(ids, n)] * len(self.layers)
        for segment in ids.split(self.size, 1):
            x = self.emb(segment)
            for i, layer in enumerate(self.layers):
                with torch.no_grad():
                    moved = torch.cat([memories[i], x], 1)[:, -n:]
                x, memories[i] = layer(x, memories[i]), moved
            out.append(self.head(x))
        return torch.cat(out, 1)


class MovedTogether(Segments):
    """Memories of all layers are moved together behind each segment, with gradients; three segments each."""

    def layer(self) -> nn.Module:
        return Attention()

    def forward(self, ids: Tensor) -> Tensor:
        n, out = 3 * self.size, []
        memories = [self.zeros(ids, n)] * len(self.layers)
        for segment in ids.split(self.size, 1):
            x, inputs = self.emb(segment), []
            for layer, memory in zip(self.layers, memories, strict=True):
                inputs.append(x)
                x = layer(x, memory)
            pairs = zip(memories, inputs, strict=True)
            memories = [torch.cat([old, new], 1)[:, new.shape[1] :] for old, new in pairs]
            out.append(self.head(x))
        return torch.cat(out, 1)


# ---- windows of what a layer computes, longer than what is captured: a carry -------------------------


class Shifted(nn.Module):
    """Keeps its last five inputs in place: (x, kept) -> (x', kept')."""

    length = 5

    def __init__(self) -> None:
        super().__init__()
        self.k, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        full = torch.cat([kept, self.k(x)], 1)
        return x + self.o(torch.tanh(full.mean(1, keepdim=True))), full[:, -self.length :]


class Steps(Segments):
    """Steps of one token."""

    size = 1

    def layer(self) -> nn.Module:
        return Shifted()

    def start(self, ids: Tensor) -> Tensor:
        return self.zeros(ids, Shifted.length)


class Written(Shifted):
    """A buffer of nine inputs that is rolled, and written at its end; a short convolution over it."""

    length = 9

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.randn(self.length, WIDTH) / 3)

    def forward(self, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        kept = kept.roll(-1, 1)
        kept[:, -1:] = self.k(x)
        return x + self.o(torch.tanh((kept * self.taps).sum(1, keepdim=True))), kept


class Rolled(Steps):
    def layer(self) -> nn.Module:
        return Written()

    def start(self, ids: Tensor) -> Tensor:
        return self.zeros(ids, Written.length)


class Pooled(nn.Module):
    """One vector of each of the last seven segments, in a stack: (x, memory) -> (x', memory')."""

    length = 7

    def __init__(self) -> None:
        super().__init__()
        self.v, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        y = x + self.o(torch.softmax(x @ memory.transpose(1, 2), -1) @ memory)
        return y, torch.cat([memory[:, 1:], torch.tanh(self.v(y.mean(1, keepdim=True)))], 1)


class Pools(Segments):
    def layer(self) -> nn.Module:
        return Pooled()

    def start(self, ids: Tensor) -> Tensor:
        return self.zeros(ids, Pooled.length)


INPUTS: list[type[Segments]] = [TwoSegments, MovedOutside, MovedTogether]
COMPUTED: list[type[Segments]] = [Steps, Rolled, Pools]


# ---- lists of the last seven segments, longer than what is captured at first ------------------


class Remembers(Attention):
    """Attends to a list of memories and adds one to it: (x, memories) -> (x', memories')."""

    def forward(self, x: Tensor, memories: list[Tensor]) -> tuple[Tensor, list[Tensor]]:  # type: ignore[override]
        y = super().forward(x, torch.cat(memories, 1)) if memories else x + self.o(x)
        return y, [*memories, torch.tanh(y)][-7:]


class FillsUp(Segments):
    def layer(self) -> nn.Module:
        return Remembers()

    def start(self, ids: Tensor) -> list[Tensor]:
        return []


class Filled(FillsUp):
    def start(self, ids: Tensor) -> list[Tensor]:
        return [self.zeros(ids, self.size)] * 7


def tokens(model: Segments, segments: int, rest: int = 0, batch: int = 2) -> Tensor:
    return torch.randint(VOCAB, (batch, segments * model.size + rest))


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", INPUTS)
def test_all_segments_of_a_layer_at_once(make: type[Segments]) -> None:
    model = make().double()
    fast = rmtcompile.optimize(model)
    for segments in (7, 1, 2, 4, 12):
        ids = tokens(model, segments)
        assert_equal(fast(ids), model(ids))
    assert fast.schedule.level_rule == "l" and fast.schedule.n_levels == LAYERS
    assert all(dl > 0 for _, dl in fast.schedule.offsets)


@pytest.mark.parametrize("make", COMPUTED)
def test_a_window_longer_than_captures_is_a_carry(make: type[Segments]) -> None:
    model = make().double()
    fast = rmtcompile.optimize(model)
    for segments in (7, 1, 2, 5, 12):
        ids = tokens(model, segments)
        assert_equal(fast(ids), model(ids))
    assert fast.schedule.level_rule == "s + l" and fast.schedule.width == LAYERS
    assert set(fast.schedule.offsets) == {(0, 1), (1, 0)}


@pytest.mark.parametrize("make", [FillsUp, Filled])
def test_lists_that_are_full_after_seven_segments(make: type[Segments]) -> None:
    model = make().double()
    fast = rmtcompile.optimize(model)
    for segments in (13, 4, 9):
        ids = tokens(model, segments)
        assert_equal(fast(ids), model(ids))
    assert fast.schedule.level_rule == "s + l" and fast.schedule.width == LAYERS


@pytest.mark.parametrize("make", INPUTS + COMPUTED)
def test_gradients(make: type[Segments]) -> None:
    model = make().double()
    fast = rmtcompile.optimize(model)
    ids = tokens(model, 6)
    wanted = torch.autograd.grad(model(ids).square().mean(), list(model.parameters()))
    found = torch.autograd.grad(fast(ids).square().mean(), list(model.parameters()))
    for mine, theirs in zip(found, wanted, strict=True):
        assert_equal(mine, theirs)


@pytest.mark.parametrize("make", [MovedOutside, Pools])
def test_a_short_last_segment(make: type[Segments]) -> None:
    model = make().double()
    fast = rmtcompile.optimize(model)
    for segments, rest in ((6, 2), (2, 2), (9, 2)):
        ids = tokens(model, segments, rest)
        assert_equal(fast(ids), model(ids))


@pytest.mark.parametrize("make", [MovedOutside, Steps])
def test_in_parts(make: type[Segments]) -> None:
    model = make().double()
    fast = rmtcompile.optimize(model)
    ids = tokens(model, 12)
    expected, state = model(ids), None
    for lo, hi in ((0, 5), (5, 6), (6, 12)):
        lo, hi = lo * model.size, hi * model.size
        pending = 0 if state is None else state.pending_tokens
        found, state = fast.run(ids[:, lo:hi], state=state)
        assert_equal(found, expected[:, lo - pending : hi])


class LastResults(Pools):
    """Returns what the last `kept` segments gave, cut in each of them."""

    kept = 1

    def forward(self, ids: Tensor) -> Tensor:
        states, last = [self.start(ids)] * len(self.layers), None
        for segment in ids.split(self.size, 1):
            x = self.emb(segment)
            for i, layer in enumerate(self.layers):
                x, states[i] = layer(x, states[i])
            last = x if last is None else torch.cat([last, x], 1)[:, -self.kept * self.size :]
        return last


@pytest.mark.parametrize("kept", [1, 3])
def test_results_of_the_last_segments_alone(kept: int) -> None:
    """With a short last segment they begin in the midst of one."""
    model = LastResults().double()
    model.kept = kept
    fast = rmtcompile.optimize(model)
    for segments, rest in ((6, 2), (2, 2), (1, 1), (7, 0)):
        ids = tokens(model, segments, rest)
        assert_equal(fast(ids), model(ids))


def test_one_layer_and_fewer_segments_than_layers() -> None:
    for make, n_layers in ((TwoSegments, 1), (TwoSegments, 4), (Steps, 1), (Steps, 5)):
        model = make(n_layers).double()
        fast = rmtcompile.optimize(model)
        for segments in (7, 4, 3):
            ids = tokens(model, segments, batch=1)
            assert_equal(fast(ids), model(ids))


WIDTH = 8


class Behind(nn.Module):
    """Each layer reads what it has kept some segments before, or the last few; fewer at first."""

    def __init__(self, how: str, back: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.how, self.back = how, back

    def forward(self, x: Tensor) -> Tensor:
        kept: list[list[Tensor]] = [[] for _ in self.layers]
        out = []
        for h in x.split(3, 1):
            n = h.shape[1]
            for i, layer in enumerate(self.layers):
                found = kept[i][-self.back :]
                if self.how == "one" and len(found) == self.back:
                    h = torch.cat([found[0], h], 1)
                elif self.how == "all" and found:
                    h = torch.cat([*found, h], 1)
                h = h[:, -n:] + torch.tanh(layer(h)).mean(1, keepdim=True)
                kept[i].append(h.mean(1, keepdim=True))
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize("back", [2, 3])
@torch.no_grad()
def test_what_was_kept_some_segments_before_is_seen_where_no_value_shows_it(back: int) -> None:
    """A first call with zeros: longer captures are asked for, not the values of a longer input."""
    model = Behind("one", back).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
        if parameter.dim() == 1:
            torch.nn.init.zeros_(parameter)
    fast = rmtcompile.optimize(model)
    for x in (torch.zeros(2, 24, WIDTH), torch.randn(2, 24, WIDTH), torch.randn(2, 36, WIDTH)):
        torch.testing.assert_close(fast(x.double()), model(x.double()), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_a_window_that_is_full_before_a_short_last_segment_does_not_grow() -> None:
    model = Behind("all", 3).double()
    fast = rmtcompile.optimize(model)
    for length in (24, 11, 14, 26, 8):
        x = torch.randn(2, length, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-12)
