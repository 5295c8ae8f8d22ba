"""repeats.py: layers that no module shows, found by the weights that one place of the code sees."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, Toy, assert_equal_runs, assert_same, features, made
from zoo.others import ZOO

import rmtcompile
from rmtcompile.errors import PartitionError
from rmtcompile.frontend.capture import capture
from rmtcompile.passes.flat.functionalise import functionalise
from rmtcompile.passes.flat.value_numbering import number_values
from rmtcompile.passes.grid.repeats import find_repeats

N_LAYERS = 3


def associative(x: Tensor, state: Tensor | None, w: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """A layer as a plain function, in ARMT's manner: the first segment has no memory to read."""
    if state is not None:
        x = x + F.linear(x, w("read")) @ state
    q, k, v = F.linear(F.layer_norm(x, (WIDTH,)), w("qkv")).chunk(3, -1)
    x = x + torch.softmax(q @ k.mT, -1) @ v
    x = x + F.silu(x @ w("up").T) @ w("down").T + w("bias")
    key, value = F.linear(x, w("write")).chunk(2, -1)
    new = torch.softmax(key, -1).mT @ torch.tanh(value)
    return x, new if state is None else 0.5 * state + new


SHAPES = {
    "read": (WIDTH, WIDTH),
    "qkv": (3 * WIDTH, WIDTH),
    "up": (6, WIDTH),
    "down": (WIDTH, 6),
    "bias": (WIDTH,),
    "write": (2 * WIDTH, WIDTH),
}


class InLists(nn.Module):
    """Weights in `ParameterList`s."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {
                name: nn.ParameterList(nn.Parameter(torch.randn(shape) / 2) for _ in range(N_LAYERS))
                for name, shape in SHAPES.items()
            }
        )
        self.enter = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor | None] = [None] * N_LAYERS
        out = []
        for h in x.split(SEGMENT, 1):
            h = torch.tanh(h @ self.enter)
            for l in range(N_LAYERS):
                h, states[l] = associative(h, states[l], lambda name, l=l: self.weights[name][l])
            out.append(F.layer_norm(h, (WIDTH,)))
        return torch.cat(out, 1)


class Stacked(InLists):
    """One tensor [L, ...] of each kind of weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(N_LAYERS, *shape) / 2) for name, shape in SHAPES.items()}
        )


class Iterated(Stacked):
    """The same, walked with `for`: the loop takes the tensors apart with `unbind`."""

    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor | None] = [None] * N_LAYERS
        out = []
        for h in x.split(SEGMENT, 1):
            for l, own in enumerate(zip(*(self.weights[name] for name in SHAPES), strict=True)):
                h, states[l] = associative(h, states[l], dict(zip(SHAPES, own, strict=True)).__getitem__)
            out.append(h)
        return torch.cat(out, 1)


class LayerMajor(InLists):
    """Layer by layer, and in each all segments."""

    def forward(self, x: Tensor) -> Tensor:
        pieces = list(x.split(SEGMENT, 1))
        for l in range(N_LAYERS):
            state = None
            for s, h in enumerate(pieces):
                pieces[s], state = associative(h, state, lambda name, l=l: self.weights[name][l])
        return torch.cat(pieces, 1)


