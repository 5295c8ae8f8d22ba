"""Layouts: what lies in memory in another way, and forwards that do something else then."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import SEGMENT, WIDTH, Layer, Toy, assert_same, made

import rmtcompile
from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.layouts import in_layout, layout_of, strides_like


def plain(x: Tensor) -> Tensor:
    return x.contiguous()


def turned(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def within(x: Tensor) -> Tensor:
    return torch.cat([x, x[:, :1]], 1)[:, :-1]


def every_second(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2)[..., ::2]


WAYS = (plain, turned, within, every_second)


SHAPES = st.lists(st.integers(1, 4), min_size=3, max_size=3)


@given(SHAPES, st.lists(st.integers(2, 4), min_size=3, max_size=3))
def test_another_shape_in_the_same_layout(shape: list[int], other: list[int]) -> None:
    for way in WAYS:
        x, y = way(torch.randn(other)), torch.randn(shape)
        again = in_layout(y, x)
        assert torch.equal(again, y)
        if min(shape) > 1:
            assert again.stride() == strides_like(x, shape) or layout_of(y) == layout_of(x)
            assert layout_of(again) == layout_of(x)


def test_repeated_elements_stay_one() -> None:
    x = torch.randn(2, 1, 3).expand(2, 5, 3)
    again = in_layout(torch.ones(2, 7, 3), x)
    assert again.stride(1) == 0 and torch.equal(again, torch.ones(2, 7, 3))


class Writes(Layer):
    """Writes into what may be its input, or a copy."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        z = x + m[:, None]
        if self.how == "contiguous":
            z.contiguous().mul_(2)
        elif self.how == "reshape":
            z.reshape(-1, WIDTH)[:, 0] = 1
        else:
            rows = z.flatten(0, 1)
            z.mul_(0.5)
            z = z + rows.view_as(z)
        return x + torch.tanh(self.mix(z)), 0.5 * m + z.mean(1)


def writing(how: str) -> Toy:
    model = Toy()
    for l in range(len(model.layers)):
        model.layers[l] = Writes(how)
    return model


@pytest.mark.parametrize("how", ["contiguous", "reshape", "flatten"])
@pytest.mark.parametrize("first", [plain, turned, within])
@torch.no_grad()
def test_what_depends_on_layouts_has_a_program_for_each(how: str, first: object) -> None:
    model = made(lambda: writing(how))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for way in (first, plain, turned, within):
        for length in (4 * SEGMENT, 11 * SEGMENT, 4 * SEGMENT - 1):
            x = way(torch.randn(2, length, WIDTH, dtype=torch.float64))  # type: ignore[operator]
            assert_same(model(x), fast(x))
    captures = fast.captures
    assert_same(model(turned(x)), fast(turned(x)))
    assert fast.captures == captures


@torch.no_grad()
def test_where_nothing_depends_on_layouts_one_program_serves_all(tmp_path: object) -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for way in WAYS:
        x = way(torch.randn(2, 4 * SEGMENT, WIDTH, dtype=torch.float64))
        assert_same(model(x), fast(x))
    assert fast.captures == 1


@torch.no_grad()
def test_programs_that_depend_on_layouts_are_not_saved(tmp_path: object) -> None:
    fast = rmtcompile.optimize(made(lambda: writing("contiguous")))
    fast(torch.randn(2, 4 * SEGMENT, WIDTH, dtype=torch.float64))
    with pytest.raises(UnsupportedError, match=r"lie in memory.*(\n.*)*test_layouts.py"):
        fast.save(tmp_path)
