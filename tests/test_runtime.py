"""rmtcompile/runtime: lanes, taps and stacks hold what was put there, and weights are held once."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import Toy, assert_same, features, made

import rmtcompile
from rmtcompile.binding.captured import Leaf
from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.program import Affine, Lane
from rmtcompile.ir.weights import Weight
from rmtcompile.runtime import LaneStore, Stacks, TapStore, replays
from rmtcompile.runtime.storage import as_slice


def lane(*layers: int, shape: tuple[int, ...] = (2,)) -> Lane:
    return Lane("a", layers, None, shape, torch.float64, torch.device("cpu"), (), ())


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True).map(sorted))
def test_slices_pick_what_they_stand_for(indices: list[int]) -> None:
    window = as_slice(indices)
    steps = {b - a for a, b in pairwise(indices)}
    assert (window is None) == (len(steps) > 1)
    if window is not None:
        assert list(range(30))[window] == indices


@pytest.mark.parametrize("functional", [False, True])
def test_lanes_give_what_was_written(functional: bool) -> None:
    store = LaneStore(lane(1, 2, 4), functional)
    values = torch.arange(6, dtype=torch.float64).view(3, 2)
    store.write([1, 2, 4], values)
    assert torch.equal(store.read([1, 2, 4]), values)
    assert torch.equal(store.read([1, 4]), values[[0, 2]])
    store.fill(2, torch.ones(1, dtype=torch.float64))
    assert torch.equal(store.read([2]), torch.ones(1, 2, dtype=torch.float64))
    assert torch.equal(store.read([4]), values[2:])


def test_a_window_of_a_lane_is_a_view() -> None:
    store = LaneStore(lane(0, 1, 2), False)
    window = store.read([0, 1])
    store.write([1], torch.ones(1, 2, dtype=torch.float64))
    assert torch.equal(window[1], torch.ones(2, dtype=torch.float64))


def test_functional_lanes_keep_gradients_apart() -> None:
    store = LaneStore(lane(0, 1), True)
    x = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    store.write([0, 1], x)
    read = store.read([0, 1])
    store.write([0], torch.zeros(1, 2, dtype=torch.float64))
    read.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_taps_drop_what_no_reader_needs() -> None:
    tap = TapStore(1)
    for s in range(4):
        tap.put(s, torch.tensor(s))
    assert sorted(tap.values) == [2, 3] and 3 in tap and 1 not in tap
    everything = TapStore(None)
    for s in range(4):
        everything.put(s, torch.tensor(s))
    assert [int(value) for value in everything.between(1, 3)] == [1, 2, 3]


def leaves(model: nn.Module) -> dict[str, Leaf]:
    return {
        name: Leaf(name, p, model.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2])
        for name, p in model.named_parameters()
    }


def three() -> nn.Module:
    return nn.ModuleList(nn.Linear(2, 3) for _ in range(3)).double()


WEIGHTS = {
    "w": Weight((("0.weight",), ("1.weight",), ("2.weight",))),
    "b": Weight((("0.bias",), ("1.bias",), ("2.bias",))),
}


@torch.no_grad()
def test_parameters_become_views() -> None:
    model: Any = three()
    before = {name: p.clone() for name, p in model.named_parameters()}
    objects = dict(model.named_parameters())
    stacks = Stacks(WEIGHTS, leaves(model))
    stack = stacks.current({})["w"]
    assert stack.shape == (3, 3, 2)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and objects[name] is p
    model[1].weight.fill_(7.0)
    assert torch.equal(stack[1], model[1].weight)
    assert stacks.current({})["w"] is stack


@torch.no_grad()
def test_swapped_parameters_are_stacked_again() -> None:
    model: Any = three()
    stacks = Stacks(WEIGHTS, leaves(model))
    stacks.current({})
    model[2].weight = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    assert torch.equal(stacks.current({})["w"][2], torch.ones(3, 2, dtype=torch.float64))
    model.float()
    assert stacks.current({})["w"].dtype == torch.float32


@torch.no_grad()
def test_programs_of_one_model_share_its_stacks() -> None:
    model: Any = three()
    first, second = Stacks(WEIGHTS, leaves(model)), Stacks(WEIGHTS, leaves(model))
    stack = first.current({})["w"]
    assert second.current({})["w"] is stack
    assert first.current({})["w"] is stack


def test_gradients_flow_through_a_stack() -> None:
    model: Any = three()
    stacks = Stacks(WEIGHTS, leaves(model))
    stacks.current({})["w"].sum().backward()
    assert all(torch.equal(layer.weight.grad, torch.ones(3, 2).double()) for layer in model)


@torch.no_grad()
def test_parts_are_concatenated() -> None:
    model: Any = three()
    weight = Weight((("0.weight", "1.weight"),))
    stack = Stacks({"w": weight}, leaves(model)).current({})["w"]
    assert torch.equal(stack[0], torch.cat([model[0].weight, model[1].weight]))
    model[1].weight.zero_()
    assert not stack[0, 3:].any()


@torch.no_grad()
def test_parameters_that_differ_are_refused() -> None:
    model: Any = three()
    model[1] = nn.Linear(2, 4).double()
    with pytest.raises(UnsupportedError) as caught:
        Stacks({"w": WEIGHTS["w"]}, leaves(model)).current({})
    lines = str(caught.value).splitlines()
    assert lines[0] == "parameters of one kind of layer differ in shape, dtype or device"
    assert "0.weight: (3, 2)" in lines[1] and "1.weight: (4, 2)" in lines[2]


@torch.no_grad()
def test_what_cannot_be_recorded_runs_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        wants = True

        def __init__(self, *_: Any) -> None: ...

        def prepare(self, *_: Any) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")

    model, x = made(Toy), features(4)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    fast(x)
    executor = fast._last[0].executor  # type: ignore[index]
    executor._use_graphs = True
    monkeypatch.setattr(replays, "BlockRecorder", Failing)
    with pytest.warns(rmtcompile.RecordingWarning, match="CUDA graphs: operation not permitted"):
        executor.record([x])
    assert_same(model(x), fast(x))


def test_affine() -> None:
    assert [str(a) for a in (Affine(3), Affine(0, 4), Affine(-1, 1, 2), Affine(2, 0, 1))] == [
        "3",
        "4 * s",
        "s + 2 * S - 1",
        "S + 2",
    ]
    assert Affine(1, 2, 3).at(4, 5) == 24
    assert Affine(3).is_constant and not Affine(3, 1).is_constant
    assert isinstance(torch.zeros(1), Tensor)
