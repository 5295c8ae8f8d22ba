"""frontend/known/: numbers that a forward reads out of tensors are those of the real ones, or refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import SEGMENT, Toy, assert_equal_runs, assert_same, features, made

import rmtcompile
from rmtcompile.errors import CaptureError, RecaptureWarning
from rmtcompile.frontend.capture import capture

Read = Callable[["Reads", Tensor], Any]


class Reads(Toy):
    """Multiplies each segment by a number that `read` takes from the model's tensors, or from the segment."""

    def __init__(self, read: Read) -> None:
        super().__init__(n_layers=2)
        self.number = read
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("table", torch.tensor([2.0, 1.0, 3.0]))
        self.register_buffer("count", torch.tensor(2))
        self.plain = torch.tensor([2.0, 4.0])

    def forward(self, x: Tensor) -> Tensor:
        parts = [part * self.number(self, part) for part in x.split(SEGMENT, 1)]
        return super().forward(torch.cat(parts, 1))


def changed(model: Reads) -> None:
    """Other values in place: through autograd's eyes, past them, through NumPy."""
    with torch.no_grad():
        model.gain.add_(1.0)
        model.count.add_(1)
        model.plain.mul_(3.0)
    model.table.data[0] = 7.0
    model.table.numpy()[1] = 5.0


NUMBERS: dict[str, list[Read]] = {
    "conversions": [
        lambda m, x: float(m.gain),
        lambda m, x: m.gain.item(),
        lambda m, x: m.gain.data.item(),
        lambda m, x: abs(complex(m.gain)),
        lambda m, x: int(m.count),
        lambda m, x: [1.0, 2.0, 3.0, 4.0][m.count],
        lambda m, x: len(range(m.count)),
        lambda m, x: m.plain.norm().item(),
        lambda m, x: (m.layers[0].mix.weight.abs().max() * m.gain).item(),
        lambda m, x: m.layers[1].mix(m.table.new_ones(4)).sum().item() + m.table.clone()[0].item(),
    ],
    "operations": [
        lambda m, x: x[:, : m.count].mean(),
        lambda m, x: torch.arange(m.count).sum(),
        lambda m, x: torch.full((1,), m.gain.item(), dtype=x.dtype),
    ],
    "lists": [
        lambda m, x: sum(m.table.tolist()),
        lambda m, x: sum(float(value) for value in m.table),
        lambda m, x: float(sorted(m.table)[0] + max(m.table)),
        lambda m, x: torch.tensor([m.gain, m.count]).sum(),
        lambda m, x: torch.as_tensor([m.gain.detach() * 1.1]).sum(),
    ],
    "texts": [
        lambda m, x: float(f"{m.count:d}"),
        lambda m, x: float(len(repr(m.table)) + ord(repr(m.table)[8])),
    ],
    "branches": [
        lambda m, x: 2.0 if m.gain > 2.5 else 0.5,
        lambda m, x: 2.0 if torch.is_nonzero(m.count - 2) else 0.5,
        lambda m, x: 2.0 if 7.0 in m.table else 0.5,
        lambda m, x: 2.0 if torch.equal(m.table, torch.tensor([2.0, 1.0, 3.0], dtype=x.dtype)) else 0.9,
        lambda m, x: 2.0 if m.table.allclose(m.table[:1]) else math.ceil(m.table.max().item() * 1.3),
    ],
    "arrays": [
        lambda m, x: float(m.table.numpy().sum()),
        lambda m, x: float(m.gain.detach().cpu().numpy()),
        lambda m, x: float(np.asarray(m.table)[0]),
        lambda m, x: torch.from_numpy(m.table.numpy() * 2).sum(),
    ],
}


@pytest.mark.parametrize("ways", NUMBERS.values(), ids=NUMBERS.keys())
@torch.no_grad()
def test_numbers_of_the_model(ways: list[Read]) -> None:
    model: Any = made(lambda: Reads(lambda m, x: sum(read(m, x) for read in ways)))
    fast = rmtcompile.optimize(model)
    assert_equal_runs(model, fast, [features(3)])
    before = [float(read(model, features(1))) for read in ways]
    changed(model)
    after = [float(read(model, features(1))) for read in ways]
    assert all(x != y for x, y in zip(before, after, strict=True))
    assert_equal_runs(model, fast, [features(3)])
    assert fast.captures == 2


@pytest.mark.parametrize(
    ("read", "line"),
    [
        (lambda m, x: x.sum().item(), "item"),
        (lambda m, x: float(np.asarray(x).sum()), "__array__"),
        (lambda m, x: float(x[0, 0].cpu().numpy()[0]), "numpy"),
        (lambda m, x: torch.tensor([x.sum(), 1.0]).sum(), "tensor"),
        (lambda m, x: 1.0 if torch.equal(x, x) else 2.0, "equal"),
        (lambda m, x: torch.rand(()).item(), "item"),
        (lambda m, x: sum(x[0, 0].tolist()), "tolist"),
    ],
)
@torch.no_grad()
def test_numbers_of_inputs_are_refused(read: Read, line: str) -> None:
    with pytest.raises(CaptureError, match="the forward depends on the values of a tensor") as caught:
        rmtcompile.optimize(made(lambda: Reads(read)))(features(4))
    lines = str(caught.value).splitlines()
    assert "test_known.py:" in lines[1]
    assert lines[-1].startswith("  help: decide it from shapes or Python values")


