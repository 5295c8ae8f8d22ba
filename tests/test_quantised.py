"""Weights that torchao has quantised: grouped like any others, before and after `optimize`."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import assert_same

import rmtcompile

SEGMENT, WIDTH, LAYERS = 4, 32, 3

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    quantization = pytest.importorskip("torchao.quantization")

pytestmark = pytest.mark.filterwarnings("default")  # of torchao


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, h: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        h = h + self.down(torch.tanh(self.up(h + memory)))
        return h, 0.5 * memory + h.mean(1, keepdim=True)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        memories = [x.new_zeros(len(x), 1, WIDTH)] * LAYERS
        out = []
        for h in x.split(SEGMENT, 1):
            for i, layer in enumerate(self.layers):
                h, memories[i] = layer(h, memories[i])
            out.append(h)
        return torch.cat(out, 1)


def quantised(model: Any) -> Any:
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def built() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def stacks_of(fast: Any) -> list[Tensor]:
    """The stacked integers of the last program."""
    stacks = fast._last[0].executor.stacks.stacks.values()
    found = {id(stack): stack.tensor for stack in stacks if getattr(stack, "tensor", None) is not None}
    return [tensor for tensor in found.values() if tensor.dtype == torch.int8]


@torch.no_grad()
def test_integers_run_grouped_and_are_held_once() -> None:
    model, x = quantised(built()), torch.randn(2, 7 * SEGMENT, WIDTH)
    expected = model(x)
    assert not torch.equal(expected, built()(x))
    fast = rmtcompile.optimize(model, plan="diagonal")
    assert_same(expected, fast(x), 1e-5)
    assert fast.schedule.width == LAYERS
    stacks = stacks_of(fast)
    assert sorted(tuple(stack.shape) for stack in stacks) == [
        (LAYERS, WIDTH, 2 * WIDTH), (LAYERS, 2 * WIDTH, WIDTH)
    ]  # fmt: skip
    held = {layer.up.weight.qdata.data_ptr() for layer in model.layers}
    held |= {layer.down.weight.qdata.data_ptr() for layer in model.layers}
    assert held == {row.data_ptr() for stack in stacks for row in stack}
    for n in (3, 9):
        assert_same(model(x[:, : n * SEGMENT]), fast(x[:, : n * SEGMENT]), 1e-5)
    model.layers[1].up.weight.qdata.zero_()
    assert not torch.allclose(expected, model(x))
    assert_same(model(x), fast(x), 1e-5)
    assert fast.captures == 1


@torch.no_grad()
def test_models_may_be_quantised_afterwards() -> None:
    x = torch.randn(2, 6 * SEGMENT, WIDTH)
    for through in (False, True):
        model = built()
        fast = rmtcompile.optimize(model)
        assert_same(model(x), fast(x), 1e-5)
        quantised(fast if through else model)
        expected = quantised(built())(x)
        assert_same(expected, fast(x), 1e-5)
        assert stacks_of(fast) and fast.captures == 2
        assert_same(expected, copy.deepcopy(fast)(x), 1e-5)
