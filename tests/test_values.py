"""rmtcompile/binding/values.py: whether the tensors from which numbers were read still hold the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from toys import Toy, assert_equal_runs, assert_same, features, made

import rmtcompile
from rmtcompile.binding.captured import Leaf
from rmtcompile.binding.values import _LARGE, Values


def held(*tensors: torch.Tensor) -> tuple[nn.Module, Values]:
    """A module that keeps these as buffers b0, b1, ..., and the values of them."""
    module = nn.Module()
    for i, tensor in enumerate(tensors):
        module.register_buffer(f"b{i}", tensor)
    leaves = [Leaf(name, tensor, module._buffers, name) for name, tensor in module.named_buffers()]
    return module, Values(leaves)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(2.0),
        torch.tensor([True, False]),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.int16).t(),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.tensor([1.0 + 2j], dtype=torch.complex128),
        torch.zeros(2 * _LARGE, dtype=torch.float16),
        torch.zeros(_LARGE, dtype=torch.bool),
    ],
)
def test_each_write_is_seen(tensor: torch.Tensor) -> None:
    module, values = held(torch.ones(3), tensor.clone(), torch.empty(0))
    assert values.changed() is None
    last = module.b1.reshape(-1)[-1].clone()
    module.b1.data[(-1,) * tensor.dim()] = not last if tensor.dtype == torch.bool else last + 1
    found = values.changed()
    assert found is not None and "b1" in found
    module.b1.data[(-1,) * tensor.dim()] = last
    assert values.changed() is None


def test_words() -> None:
    module, values = held(torch.tensor(2.0), torch.ones(2))
    module.b0.fill_(3.0)
    assert values.changed() == "the forward reads a number from b0, which was 2.0 and is 3.0"
    module.b0.fill_(2.0)
    module.b1.fill_(3.0)
    assert values.changed() == "the forward reads numbers from b1, which holds others now"
    module.b1 = torch.ones(3)
    assert values.changed() == "b1, from which the forward reads numbers, is another tensor"
    module.b1 = torch.ones(2)
    assert values.changed() is None


def test_not_a_number_equals_itself_and_signs_of_zero_count() -> None:
    module, values = held(torch.tensor([float("nan"), 0.0]))
    assert values.changed() is None
    module.b0[1] = -0.0
    assert values.changed() is not None


def test_nothing_was_read() -> None:
    assert Values(()).changed() is None


class Rows(Toy):
    """Each segment is scaled by a row of a table."""

    def __init__(self) -> None:
        super().__init__(n_layers=2)
        self.register_buffer("table", torch.full((8,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1] // 3
        parts = [part * self.table[s].item() for s, part in enumerate(x.split(3, 1)[:n])]
        return super().forward(torch.cat(parts, 1))


@torch.no_grad()
def test_the_whole_tensor_counts() -> None:
    """Rows that the captures did not read are read by longer inputs."""
    model = made(Rows)
    fast = rmtcompile.optimize(model)
    assert_equal_runs(model, fast, [features(7)])
    model.table[5] = 3.0  # type: ignore[index, operator]
    try:
        assert_equal_runs(model, fast, [features(7)])
    except rmtcompile.UnsupportedError:  # no rule gives one row that is another
        assert fast.captures > 1


class Gain(Toy):
    """Reads a number from a parameter."""

    def __init__(self) -> None:
        super().__init__(n_layers=2)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * float(self.gain))


@torch.no_grad()
def test_weights_swapped_and_moved() -> None:
    model = made(Gain)
    fast = rmtcompile.optimize(model)
    assert_equal_runs(model, fast, [features(4)])
    model.gain = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    assert_equal_runs(model, fast, [features(4)])
    model.load_state_dict({**model.state_dict(), "gain": torch.tensor(4.0)})
    assert_equal_runs(model, fast, [features(4)])
    model.float()
    assert_equal_runs(model, fast, [features(4, dtype=torch.float32)])
    assert fast.captures == 4


@pytest.mark.gpu
@torch.no_grad()
def test_recorded_runs_are_dropped() -> None:
    """A recorded run is launched before the values are compared; its result is not used if they differ."""
    model: Any = made(Gain).cuda()
    fast = rmtcompile.optimize(model, backend="eager", cuda_graphs=True, plan="diagonal")
    x = features(4).cuda()
    for _ in range(3):
        for _ in range(4):
            assert_same(model(x), fast(x))
        model.gain.data.mul_(1.5)
    assert fast.captures == 3
