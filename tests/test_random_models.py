"""Random layer-recurrent models, offsets, operations and kinds of layers: the compiler against eager."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, assert_equal_runs, features, made

import rmtcompile
from rmtcompile.errors import UnsupportedError
from rmtcompile.passes.grid.wavefront import wavefront

Offset = tuple[int, int]

OPERATIONS = ("linear", "tanh", "norm", "gate", "softmax", "double", "roll")


@dataclass(frozen=True)
class Kind:
    """What the layers of one kind do: operations on x, in order, after adding the states they read.

    Attributes:
        reads: (ds, dl) of each state, consumer minus producer; none for a layer without.
    """

    operations: tuple[str, ...]
    reads: tuple[Offset, ...]


class RandomLayer(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in kind.operations)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        for state in states:
            x = x + 0.5 * state[:, None]
        for name, linear in zip(self.kind.operations, self.linears):
            x = self.apply_one(name, linear, x)
        return x, torch.tanh(x).mean(1)

    def apply_one(self, name: str, linear: nn.Module, x: Tensor) -> Tensor:
        if name == "linear":
            return linear(x)
        if name == "tanh":
            return x + torch.tanh(x)
        if name == "norm":
            return self.norm(x)
        if name == "gate":
            return x * torch.sigmoid(linear(x))
        if name == "softmax":
            return x + torch.softmax(x @ x.mT, -1) @ x
        if name == "roll":
            return x.roll(1, 1)
        return 2 * x


class RandomModel(nn.Module):
    """Layer l is of kind `pattern[l % len(pattern)]`; states that no cell has written are zeros."""

    def __init__(self, kinds: tuple[Kind, ...], n_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(RandomLayer(kinds[l % len(kinds)]) for l in range(n_layers))

    def forward(self, x: Tensor) -> Tensor:
        zero = x.new_zeros(x.shape[0], x.shape[2])
        states: dict[tuple[int, int], Tensor] = {}
        out = []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            for l, layer in enumerate(self.layers):
                read = [states.get((s - ds, l - dl), zero) for ds, dl in layer.kind.reads]
                h, states[s, l] = layer(h, read)
            out.append(h)
        return torch.cat(out, 1)


class RandomFunction(RandomModel):
    """The same without modules for layers: weights in lists, one function for all layers."""

    def __init__(self, kinds: tuple[Kind, ...], n_layers: int) -> None:
        super().__init__(kinds, n_layers)
        layers, self.layers = self.layers, None
        self.kinds = [layer.kind for layer in layers]
        self.weights = nn.ParameterList(layer.linears[0].weight for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        zero = x.new_zeros(x.shape[0], x.shape[2])
        states: dict[tuple[int, int], Tensor] = {}
        out = []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            for l, kind in enumerate(self.kinds):
                for ds, dl in kind.reads:
                    h = h + 0.5 * states.get((s - ds, l - dl), zero)[:, None]
                h = h + torch.tanh(h @ self.weights[l])
                for name in kind.operations:
                    h = RandomLayer.apply_one(self, name, lambda x, l=l: x @ self.weights[l], h)  # type: ignore[arg-type]
                states[s, l] = torch.tanh(h).mean(1)
            out.append(h)
        return torch.cat(out, 1)

    def norm(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (WIDTH,))


def kinds_of(*reads: Offset) -> st.SearchStrategy[Kind]:
    return st.builds(
        Kind,
        st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=3).map(tuple),
        st.lists(st.sampled_from(reads), min_size=0, max_size=2, unique=True).map(tuple),
    )


kinds = kinds_of((1, 0), (1, 1), (1, -1), (2, 0), (2, -1), (2, 1), (0, 2), (3, 0))


def stated(kinds: tuple[Kind, ...], n_layers: int) -> set[Offset]:
    """The offsets of a model, those inside its grid."""
    found = {(0, 1)} if n_layers > 1 else set()
    for l in range(n_layers):
        found |= {(ds, dl) for ds, dl in kinds[l % len(kinds)].reads if 0 <= l - dl < n_layers}
    return found


def check(
    kinds: tuple[Kind, ...], n_layers: int, build: type[RandomModel] = RandomModel
) -> rmtcompile.Optimized:
    """Equal for several lengths, on a schedule that is legal for the offsets stated."""
    model = made(lambda: build(kinds, n_layers))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(5), features(2)])
    fast.schedule.verify()
    wavefront(stated(kinds, n_layers), n_layers, 5, alpha=fast.schedule.alpha).verify()
    return fast


@pytest.mark.filterwarnings("ignore::rmtcompile.SequentialScheduleWarning")
def test_equal_or_refused() -> None:
    """Never wrong silently, and not refused as a rule: one to three kinds of layers, some without state."""
    outcomes: list[str] = []

    @settings(max_examples=8, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.lists(kinds, min_size=1, max_size=3).map(tuple), st.integers(2, 4))
    def one(kinds: tuple[Kind, ...], n_layers: int) -> None:
        try:
            check(kinds, n_layers)
            outcomes.append("equal")
        except UnsupportedError as error:
            outcomes.append(type(error).__name__)
        event(outcomes[-1])

    one()
    assert outcomes.count("equal") > 0.7 * len(outcomes), outcomes


@settings(max_examples=5, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.lists(kinds_of((1, 1), (2, 1), (1, 2)), min_size=1, max_size=2).map(tuple), st.integers(2, 4))
def test_states_of_layers_below_run_a_layer_at_once(kinds: tuple[Kind, ...], n_layers: int) -> None:
    assert check(kinds, n_layers).schedule.alpha == 0


@pytest.mark.filterwarnings("ignore::rmtcompile.SequentialScheduleWarning")
@settings(max_examples=5, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.lists(kinds, min_size=1, max_size=1).map(tuple), st.integers(2, 4))
def test_functions_without_modules(kinds: tuple[Kind, ...], n_layers: int) -> None:
    try:
        fast = check(kinds, n_layers, RandomFunction)
    except UnsupportedError as error:
        event(type(error).__name__)
    else:
        assert fast.schedule.n_layers == n_layers


def kind(operations: str, *reads: Offset) -> Kind:
    return Kind(tuple(operations.split()), reads)


@pytest.mark.parametrize(
    ("kinds", "n_layers"),
    [
        ([kind("linear", (1, 0))], 3),
        ([kind("gate norm", (1, 1))], 3),
        (
            [kind("linear", (1, -1)), kind("double", (1, 0))],
            2,
        ),  # through the epilogue
        ([kind("linear"), kind("norm", (1, 0), (2, 0))], 2),
        ([kind("gate", (1, 0), (1, -1)), kind("roll", (1, 0))], 3),
        ([kind("norm linear"), kind("softmax", (1, 0))], 4),  # every other layer has no state
        ([kind("linear", (2, -1))], 3),  # one hop on levels s + l
        ([kind("norm", (1, 1), (0, 2))], 4),  # two values of one cell, read by different classes
    ],
)
@pytest.mark.filterwarnings("ignore::rmtcompile.SequentialScheduleWarning")
def test_chosen_models(kinds: list[Kind], n_layers: int) -> None:
    check(tuple(kinds), n_layers)


def test_states_two_segments_old() -> None:
    fast = check((kind("linear", (2, 0)),), 2)
    assert fast.schedule.offsets == {(0, 1), (2, 0)}


def test_two_layers_compute_one_value() -> None:
    """The state of layer 0 is the mean of tanh(x), and layer 1 starts with tanh of the same x."""
    check((kind("linear", (1, 0)), kind("tanh")), 2)
