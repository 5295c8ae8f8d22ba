"""Rules that repeat every few segments: so many of them are taken as one."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rmtcompile
from rmtcompile.errors import RerollError

VOCAB, WIDTH, LAYERS, SIZE = 32, 8, 3, 3


class Layer(nn.Module):
    """Reads a matrix, and says what it would add to it: (x, w) -> (x', addition)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x + torch.tanh(self.q(x)) @ w
        return y, torch.tanh(self.k(y)).transpose(1, 2) @ y / 8


class Periodic(nn.Module):
    """Two matrices a layer; what happens to them depends on the number of the segment."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        zeros = torch.zeros(ids.shape[0], WIDTH, WIDTH, dtype=self.head.weight.dtype)
        states: list[Any] = [(zeros, zeros)] * LAYERS
        out = []
        for s, segment in enumerate(ids.split(SIZE, 1)):
            x = self.enter(self.emb(segment), out)
            for i, layer in enumerate(self.layers):
                x, new = layer(x, states[i][0])
                states[i] = self.after(s, *states[i], new)
            out.append(x)
        return torch.cat([self.head(x) for x in out], 1)

    def enter(self, x: Tensor, out: list[Tensor]) -> Tensor:
        return x

    def after(self, s: int, a: Tensor, b: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class EverySecond(Periodic):
    """What two segments have gathered is written at once."""

    def after(self, s: int, a: Tensor, b: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        b = b + new
        return (a - b, b * 0) if s % 2 else (a, b)


class Forgets(Periodic):
    """At every third segment a part is forgotten, and the rest squashed."""

    def after(self, s: int, a: Tensor, b: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.tanh(a) / 2 + new, b) if s % 3 == 2 else (a + new, b)


class InTurn(Periodic):
    """Two memories that are read in turn."""

    def after(self, s: int, a: Tensor, b: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        return b + new.sin() if s % 2 else b * 0.5 - new, a


class FromTheTop(EverySecond):
    """The last layer feeds the first one of the next segment."""

    def enter(self, x: Tensor, out: list[Tensor]) -> Tensor:
        return x + out[-1].mean(1, keepdim=True) if out else x


class Seldom(Periodic):
    """Repeats after seven segments."""

    def after(self, s: int, a: Tensor, b: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.tanh(a), b) if s * s % 7 in (1, 2) else (a + new, b)


MODELS: list[tuple[type[Periodic], int]] = [(EverySecond, 2), (Forgets, 3), (InTurn, 2)]


def tokens(segments: int, rest: int = 0) -> Tensor:
    return torch.randint(VOCAB, (2, segments * SIZE + rest))


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("make", "period"), MODELS)
def test_any_number_of_segments(make: type[Periodic], period: int) -> None:
    model = make().double()
    fast = rmtcompile.optimize(model)
    for segments in (12, 7, 1, 2, 3, 11, 13):
        ids = tokens(segments)
        assert_equal(fast(ids), model(ids))
        assert fast.schedule.n_segments == -(-segments // period)
    assert fast.schedule.level_rule == "s + l" and fast.schedule.width == LAYERS


@pytest.mark.parametrize(("make", "period"), MODELS)
def test_gradients(make: type[Periodic], period: int) -> None:
    model = make().double()
    fast, ids = rmtcompile.optimize(model), tokens(7)
    wanted = torch.autograd.grad(model(ids).square().mean(), list(model.parameters()))
    found = torch.autograd.grad(fast(ids).square().mean(), list(model.parameters()))
    for mine, theirs in zip(found, wanted, strict=True):
        assert_equal(mine, theirs)


def test_short_last_segments() -> None:
    model = EverySecond().double()
    fast = rmtcompile.optimize(model)
    for segments, rest in ((8, 2), (7, 2), (8, 1), (7, 1), (1, 2), (10, 2), (9, 1)):
        ids = tokens(segments, rest)
        assert_equal(fast(ids), model(ids))


@pytest.mark.parametrize(("make", "period"), MODELS)
@torch.no_grad()
def test_texts_in_parts(make: type[Periodic], period: int) -> None:
    """A border may lie anywhere, also within the segments that are taken as one."""
    model = make().double()
    fast = rmtcompile.optimize(model)
    texts = (tokens(8), range(1, 24, 2)), (tokens(7), (2, 9, 12, 20)), (tokens(9, 1), (3, 25, 27))
    for ids, borders in texts:
        expected = model(ids)
        for border in borders:
            first, state = fast.run(ids[:, :border])
            kept = first[:, : first.shape[1] - state.pending_tokens]
            second, _ = fast.run(ids[:, border:], state=state)
            assert_equal(torch.cat([kept, second], 1), expected)


@torch.no_grad()
def test_documents() -> None:
    model = EverySecond().double()
    texts = [tokens(8), tokens(3), tokens(5, 1), tokens(2)]
    for found, text in zip(rmtcompile.optimize(model).map(texts), texts, strict=True):
        assert_equal(found, model(text))


def test_layers_that_wait_for_what_is_behind_them_have_no_rules() -> None:
    model = FromTheTop().double()
    fast = rmtcompile.optimize(model)
    circle = pytest.raises(RerollError, match=r"2 segments at a time: .* in a circle")
    with pytest.warns(rmtcompile.SequentialScheduleWarning), circle:
        fast.run(tokens(8))
    ids = tokens(8)
    with pytest.warns(rmtcompile.SequentialScheduleWarning):
        assert_equal(fast(ids), model(ids))


def test_what_repeats_too_seldom_has_programs_for_each_number(caplog: pytest.LogCaptureFixture) -> None:
    """Of segments; the log says so, a number that came before costs nothing, gradients are the model's."""
    model = Seldom().double()
    fast = rmtcompile.optimize(model)
    with pytest.raises(RerollError):
        fast.run(tokens(16))
    for segments, captures in ((16, 1), (11, 1), (16, 0)):
        before, ids = fast.captures, tokens(segments)
        with caplog.at_level(logging.WARNING, "rmtcompile"):
            caplog.clear()
            assert_equal(fast(ids), model(ids))
        assert fast.captures - before == captures
        said = f"this program is for {segments} segments alone" in caplog.text
        assert said == bool(captures)
    assert fast.schedule.width == LAYERS
    ids = tokens(11)
    wanted = torch.autograd.grad(model(ids).square().mean(), list(model.parameters()))
    found = torch.autograd.grad(fast(ids).square().mean(), list(model.parameters()))
    for mine, theirs in zip(found, wanted, strict=True):
        assert_equal(mine, theirs)
    with pytest.raises(RerollError):
        fast(tokens(60))


class WarmsUp(nn.Module):
    """Writes at every segment first, then at every second or third one; a layer is a linear of each list."""

    def __init__(self, warm: int, period: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.warm, self.period = warm, period
        self.feed, self.read, self.write, self.gate = (
            nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        memory, out = [x.new_zeros(x.shape[0], 1, WIDTH)] * 2, []
        for s, h in enumerate(x.split(SIZE, 1)):
            for i in range(2):
                h = torch.tanh(h + self.read[i](memory[i]) + self.feed[i](h))
                if s < self.warm or s % self.period == 1:
                    memory[i] = self.after(i, h, memory[i])
            out.append(h)
        return torch.cat(out, 1)

    def after(self, i: int, h: Tensor, memory: Tensor) -> Tensor:
        return 0 + torch.tanh(self.write[i](h)).mean(1, keepdim=True)


class WarmsUpGated(WarmsUp):
    def after(self, i: int, h: Tensor, memory: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate[i](h.mean(1, keepdim=True)))
        return gate * memory + (1 - gate) * super().after(i, h, memory)


class Gated(nn.Module):
    """Reads a memory, and says what would be written there: (x, memory) -> (x', memory')."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.gate = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def written(self, x: Tensor, memory: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x.mean(1, keepdim=True)))
        return gate * memory + (1 - gate) * torch.tanh(self.k(x).mean(1, keepdim=True))

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.q(memory), self.written(x, memory)


class Swaps(nn.Module):
    """Two memories a layer, each read for two segments while the other is written; what a cell would write
    into the one that it reads is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cells = nn.ModuleList(Gated() for _ in range(2))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        a = [x.new_zeros(x.shape[0], 1, WIDTH)] * 2
        b = [x.new_ones(x.shape[0], 1, WIDTH)] * 2
        out = []
        for s, h in enumerate(x.split(SIZE, 1)):
            for i, cell in enumerate(self.cells):
                if (s // 2) % 2:
                    h, a[i] = cell(h, b[i])[0], cell.written(h, a[i])
                else:
                    h, b[i] = cell(h, a[i])[0], cell.written(h, b[i])
                h = h + self.feed[i](h)
            out.append(h)
        return torch.cat(out, 1)


@torch.no_grad()
def test_memories_whose_roles_are_exchanged() -> None:
    """Regression: cells of one code, each with another value that is the same for all segments, had one."""
    model = Swaps().double()
    fast = rmtcompile.optimize(model)
    for segments in (13, 5, 1, 2, 3, 4, 7, 9):
        x = torch.randn(1, segments * SIZE, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "warm", "period"),
    [(WarmsUp, 4, 2), (WarmsUp, 5, 2), (WarmsUpGated, 5, 3), (WarmsUpGated, 4, 2)],
)
@pytest.mark.parametrize("lengths", [(9,), (3, 7, 8, 12)])
def test_a_start_that_is_another_and_then_a_period(
    build: type[WarmsUp], warm: int, period: int, lengths: tuple[int, ...]
) -> None:
    """Regressions: the segments of a cell do the same to their pieces in other places of it, and pieces were
    exchanged where a cell of the start was merged with one of the period; and cells of one code whose results
    are read at other places of it gave one of them for all."""
    model = build(warm, period).double()
    fast = rmtcompile.optimize(model)
    for segments in lengths:
        x = torch.randn(1, segments * SIZE, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-12)
