"""Models that take no more than some length: nothing needs longer captures than that, and where no rules are
found within it each length has a program of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, Layer, assert_same, features, made

import rmtcompile
from rmtcompile.errors import CaptureError

MOST = 4
"""Segments that each of these models takes."""


class Bounded(nn.Module):
    """From the third segment on the layers read something else: rules need captures of five segments."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.later = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(MOST * SEGMENT, WIDTH))

    def embedded(self, x: Tensor) -> Tensor:
        assert x.shape[1] <= MOST * SEGMENT, "too long"
        return x + self.table[: x.shape[1]]

    def turned(self, s: int, h: Tensor) -> Tensor:
        return h + self.later(h) if s > 1 else h

    def forward(self, x: Tensor) -> Tensor:
        memories, out = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers], []
        for s, h in enumerate(self.embedded(x).split(SEGMENT, 1)):
            for l, layer in enumerate(self.layers):
                h, memories[l] = layer(self.turned(s, h), memories[l])
            out.append(h)
        return torch.cat(out, 1)


class Table(Bounded):
    """What is cut from a table is shorter than the input, which the sum says."""

    def embedded(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]]


class Scaled(Bounded):
    """Each segment has a number of its own, which no rule gives."""

    def turned(self, s: int, h: Tensor) -> Tensor:
        return h / (s + 1)


class Even(Bounded):
    """Rules are found within the bound."""

    def turned(self, s: int, h: Tensor) -> Tensor:
        return h


def assert_trains(model: nn.Module, fast: nn.Module, x: Tensor) -> None:
    expected, got = model(x), fast(x)
    assert_same(expected, got)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(y.square().sum(), parameters, allow_unused=True) for y in (expected, got)]
    zeros = [
        [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, one, strict=True)]
        for one in grads
    ]
    assert_same(zeros[0], zeros[1], 1e-9)


@pytest.mark.parametrize("kind", [Bounded, Table, Scaled, Even])
def test_every_length_within_the_bound(kind: type[Bounded]) -> None:
    model = made(kind)
    fast = rmtcompile.optimize(model, backend="eager")
    widths = []
    for segments in (MOST, 1, 2, 3, MOST):
        assert_trains(model, fast, features(segments))
        widths.append(fast.schedule.width)
    assert widths == [3, 1, 2, 3, 3]


@pytest.mark.parametrize("kind", [Bounded, Table, Even])
def test_ragged_ends_and_batches(kind: type[Bounded]) -> None:
    model = made(kind)
    fast = rmtcompile.optimize(model, backend="eager")
    with torch.no_grad():
        for length in (MOST * SEGMENT - 1, 2 * SEGMENT + 2, MOST * SEGMENT - 2):
            assert_same(model(features(MOST)[:, :length]), fast(features(MOST)[:, :length]))
        for batch in (1, 3, 5):
            for segments in (MOST, 2):
                x = features(segments, batch=batch)
                assert_same(model(x), fast(x))


@torch.no_grad()
def test_a_short_input_comes_first() -> None:
    model = made(Bounded)
    fast = rmtcompile.optimize(model, backend="eager")
    for segments in (1, 2, MOST):
        assert_same(model(features(segments)), fast(features(segments)))


@torch.no_grad()
def test_a_text_in_parts() -> None:
    model = made(Bounded)
    fast, x, state, out = rmtcompile.optimize(model, backend="eager"), features(MOST), None, []
    for part in x.split(2 * SEGMENT, 1):
        result, state = fast.run(part, state=state)
        out.append(result)
    assert_same(model(x), torch.cat(out, 1)[:, -x.shape[1] :])


@torch.no_grad()
def test_longer_inputs_raise_what_the_model_raises() -> None:
    fast = rmtcompile.optimize(made(Bounded), backend="eager")
    fast(features(MOST))
    with pytest.raises(CaptureError, match="too long"):
        fast(features(MOST + 1))


@torch.no_grad()
def test_other_failures_are_not_taken_for_a_bound() -> None:
    class Failing(Bounded):
        def turned(self, s: int, h: Tensor) -> Tensor:
            return h * float(h.max()) if s == 1 else h

    with pytest.raises(CaptureError, match="depends on the values"):
        rmtcompile.optimize(made(Failing), backend="eager")(features(3))
