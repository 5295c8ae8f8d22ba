"""What a state starts as: another dtype, shape or layout than what is carried on; types that change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, assert_equal_runs, assert_same, features, made

import rmtcompile
from rmtcompile.errors import RerollError

SEGMENTS = (1, 5)


class Step(nn.Module):
    """Adds its state, broadcast over positions; the next one is a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, h: Any, s: int) -> tuple[Tensor, Any]:
        y = torch.tanh(self.mix(x) + h)
        return x + y, y.mean(1, keepdim=True)


class Joins(Step):
    """The state stands beside the input."""

    def forward(self, x: Tensor, h: Any, s: int) -> tuple[Tensor, Any]:
        y = torch.cat([x, h], 1)
        return x + torch.tanh(self.mix(y).mean(1, keepdim=True)), torch.tanh(
            self.mix(x).mean(1, keepdim=True)
        )


class Sums(Step):
    """Sums over the positions of its state: one that is expanded would count more often."""

    def forward(self, x: Tensor, h: Any, s: int) -> tuple[Tensor, Any]:
        return x + torch.tanh(h.sum(1, keepdim=True)), torch.tanh(self.mix(x)) + 0.1 * h.sum(
            (0, 1), keepdim=True
        )


class Delayed(Step):
    """Two states, of which one follows the other: it has another dtype for two segments."""

    def forward(self, x: Tensor, h: Any, s: int) -> tuple[Tensor, Any]:
        y = torch.tanh(self.mix(x) + h[0])
        return x + y, (h[1] * 0.5, y.mean(1, keepdim=True) + h[1])


class Alternates(Step):
    """Every second state has less precision."""

    def forward(self, x: Tensor, h: Any, s: int) -> tuple[Tensor, Any]:
        y, new = super().forward(x, h, s)
        return y, new.float() if s % 2 else new


class Model(nn.Module):
    def __init__(self, layer: type[Step], start: Callable[[Tensor, int], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(3))
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        states, out = [self.start(x, layer) for layer in range(3)], []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            for i, layer in enumerate(self.layers):
                h, states[i] = layer(h, states[i], s)
            out.append(h)
        return torch.cat(out, 1)


def full(
    n: int, dtype: torch.dtype = torch.float64, batch: int | None = None
) -> Callable[[Tensor, int], Tensor]:
    return lambda x, layer: torch.full((batch or x.shape[0], n, WIDTH), 0.3 * (layer + 1), dtype=dtype)


HALF = [torch.float32, torch.float16, torch.bfloat16]

STARTS: dict[str, tuple[type[Step], Callable[[Tensor, int], Any]]] = {
    "float32": (Step, full(1, torch.float32)),
    "bfloat16": (Joins, full(1, torch.bfloat16)),
    "int64": (Step, lambda x, layer: torch.full((x.shape[0], 1, WIDTH), layer)),
    "bool": (Step, lambda x, layer: torch.ones(x.shape[0], 1, WIDTH, dtype=torch.bool)),
    "by layer": (Step, lambda x, layer: full(1, HALF[layer])(x, layer)),
    "number": (Step, lambda x, layer: 0.3),
    "no dims": (Step, lambda x, layer: torch.tensor(0.3)),
    "one row": (Step, full(1, batch=1)),
    "one row, float32": (Step, full(1, torch.float32, batch=1)),
    "one row, summed": (Sums, full(1, batch=1)),
    "one position, summed": (Sums, full(1)),
    "expanded": (
        Step,
        lambda x, layer: torch.full((1, 1, 1), 0.3, dtype=x.dtype).expand(x.shape[0], 1, WIDTH),
    ),
    "transposed": (
        Joins,
        lambda x, layer: torch.arange(8.0, dtype=x.dtype).view(WIDTH, 1, 2).transpose(0, 2),
    ),
    "shorter": (Joins, full(2)),
    "delayed": (
        Delayed,
        lambda x, layer: (full(1, torch.float32)(x, layer), full(1, torch.float32)(x, layer)),
    ),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_of_another_type(name: str) -> None:
    model = made(lambda: Model(*STARTS[name]))
    fast = rmtcompile.optimize(model)
    assert_equal_runs(model, fast, [features(n) for n in SEGMENTS])
    assert fast.schedule.width == 3


@pytest.mark.parametrize("name", ["float32", "one row", "delayed"])
def test_gradients_of_a_start_of_another_type(name: str) -> None:
    model = made(lambda: Model(*STARTS[name]))
    fast, x = rmtcompile.optimize(model), features(4)
    mine, theirs = (torch.autograd.grad(f(x).square().sum(), list(model.parameters())) for f in (fast, model))
    assert_same(theirs, mine, 1e-9)


def test_a_start_of_half_precision_in_a_float32_model() -> None:
    model = made(lambda: Model(Step, full(1, torch.float16)), torch.float32)
    assert_equal_runs(model, rmtcompile.optimize(model), [features(n, dtype=torch.float32) for n in SEGMENTS])


def test_a_type_that_alternates() -> None:
    """Two segments are taken as one."""
    model = made(lambda: Model(Alternates, full(1)))
    fast = rmtcompile.optimize(model)
    assert_equal_runs(model, fast, [features(n) for n in (*SEGMENTS, 6, 7)])
    assert fast.schedule.width == 3


class Irregular(Step):
    """The precision of a state depends on the number of its segment, in a pattern of seven."""

    def forward(self, x: Tensor, h: Any, s: int) -> tuple[Tensor, Any]:
        y, new = super().forward(x, h, s)
        return y, new.to((torch.float64, torch.float32)[s * s % 7 in (1, 2)])


@torch.no_grad()
def test_types_without_a_period_have_no_rules() -> None:
    model = made(lambda: Model(Irregular, full(1)))
    fast = rmtcompile.optimize(model)
    assert_same(model(features(9)), fast(features(9)))
    with pytest.raises(RerollError, match="do not follow one rule") as refused:
        fast.run(features(20))
    message = str(refused.value)
    assert "float64[2, 3, 4], float64[2, 1, 4]" in message
    assert "float64[2, 3, 4], float32[2, 1, 4]" in message
    assert "test_starts.py" in message
