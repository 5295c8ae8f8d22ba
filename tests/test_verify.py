"""verify.py: a program that is broken on purpose is noticed, and the first cell is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import AttributeState, Toy, assert_same, features, made

import rmtcompile
from rmtcompile import VerificationError
from rmtcompile.dispatch import verify
from rmtcompile.dispatch.verify import compare, error_of
from rmtcompile.passes.cell.lift import rules


def broken(fast: rmtcompile.Optimized, change: Callable[[Any, dict[str, Tensor]], None]) -> None:
    """Let `change(window, outputs)` alter in place what the cells give."""
    cells = fast.compiled.namespace["CELLS"]
    for name, function in list(cells.items()):

        def altered(run: Any, window: Any, function: Any = function) -> dict[str, Tensor]:
            outputs = function(run, window)
            change(window, outputs)
            return outputs

        cells[name] = altered


def message(fast: rmtcompile.Optimized, *args: Any) -> list[str]:
    with pytest.raises(VerificationError) as caught:
        fast(*args)
    return str(caught.value).splitlines()


def at(segment: int, layer: int) -> Callable[[Any, dict[str, Tensor]], None]:
    """Alters the hidden state of one cell."""

    def change(window: Any, outputs: dict[str, Tensor]) -> None:
        for row, cell in enumerate(zip(window.segments, window.layers, strict=True)):
            if cell == (segment, layer):
                hidden = max(outputs.values(), key=lambda value: value.dim())
                hidden[row] += 0.5

    return change


@pytest.mark.parametrize("cell", [(0, 0), (1, 2), (3, 1)])
@pytest.mark.parametrize("build", [Toy, AttributeState])
@torch.no_grad()
def test_the_first_cell_is_named(build: Any, cell: tuple[int, int]) -> None:
    fast = rmtcompile.optimize(made(build), verify=True).prepare(features(9))
    broken(fast, at(*cell))
    lines = message(fast, features(4))
    assert lines[0].startswith("the result") and "differs from the sequential forward by" in lines[0]
    assert lines[0].endswith("at 4 segments")
    assert lines[1].startswith(f"  first in segment {cell[0]}, layer {cell[1]}: add")
    assert "add.Tensor" in lines[1] and "toys.py:32" in lines[1]
    assert lines[2].startswith("  its value differs from the sequential forward by")


class Rows(Toy):
    """Each layer reads what the layer below wrote one segment before: all segments of a layer run at once."""

    def __init__(self) -> None:
        super().__init__(back=1, up=1)


@torch.no_grad()
def test_the_first_cell_is_named_where_segments_are_rows() -> None:
    fast = rmtcompile.optimize(made(Rows), verify=True, backend="eager").prepare(features(9))
    assert fast.compiled.program.alpha == 0

    def change(window: Any, outputs: dict[str, Tensor]) -> None:
        if window.layer == 1:
            for value in outputs.values():
                value[window.segments.index(2)] += 0.5

    broken(fast, change)
    assert message(fast, features(4))[1].startswith("  first in segment 2, layer 1: ")


@torch.no_grad()
def test_where_a_program_stops() -> None:
    """An error of the program alone is a difference."""
    fast = rmtcompile.optimize(made(Toy), verify=True, backend="eager").prepare(features(9))

    def change(window: Any, outputs: dict[str, Tensor]) -> None:
        if 2 in window.segments:
            raise IndexError("index 7 is out of bounds")

    broken(fast, change)
    lines = message(fast, features(4))
    assert lines[0] == "the program does not cover 4 segments (IndexError: index 7 is out of bounds)"
    assert "before it stops agrees" in lines[1] and "index 7 is out of bounds" in lines[1]


@torch.no_grad()
def test_a_broken_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batching rule that computes something else is found in the first cell that uses it."""
    aten = torch.ops.aten
    monkeypatch.setitem(
        rules.RULES, aten.tanh.default, lambda b, call: b.emit(aten.sigmoid.default, call.args["self"])
    )
    lines = message(rmtcompile.optimize(made(Toy), verify=True), features(3))
    assert lines[1].startswith("  first in segment 0, layer 0: add") and "toys.py:32" in lines[1]


class LeavesAnother(Toy):
    """What it leaves behind is something else while it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        self.left = x.new_full((), 1.0 if type(x) is Tensor else 2.0)
        return super().forward(x)


@torch.no_grad()
def test_what_is_left_behind_is_compared() -> None:
    lines = message(rmtcompile.optimize(made(LeavesAnother), verify=True), features(3))
    assert lines[0].startswith("what is left in left differs from the sequential forward by 1.0e+00")


class Another(Toy):
    """Computes something else while it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if type(x) is Tensor else 2 * x)


@torch.no_grad()
def test_a_capture_that_differs_is_told_apart() -> None:
    lines = message(rmtcompile.optimize(made(Another), verify=True), features(3))
    assert lines[1] == "  all cells give what was captured: the capture itself differs from the model"


