"""rmtcompile/binding/guard.py: what a program took for granted is noticed when it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import AttributeState, Layer, Toy, assert_same, features, made

import rmtcompile
from rmtcompile.binding.guard import ReadTracker, call_key, program_key
from rmtcompile.frontend.capture import capture
from rmtcompile.ir.segmentation import Axis, Segmentation


class Configured(Toy):
    """Reads a number, a dictionary, a list and a child's attribute; never reads `unused`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.unused = 2.0, 1
        self.config = {"shift": 1.0}
        self.factors = [1.0, 2.0]
        self.layers[0].on = True

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.config["shift"]
        if self.layers[0].on:
            x = x * self.factors[1]
        return super().forward(x)


def set_scale(m: Any) -> None:
    m.scale = 3.0


def set_config(m: Any) -> None:
    m.config["shift"] = 0.0


def set_factor(m: Any) -> None:
    m.factors[1] = 5.0


def set_child(m: Any) -> None:
    m.layers[0].on = False


def set_type(m: Any) -> None:
    m.scale = 2


def add_hook(m: Any) -> None:
    m.layers[0].mix.register_forward_hook(lambda module, args, out: out + 1)


def add_layer(m: Any) -> None:
    m.layers.append(Layer().double())


def swap_layer(m: Any) -> None:
    m.layers[1] = Layer().double()


CHANGES = [set_scale, set_config, set_factor, set_child, set_type, add_hook, add_layer, swap_layer]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_is_noticed(change: Callable[[Any], None]) -> None:
    model = made(Configured)
    guard = capture(model, (features(2),), {}).guard
    assert guard.broken() is None
    change(model)
    assert guard.broken() is not None


@pytest.mark.parametrize("change", [set_scale, set_child, add_hook, swap_layer])
@torch.no_grad()
def test_a_change_is_recaptured(change: Callable[[Any], None]) -> None:
    model, x = made(Configured), features(3)
    fast = rmtcompile.optimize(model)
    fast(x)
    change(model)
    assert_same(model(x), fast(x))
    assert fast.captures == 2


@torch.no_grad()
def test_what_is_not_read_may_change() -> None:
    model, x = made(Configured), features(3)
    fast = rmtcompile.optimize(model)
    fast(x)
    model.unused = 2
    model.note = "new"
    assert_same(model(x), fast(x))
    assert fast.captures == 1


@torch.no_grad()
def test_a_change_and_back_uses_the_first_program() -> None:
    model, x = made(Configured), features(3)
    fast = rmtcompile.optimize(model)
    for scale in (2.0, 3.0, 2.0, 3.0):
        model.scale = scale
        assert_same(model(x), fast(x))
    assert fast.captures == 2


@torch.no_grad()
def test_state_that_is_reset_is_no_guard() -> None:
    model = made(AttributeState)
    fast = rmtcompile.optimize(model)
    for segments in (2, 4, 3):
        fast(features(segments))
    assert fast.captures == 1


@torch.no_grad()
def test_what_broke_is_said() -> None:
    model = made(Configured)
    guard = capture(model, (features(2),), {}).guard
    model.scale = 3.0
    assert guard.broken() == "Configured.scale was 2.0 and is 3.0"
    del model.scale
    assert guard.broken() == "Configured.scale is gone"


@torch.no_grad()
def test_reads_before_writes() -> None:
    model = made(AttributeState)
    tracker = ReadTracker()
    layer = model.layers[0]
    with tracker.watching({"": model}):
        assert layer.first
        layer.count = 3
        assert layer.count == 3
        assert type(layer) is not type(made(AttributeState).layers[0])
    assert (id(layer), "first") in tracker.reads
    assert (id(layer), "count") not in tracker.reads and (id(layer), "count") in tracker.written
    assert type(layer).__name__ == "AttributeLayer" and type(layer) is type(model.layers[1])


SEGMENTS = Segmentation((Axis(0, 1, 3),))


def keys(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return call_key(args, kwargs), program_key(args, kwargs, SEGMENTS)


def test_keys_do_not_depend_on_values_and_segments() -> None:
    x = features(2)
    assert keys(x) == keys(x + 1) == keys(features(5))


@pytest.mark.parametrize(
    "other",
    [
        lambda x: keys(x.float()),
        lambda x: keys(x, 1),
        lambda x: keys(x=x),
        lambda x: keys(x.clone().requires_grad_()),
        lambda x: keys((x,)),
    ],
)
def test_keys_differ(other: Callable[[Tensor], Any]) -> None:
    x = features(2)
    assert keys(x)[0] != other(x)[0] and keys(x)[1] != other(x)[1]


def test_program_keys_differ_by_batch_and_rest() -> None:
    x = features(2)
    assert keys(x)[1] != keys(x[:1])[1]
    assert keys(x)[1] != keys(x[:, :-1])[1]
    assert keys(x)[0] == keys(x[:1])[0]


def test_keys_depend_on_modes() -> None:
    x = features(2)
    plain = keys(x)
    with torch.no_grad():
        assert keys(x) != plain
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert keys(x) != plain
    assert keys(x) == plain


@torch.no_grad()
def test_dtype_and_default_dtype() -> None:
    model, x = made(Toy), features(3)
    fast = rmtcompile.optimize(model)
    fast(x)
    model.float()
    assert_same(model(x.float()), fast(x.float()))
    model.double()
    assert_same(model(x), fast(x))


def test_modes_of_gradients() -> None:
    model, x = made(Toy), features(3)
    fast = rmtcompile.optimize(model)
    with torch.no_grad():
        assert not fast(x).requires_grad
    assert fast(x).requires_grad
    with torch.no_grad():
        assert not fast(x).requires_grad
    assert isinstance(model, nn.Module)
