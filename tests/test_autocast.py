"""Autocast: each place of a region, and what operations become."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_modes import Dropped
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from toys import SEGMENT, WIDTH, Toy, assert_same, features, made

import rmtcompile
from rmtcompile.errors import CaptureError
from rmtcompile.frontend.capture import capture
from rmtcompile.ir.modes import autocast_as, autocast_state
from rmtcompile.passes.flat.autocast import explicit_autocast

HALF = (("cpu", torch.bfloat16),)
SEGMENTS = (1, 5)


def region(enabled: bool = True, **options: Any) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled, **options)


# --- one operation ------------------------------------------------------------------------------------------


def einsum(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("btk,dk->btd", x, w)


def gru(x: Tensor, w: Tensor) -> Tensor:
    return torch.gru_cell(x[0], x[1], w.repeat(3, 1), w.repeat(3, 1))


OPERATIONS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "linear": (F.linear, {"to", "linear"}),
    "linear of a part": (lambda x, w: F.linear(x[:, ::2], w, w[0]), {"slice", "select", "to", "linear"}),
    "einsum": (einsum, {"to", "einsum"}),
    "attention": (
        lambda x, w: F.scaled_dot_product_attention(x, x, x),
        {"to", "scaled_dot_product_attention"},
    ),
    "pointwise": (lambda x, w: torch.tanh(x) + 1, {"tanh", "add"}),
    "in place": (lambda x, w: x.clone().baddbmm_(x, x).sin_(), {"clone", "baddbmm_", "sin_"}),
    "norm": (lambda x, w: F.layer_norm(F.linear(x, w), (WIDTH,)), {"to", "linear", "layer_norm"}),
    "a recurrent cell": (gru, set()),
    "loss": (lambda x, w: F.cross_entropy(F.linear(x, w)[0], x[0].softmax(-1)), set()),
    "double": (lambda x, w: F.linear(x.double(), w.double()), {"to", "linear"}),
    "mixed": (lambda x, w: torch.cat([F.linear(x, w), x]), set()),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation(name: str) -> None:
    """Same bits without autocast, and of gradients; an operation stays whole where it may."""
    fn, expected = OPERATIONS[name]

    def inside(x: Tensor, w: Tensor) -> Any:
        with region():
            return fn(x, w)

    x, w = torch.randn(2, WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH, WIDTH))
    captured = capture(inside, (x, w), {})
    targets = {node.target for node in captured.graph.nodes if node.op == "call_function"}
    names = {target._opname for target in targets if isinstance(target, torch._ops.OpOverload)}
    assert not expected or names == expected
    with autocast_as():
        got = captured.module(x, w)[0]
    wanted = inside(x, w)
    assert got.dtype == wanted.dtype and torch.equal(got, wanted)
    if not got.requires_grad:
        return
    mine, theirs = (torch.autograd.grad(y.double().sin().sum(), w)[0] for y in (got, wanted))
    assert torch.equal(mine, theirs)


@torch.no_grad()
def test_a_kernel_that_autocast_enters_is_refused() -> None:
    def inside(x: Tensor) -> Tensor:
        with region():
            return F.bilinear(x, x, x[None])

    with pytest.raises(CaptureError, match=r"inside of aten.bilinear") as refused:
        capture(inside, (torch.randn(4, 4),), {})
    assert "test_autocast.py" in str(refused.value)


def test_nothing_to_do_gives_the_same_object() -> None:
    module = make_fx(lambda x: F.linear(x, x), pre_dispatch=True)(torch.randn(2, 2))
    assert explicit_autocast(module) is module


def test_the_state_is_put_back() -> None:
    with torch.autocast("cpu", torch.float16):
        before = autocast_state()
        with autocast_as(HALF):
            assert autocast_state() == HALF
        assert autocast_state() == before == (("cpu", torch.float16),)


# --- places -------------------------------------------------------------------------------------------------


class Around(Toy):
    def forward(self, x: Tensor) -> Tensor:
        with region():
            return super().forward(x)


class Uncached(Toy):
    def forward(self, x: Tensor) -> Tensor:
        with region(cache_enabled=False):
            return super().forward(x)


class Decorated(Toy):
    @region()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Switched(Toy):
    """By the functions below `torch.autocast`."""

    def forward(self, x: Tensor) -> Tensor:
        torch.set_autocast_enabled("cpu", True)
        try:
            return super().forward(x)
        finally:
            torch.set_autocast_enabled("cpu", False)


class Inside(nn.Module):
    """Around a layer, if it is one of some."""

    def __init__(self, inner: nn.Module, enabled: bool) -> None:
        super().__init__()
        self.inner, self.enabled = inner, enabled

    def forward(self, x: Tensor, m: Tensor) -> Any:
        with region(self.enabled):
            return self.inner(x, m)


def in_layers(enabled: Callable[[int], bool], base: type[Toy] = Toy) -> Toy:
    model = base()
    model.layers = nn.ModuleList(Inside(layer, enabled(i)) for i, layer in enumerate(model.layers))
    return model


class Nested(Toy):
    """Full precision inside of a layer, a region of another dtype inside of that."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.read.forward = functools.partial(self.read, layer.read)

    @staticmethod
    def read(linear: nn.Linear, m: Tensor) -> Tensor:
        with region(enabled=False):
            y = F.linear(m.float(), linear.weight)
            with torch.autocast("cpu", torch.float16):
                return y + F.linear(m, linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        with region():
            return super().forward(x)


def wrapped() -> nn.Module:
    """As wrappers for mixed precision do."""
    model = Toy()
    model.forward = region()(model.forward)
    return model


PLACES: dict[str, Callable[[], nn.Module]] = {
    "around": Around,
    "uncached": Uncached,
    "decorated": Decorated,
    "wrapped": wrapped,
    "switched": Switched,
    "in layers": lambda: in_layers(lambda i: True),
    "in some layers": lambda: in_layers(lambda i: i == 1),
    "not in some layers": lambda: in_layers(lambda i: i > 0, Around),
    "nested": Nested,
}


@contextmanager
def nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize("around", [nothing, region])
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_a_place_of_a_region(place: str, around: Callable[[], Any]) -> None:
    """One rounding of bfloat16 would be 4e-3."""
    if around is region and place == "switched":
        pytest.skip("it leaves autocast off")
    model = made(PLACES[place], torch.float32)
    fast = rmtcompile.optimize(model)
    for segments in SEGMENTS:
        x = features(segments, dtype=torch.float32)
        with around():
            assert_same(model(x), fast(x), 1e-6)


@pytest.mark.parametrize("place", ["around", "in some layers", "nested"])
def test_gradients_through_a_region(place: str) -> None:
    """Sums over segments round in bfloat16, in an order of their own."""
    model = made(PLACES[place], torch.float32)
    fast, x = rmtcompile.optimize(model), features(4, dtype=torch.float32)
    mine, theirs = (torch.autograd.grad(f(x).square().sum(), list(model.parameters())) for f in (fast, model))
    assert_same(theirs, mine, 1e-2)


@torch.no_grad()
def test_weights_change_between_calls() -> None:
    model = made(Around, torch.float32)
    fast, x = rmtcompile.optimize(model), features(3, dtype=torch.float32)
    assert_same(model(x), fast(x), 1e-6)
    model.layers[1].mix.weight.mul_(2)
    assert_same(model(x), fast(x), 1e-6)


@torch.no_grad()
def test_states_of_another_dtype_inside_a_region() -> None:
    model = made(Dropped, torch.float32)
    model.forward = region()(model.forward)
    fast = rmtcompile.optimize(model)
    for segments in SEGMENTS:
        assert_same(model(features(segments).float()), fast(features(segments).float()), 1e-6)
    assert SEGMENT > 1