class Heads(nn.Module):
    """Two weights a layer at one line, in an inner loop; norms are modules, one for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2 * N_LAYERS))
        self.gate = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(N_LAYERS))
        self.out = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(N_LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        states = [x.new_zeros(x.shape[0], WIDTH)] * N_LAYERS
        out = []
        for h in x.split(SEGMENT, 1):
            for l in range(N_LAYERS):
                gate = torch.sigmoid(h @ self.gate[l])
                h = h + gate * states[l][:, None]
                for i in range(2):
                    h = h + torch.tanh(h @ self.heads[2 * l + i])
                states[l] = states[l] + h.mean(1)
                h = self.norm(h + h @ self.out[l])
            out.append(h)
        return torch.cat(out, 1)


def linear(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.T


class OneLine(nn.Module):
    """Three products a layer on one line."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"gate": (6, WIDTH), "up": (6, WIDTH), "down": (WIDTH, 6)}
        self.layers = nn.ModuleList(
            nn.ParameterDict({name: nn.Parameter(torch.randn(size)) for name, size in sizes.items()})
            for _ in range(N_LAYERS)
        )

    def mlp(self, h: Tensor, w: Any) -> Tensor:
        return (F.silu(h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T

    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor | None] = [None] * N_LAYERS
        out = []
        for h in x.split(SEGMENT, 1):
            for l, own in enumerate(self.layers):
                if (state := states[l]) is not None:
                    h = h + 0.5 * state
                h = h + self.mlp(h, own)
                states[l] = torch.tanh(h)
            out.append(h)
        return torch.cat(out, 1)


class Helper(OneLine):
    """The same by a function, which is one line of code for all of them."""

    def mlp(self, h: Tensor, w: Any) -> Tensor:
        return linear(F.silu(linear(h, w["gate"])) * linear(h, w["up"]), w["down"])


class TwoKinds(nn.Module):
    """Every other layer is of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))
        self.b = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        states = [x.new_zeros(x.shape[0], WIDTH)] * 4
        out = []
        for h in x.split(SEGMENT, 1):
            for l in range(4):
                h = h + states[l][:, None]
                y = h @ (self.a if l % 2 else self.b)[l // 2]
                h = torch.tanh(y) if l % 2 else h + torch.sigmoid(y)
                states[l] = h.mean(1)
            out.append(h)
        return torch.cat(out, 1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lists": InLists,
    "stacked": Stacked,
    "iterated": Iterated,
    "layer_major": LayerMajor,
    "heads": Heads,
    "one_line": OneLine,
    "helper": Helper,
}


@pytest.mark.parametrize("name", MODELS)
def test_equal_on_diagonals(name: str) -> None:
    model = made(MODELS[name])
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(segments) for segments in (5, 1, 2, 3, 8)])
    schedule = fast.schedule
    assert (schedule.n_layers, schedule.alpha, schedule.width) == (N_LAYERS, 1, N_LAYERS)
    assert {offset for offset in schedule.offsets if abs(offset[1]) < N_LAYERS} == {(0, 1), (1, 0)}
    assert len(fast.compiled.program.groups) == 1, "all layers share their calls"


@pytest.mark.parametrize("build", [Stacked, Iterated])
def test_a_stacked_weight_is_read_where_it_is(build: Callable[[], nn.Module]) -> None:
    fast = rmtcompile.optimize(made(build)).prepare(features(4))
    assert "= run.leaves['weights.qkv'][0:3]" in fast.code
    assert "torch.stack" not in fast.code
    assert not fast._last[0].executor.stacks.stacks
    roles = {port.role for group in fast.compiled.program.groups for port in group.ports}
    assert roles == {"lane", "rows", "mask"} or roles == {"lane", "rows"}


def test_two_kinds_of_layers() -> None:
    model = made(TwoKinds)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(segments) for segments in (5, 1, 3)])
    assert (fast.schedule.n_layers, fast.schedule.width) == (4, 3)


def test_weights_in_a_list_are_stacked_and_seen() -> None:
    model = made(InLists)
    fast = rmtcompile.optimize(model)
    assert_equal_runs(model, fast, [features(4)])
    assert "weight weights.qkv.0" in fast.code
    with torch.no_grad():
        model.weights["qkv"][1].mul_(2)
    assert_equal_runs(model, fast, [features(4)])
    assert fast.captures == 1


@pytest.mark.parametrize("build", [InLists, Stacked])
def test_gradients(build: Callable[[], nn.Module]) -> None:
    model = made(build)
    twin = copy.deepcopy(model)
    for run in (model, rmtcompile.optimize(twin)):
        run(features(4)).sin().sum().backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()], 1e-9)


@torch.no_grad()
def test_weights_may_be_arguments() -> None:
    def forward(x: Tensor, weights: list[dict[str, Tensor]]) -> Tensor:
        states: list[Tensor | None] = [None] * len(weights)
        out = []
        for h in x.split(SEGMENT, 1):
            for l, own in enumerate(weights):
                h, states[l] = associative(h, states[l], own.__getitem__)
            out.append(h)
        return torch.cat(out, 1)

    weights = [
        {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
        for _ in range(N_LAYERS)
    ]
    fast = rmtcompile.optimize(forward)
    for segments in (5, 2):
        assert_same(forward(features(segments), weights), fast(features(segments), weights))
    assert fast.schedule.width == 2 and fast.schedule.n_layers == N_LAYERS


@torch.no_grad()
def test_a_function_with_a_state_that_all_segments_ignore_runs_a_layer_at_once() -> None:
    weights = torch.randn(N_LAYERS, WIDTH, WIDTH, dtype=torch.float64)

    def forward(x: Tensor) -> Tensor:
        out = []
        for h in x.split(SEGMENT, 1):
            for w in weights:
                h = torch.tanh(h @ w) + h
            out.append(h)
        return torch.cat(out, 1)

    fast = rmtcompile.optimize(forward)
    assert_same(forward(features(6)), fast(features(6)))
    assert (fast.schedule.alpha, fast.schedule.widths) == (0, (6,) * N_LAYERS)


def graph_of(model: Any, segments: int) -> torch.fx.Graph:
    captured = capture(model, (features(segments),), {})
    module = number_values(functionalise(captured.module).module)
    module.graph.eliminate_dead_code()
    return module.graph


@torch.no_grad()
@pytest.mark.parametrize("segments", [2, 3])
def test_cells_are_whole(segments: int) -> None:
    """From the norm before the first weight to the state after the last one."""
    found = find_repeats(graph_of(made(InLists), segments), segments)
    assert found is not None and found.paths == tuple(f"layer {l}" for l in range(N_LAYERS))
    counts: dict[tuple[int, int], int] = {}
    for cell in found.cell_of_node.values():
        counts[cell] = counts.get(cell, 0) + 1
    assert len(counts) == segments * N_LAYERS
    names = [str(node.target) for node, cell in found.cell_of_node.items() if cell == (0, 1)]
    assert sum("layer_norm" in name for name in names) == 1
    assert sum("softmax" in name for name in names) == 2


@torch.no_grad()
def test_modules_go_first() -> None:
    fast = rmtcompile.optimize(made(Toy)).prepare(features(4))
    assert fast.compiled.layer_paths == ("layers.0", "layers.1", "layers.2")


@torch.no_grad()
def test_where_nothing_repeats_it_is_said() -> None:
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.float64)

    def forward(x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], WIDTH)
        out = []
        for h in x.split(SEGMENT, 1):
            h = torch.tanh(h @ weight + state[:, None])
            state = h.mean(1)
            out.append(h)
        return torch.cat(out, 1)

    with pytest.raises(PartitionError) as caught:
        rmtcompile.optimize(forward)(features(4))
    first, *rest = str(caught.value).splitlines()
    assert first == "no repeated layers were found, neither among the module calls nor in the operations"
    assert "layers='path.to.container'" in rest[-1]


@torch.no_grad()
def test_positions_of_segments_are_no_layers() -> None:
    """A table read at one line with one row a segment: as many rows as segments, each used once."""
    table = torch.randn(9, WIDTH, dtype=torch.float64)
    weights = torch.randn(N_LAYERS, WIDTH, WIDTH, dtype=torch.float64)

    def forward(x: Tensor) -> Tensor:
        states = [x.new_zeros(x.shape[0], WIDTH)] * N_LAYERS
        out = []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            h = h + table[s]
            for l, w in enumerate(weights):
                h = h + torch.tanh(h @ w + states[l][:, None])
                states[l] = h.mean(1)
            out.append(h)
        return torch.cat(out, 1)

    fast = rmtcompile.optimize(forward)
    for segments in (5, 9):
        assert_same(forward(features(segments)), fast(features(segments)))
    assert fast.schedule.n_layers == N_LAYERS


@torch.no_grad()
def test_a_function_without_modules_through_the_command_line_entry() -> None:
    entry = ZOO["plain_function"]
    text = str(rmtcompile.explain(entry.build(), *entry.inputs(1, 4)))
    assert "4: layer {0..3}" in text