@torch.no_grad()
def test_a_raise_leaves_the_model_as_it_was() -> None:
    model = made(AttributeState)
    fast = rmtcompile.optimize(model, verify=True).prepare(features(9))
    model(features(2))
    memory = [layer.memory for layer in model.layers]
    broken(fast, at(1, 1))
    message(fast, features(4))
    assert all(layer.memory is before for layer, before in zip(model.layers, memory, strict=True))


@torch.no_grad()
def test_each_new_program_is_checked() -> None:
    """Also after a recapture, and once for each number of segments."""
    model, ran = made(Toy), []
    model.register_forward_hook(lambda *_: ran.append(0))
    fast = rmtcompile.optimize(model, verify=True)
    counts = []
    for x in (features(3), features(3), features(4), features(3, batch=1), features(4)):
        ran.clear()
        fast(x)
        counts.append(len(ran) > 0)
    assert counts == [True, False, True, True, False]


class InPlaceInput(Toy):
    """Writes into its input, and into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(1)
        x.mul_(2)
        return super().forward(x)


class Centred(nn.Module):
    """Gives the means of normalised values, which are nothing but rounding, or shifted ones."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.toy, self.shift = Toy(), shift

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(self.toy(x), [x.shape[2]]).mean(2) + self.shift


@torch.no_grad()
def test_values_that_are_rounding_alone_are_no_difference() -> None:
    """Where the model itself gives others for an input that differs by roundings."""
    model = made(Centred)
    fast = rmtcompile.optimize(model, verify=True)
    for segments in (3, 7, 12):
        fast(features(segments))
    noise, other = torch.tensor([1e-17, -2e-17]), torch.tensor([-1e-17, 3e-17])
    assert compare(noise, -noise, "it", 0.0) is not None
    assert compare(noise, -noise, "it", 0.0, other) is None
    assert compare(noise, noise + 1e-6, "it", 0.0, other) is not None
    assert compare(noise, -noise, "it", 0.0, noise.clone()) is not None
    x, nudged = torch.ones(4), torch.ones(4) + 1e-4
    allowed = {"tolerance": 0.0, "nudged": nudged}
    assert compare(x, x + 9e-4, "it", **allowed, amplified=1e-2) is None
    assert compare(x, x + 2e-3, "it", **allowed, amplified=1e-2) is not None, "more than the model's own"
    assert compare(x, x + 9e-4, "it", **allowed, amplified=5e-4) is not None
    large, turned = 1e16 * noise, 1e16 * other
    assert compare(large, -large, "it", 0.0, turned) is not None, "chaotic values are compared all the same"


@torch.no_grad()
def test_what_is_written_into_an_input_is_never_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that runs on other inputs writes into those."""
    model = made(InPlaceInput)
    fast = rmtcompile.optimize(model)
    fast(features(4))
    compiled, executor = fast._last[0].compiled, fast._last[0].executor  # type: ignore[index]
    x = features(6)
    assert verify.difference(model, compiled, executor, 6, (x,), {}) is None
    run = type(executor).run

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        *others, last = run(self, *args, **kwargs)
        return (*others, last * 1.5)

    monkeypatch.setattr(type(executor), "run", wrong)
    found = verify.difference(model, compiled, executor, 6, (x,), {})
    assert found is not None and "written into" in found


@torch.no_grad()
def test_inputs_and_buffers_are_written_once() -> None:
    model = made(InPlaceInput)
    fast = rmtcompile.optimize(copy.deepcopy(model), verify=True)
    for _ in range(2):
        x, y = features(3), features(3)
        assert_same((model(x), x), (fast(y), y))
        assert model.total == fast.model.total


def test_with_gradients() -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(model, verify=True)
    fast(features(3)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_compare() -> None:
    x = torch.ones(3)
    assert compare((x, 1), (x + 1e-7, 1), "it") is None
    assert compare(x, x.double(), "it") == "it is torch.float64[3] instead of torch.float32[3]"
    assert compare([x], x, "it") == "it has 1 leaves in another structure instead of 1"
    assert compare((x, 1), (x, 2), "it") == "it, leaf 1, is 2 instead of 1"
    assert "by 1.0e+00 relative" in str(compare(x, 2 * x, "it"))
    nan = torch.tensor([1.0, float("nan")])
    assert error_of(nan, nan) == 0 and error_of(nan, torch.ones(2)) == float("inf")
    assert error_of(torch.arange(3), torch.arange(3)) == 0
    assert error_of(torch.arange(3), torch.zeros(3, dtype=torch.int64)) == float("inf")


class Narrow(Toy):
    """Takes a norm in float32, as models in float64 do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / (1 + x.float().square().mean(-1, keepdim=True).double()))


@pytest.mark.parametrize(("build", "is_rounding"), [(Narrow, True), (Toy, False)])
@torch.no_grad()
def test_rounding_is_that_of_the_lowest_type(
    build: type[Toy], is_rounding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels sum in other orders for other numbers of cells."""
    fast = rmtcompile.optimize(made(build))
    fast(features(5))
    monkeypatch.setattr(verify, "error_of", lambda x, y: 1e-6)
    entry, count = fast._last
    found = fast._programs.difference(entry, count, (features(5),), {})
    assert (found is None) == is_rounding
