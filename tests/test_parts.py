"""Layers written as several modules in turn: parts of one cell where a state goes back among them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, assert_equal_runs, assert_same, features, made

import rmtcompile


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        kv = x if before is None else torch.cat([before, x], 1)
        return self.o((self.q(x) @ self.k(kv).transpose(1, 2)).softmax(-1) @ self.v(kv))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))


class Pairs(nn.Module):
    """`for attention, mlp in self.layers`, a memory a pair, which is written behind the second."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Attention(), mlp()]) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        memory, out = [x.new_zeros(x.shape[0], WIDTH, WIDTH)] * len(self.layers), []
        for h in x.split(SEGMENT, 1):
            for i, (attention, feed) in enumerate(self.layers):
                h = h + h @ memory[i]
                h = h + attention(h)
                h = h + feed(h)
                k = torch.tanh(h) / WIDTH
                memory[i] = 0.9 * memory[i] + k.transpose(1, 2) @ k
            out.append(h)
        return torch.cat(out, 1)


class Named(Pairs):
    """The same with names instead of numbers."""

    def __init__(self, n: int = 3) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleList(nn.ModuleDict({"mix": Attention(), "feed": mlp()}) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        memory, out = [x.new_zeros(x.shape[0], WIDTH, WIDTH)] * len(self.layers), []
        for h in x.split(SEGMENT, 1):
            for i, layer in enumerate(self.layers):
                h = h + h @ memory[i]
                h = h + layer["mix"](h)
                h = h + layer["feed"](h)
                k = torch.tanh(h) / WIDTH
                memory[i] = 0.9 * memory[i] + k.transpose(1, 2) @ k
            out.append(h)
        return torch.cat(out, 1)


class Flat(nn.Module):
    """Four modules of one list a layer; the state goes from the last of them to the first."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4 * n))

    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor | None] = [None] * (len(self.parts) // 4)
        out = []
        for piece in x.split(SEGMENT, 1):
            for l, state in enumerate(states):
                a, b, c, d = self.parts[4 * l : 4 * l + 4]
                y = torch.tanh(a(piece)) + (0 if state is None else state)
                y = torch.tanh(b(y))
                y = torch.sigmoid(c(y)) * y
                states[l] = d(y).mean(1, keepdim=True)
                piece = piece + y
            out.append(piece)
        return torch.cat(out, 1)


class Triples(nn.Module):
    """Mixer, gate and writer in a list each; the writer's state is read by the mixer."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            m for _ in range(n) for m in (nn.Linear(WIDTH, WIDTH), mlp(), nn.GRUCell(WIDTH, WIDTH))
        )

    def forward(self, x: Tensor) -> Tensor:
        states, out = [x.new_zeros(x.shape[0], WIDTH)] * (len(self.blocks) // 3), []
        for piece in x.split(SEGMENT, 1):
            for l, state in enumerate(states):
                mixer, gate, writer = self.blocks[3 * l : 3 * l + 3]
                piece = piece + torch.tanh(mixer(piece)) * state[:, None]
                piece = piece + gate(piece)
                states[l] = writer(piece.mean(1), state)
            out.append(piece)
        return torch.cat(out, 1)


MODELS: list[Callable[[int], nn.Module]] = [Pairs, Named, Flat, Triples]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("build", MODELS)
def test_a_state_that_goes_back_among_parts_makes_them_one_layer(
    build: Callable[[int], nn.Module], n: int
) -> None:
    model = made(lambda: build(n))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(s) for s in (4, 1, 2, 3, 7)])
    fast(features(4))
    assert fast.schedule.alpha == 1
    assert fast.schedule.n_layers == n
    assert fast.schedule.n_levels == 4 + n - 1


@pytest.mark.parametrize("build", MODELS)
def test_gradients_of_parts(build: Callable[[int], nn.Module]) -> None:
    model = made(lambda: build(3))
    other = copy.deepcopy(model)
    fast = rmtcompile.optimize(other)
    x = features(4)
    model(x).pow(2).mean().backward()
    fast(x).pow(2).mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert_same(expected, got)


@pytest.mark.parametrize("build", MODELS)
def test_parts_with_a_short_last_segment(build: Callable[[int], nn.Module]) -> None:
    model = made(lambda: build(3))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(4)[:, :-1], features(3)[:, :-2], features(5)[:, :-1]])


class Alternating(nn.Module):
    """Parts whose states stay within them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(m for _ in range(2) for m in (nn.Linear(WIDTH, WIDTH), mlp()))

    def forward(self, x: Tensor) -> Tensor:
        states, out = [torch.zeros_like(x[:, :SEGMENT])] * len(self.layers), []
        for piece in x.split(SEGMENT, 1):
            for i, layer in enumerate(self.layers):
                states[i] = torch.tanh(states[i] + layer(piece))
                piece = piece + states[i]
            out.append(piece)
        return torch.cat(out, 1)


def test_parts_whose_states_stay_are_layers() -> None:
    model = made(Alternating)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(s) for s in (4, 2, 5)])
    fast(features(4))
    assert (fast.schedule.alpha, fast.schedule.n_layers) == (1, 4)


def test_layers_that_the_user_names_are_not_joined() -> None:
    model = made(lambda: Flat(3))
    fast = rmtcompile.optimize(copy.deepcopy(model), layers="parts")
    assert_equal_runs(model, fast, [features(4)])
    assert fast.schedule.n_layers == 12
