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
from rmtcompile.passes.wavefront import wavefront

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


kinds = st.builds(
    Kind,
    st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=3).map(tuple),
    st.lists(st.sampled_from([(1, 0), (1, 1), (1, -1), (2, 0)]), min_size=0, max_size=2, unique=True).map(
        tuple
    ),
)


def stated(kinds: tuple[Kind, ...], n_layers: int) -> set[Offset]:
    """The offsets of a model, those inside its grid."""
    found = {(0, 1)} if n_layers > 1 else set()
    for l in range(n_layers):
        found |= {(ds, dl) for ds, dl in kinds[l % len(kinds)].reads if 0 <= l - dl < n_layers}
    return found


def check(kinds: tuple[Kind, ...], n_layers: int) -> rmtcompile.Optimized:
    """Equal for several lengths, on a schedule that is legal for the offsets stated."""
    model = made(lambda: RandomModel(kinds, n_layers))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(5), features(2)])
    fast.schedule.verify()
    wavefront(stated(kinds, n_layers), n_layers, 5, alpha=fast.schedule.alpha).verify()
    return fast


@pytest.mark.filterwarnings("ignore::rmtcompile.SequentialScheduleWarning")
@settings(max_examples=6, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.lists(kinds, min_size=1, max_size=2).map(tuple), st.integers(2, 4))
def test_equal_or_refused(kinds: tuple[Kind, ...], n_layers: int) -> None:
    """Never wrong silently."""
    try:
        check(kinds, n_layers)
    except UnsupportedError as error:
        event(type(error).__name__)


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