def test_numpy_views_cannot_be_written() -> None:
    def write(model: Reads, x: Tensor) -> float:
        model.table.numpy()[0] = 5.0
        return 1.0

    model: Any = made(lambda: Reads(write))
    with pytest.raises(CaptureError, match="read-only"), torch.no_grad():
        rmtcompile.optimize(model)(features(4))
    assert model.table.tolist() == [2.0, 1.0, 3.0]


class Counts(Toy):
    """How much of a state is filled is counted in a tensor, made in the forward and carried in it."""

    def __init__(self, in_place: bool) -> None:
        super().__init__(n_layers=2)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        states = [
            (x.new_zeros(x.shape[0], x.shape[2]), torch.zeros(1, dtype=torch.int64)) for _ in self.layers
        ]
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                memory, count = states[l]
                h, memory = layer(h * (1 + min(int(count.item()), SEGMENT)), memory)
                view = count[:1]
                states[l] = memory, view.add_(SEGMENT) if self.in_place else count + SEGMENT
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_counters_of_the_forward(in_place: bool) -> None:
    model = made(lambda: Counts(in_place))
    assert capture(model, (features(3),), {}).read == []
    fast = rmtcompile.optimize(model)
    assert_equal_runs(model, fast, [features(3), features(6)])
    assert fast.captures <= 2  # numbers are not followed without values: a capture takes the place of that


class Tally(Reads):
    """Counts its calls in a buffer, and reads the buffer before or after; or counts segments from zero on."""

    def __init__(self, order: str) -> None:
        super().__init__(lambda m, x: m.tally())
        self.order = order

    def tally(self) -> float:
        if self.order == "segments":
            self.count += 1
            return 2.0 if int(self.count) > 1 else 1.0
        return float(self.count)

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "segments":
            self.count.zero_()
        if self.order == "before":
            self.count[None].add_(1)
        y = super().forward(x)
        if self.order == "after":
            self.count.add_(1)
        return y


@pytest.mark.parametrize("order", ["before", "after", "segments"])
@torch.no_grad()
def test_numbers_of_what_the_forward_writes(order: str) -> None:
    model: Any = made(lambda: Tally(order))
    other = copy.deepcopy(model)
    fast = rmtcompile.optimize(model)
    for segments in (4, 4, 5):
        assert_same(other(features(segments)), fast(features(segments)))
        assert torch.equal(model.count, other.count)
    assert fast.captures - (1 if order == "segments" else 3) in (0, 1)  # one takes the place of following


@torch.no_grad()
def test_a_buffer_that_counts_calls_and_is_read_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmtcompile.dispatch.told.CHANGES", 2)
    fast = rmtcompile.optimize(made(lambda: Tally("after")))
    fast(features(2)), fast(features(2))
    with pytest.warns(RecaptureWarning, match=r"reads a number from count, which was 3 and is 4"):
        fast(features(2))


class WritesInput(Reads):
    """Writes a value of the input into a buffer, directly or through a view, and reads the buffer."""

    def __init__(self, through_view: bool) -> None:
        super().__init__(lambda m, x: 1.0)
        self.through_view = through_view

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        (self.table[:1] if self.through_view else self.table).copy_(y[0, 0, 0])
        return y * sum(self.table.tolist())


@pytest.mark.parametrize("through_view", [False, True])
@torch.no_grad()
def test_what_an_input_was_written_into_is_refused(through_view: bool) -> None:
    model: Any = made(lambda: WritesInput(through_view))
    with pytest.raises(CaptureError, match="the forward depends on the values of a tensor"):
        rmtcompile.optimize(model)(features(4))
    assert model.table.tolist() == [2.0, 1.0, 3.0]


class ReadsFirst(Reads):
    """Reads a buffer, then writes a value of the input into it: the number is of the state before."""

    def forward(self, x: Tensor) -> Tensor:
        kept = self.table.clone()
        y = super().forward(x) * float(self.table[0])
        self.table.copy_(y[0, 0, :3])
        return y * kept[1].item()


@torch.no_grad()
def test_numbers_read_before_an_input_is_written_there() -> None:
    model = made(lambda: ReadsFirst(lambda m, x: 1.0))
    other = copy.deepcopy(model)
    fast = rmtcompile.optimize(model)
    for _ in range(3):
        assert_same(other(features(4)), fast(features(4)))


def test_gradients_and_training() -> None:
    model: Any = made(lambda: Reads(lambda m, x: m.gain * float(m.gain.detach())))
    other = copy.deepcopy(model)
    fast = rmtcompile.optimize(model)
    steps = [torch.optim.SGD(one.parameters(), lr=1e-3) for one in (model, other)]
    for _ in range(3):
        for run, step in zip((fast, other), steps, strict=True):
            step.zero_grad()
            run(features(4)).square().sum().backward()
            step.step()
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    assert fast.captures == 3


@torch.no_grad()
def test_numbers_under_autocast() -> None:
    def read(model: Reads, x: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return (model.layers[0].mix.weight @ model.layers[0].mix.weight).sum().item()

    model = made(lambda: Reads(read))
    assert_equal_runs(model, rmtcompile.optimize(model), [features(4)])


@torch.no_grad()
def test_numbers_of_a_closure() -> None:
    model, scale = made(lambda: Toy(n_layers=2)), torch.tensor(2.0)
    fast = rmtcompile.optimize(lambda x: model(x * float(scale)))
    assert_same(model(features(4) * 2.0), fast(features(4)))
    scale.mul_(3.0)
    assert_same(model(features(4) * 6.0), fast(features(4)))
