"""accumulate.py: products write over what they are added to, where nobody reads it later."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inductor_graphs import Recurrent, all_but, count, counted, graph_of, needs_compiler, run_on_cpu
from torch import Tensor
from toys import assert_equal_runs, features, made

import rmtcompile
from rmtcompile.passes.cell.inductor import Passes
from rmtcompile.passes.cell.inductor.accumulate import accumulate

OPTIONS = {"post_grad_custom_post_pass": Passes(all_but("accumulate"))}
ADD = torch.ops.rmtcompile.accumulate.default
STORE = torch.ops.rmtcompile.store.default
N, ROWS, D = 3, 5, 4


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def layer(x: Tensor, up: Tensor, down: Tensor, place: Tensor) -> tuple[Tensor, ...]:
    """Two residual sums; the second goes to a lane, and what comes after reads it."""
    residual = x * 2
    residual = residual + torch.bmm(norm(residual), up)
    residual = residual + torch.bmm(torch.bmm(norm(residual), up).sin(), down)
    place.copy_(residual)
    return (residual[:, -1].sum(-1),)


def viewed(x: Tensor, up: Tensor, down: Tensor, place: Tensor) -> tuple[Tensor, ...]:
    summed = x.unsqueeze(1).exp() + torch.bmm(x, up).reshape(N, 1, ROWS, D)
    return (summed.sin(), place)


def plain(x: Tensor, up: Tensor, down: Tensor, place: Tensor) -> tuple[Tensor, ...]:
    return (torch.mm(x[0], up[0]).sin() + torch.mm(x[1], up[1]), place)


def of_products(x: Tensor, up: Tensor, down: Tensor, place: Tensor) -> tuple[Tensor, ...]:
    place.copy_(torch.bmm(x, up) + torch.bmm(x, down))
    return (x,)


FIRES: dict[str, tuple[Callable[..., Any], int, int]] = {  # function, sums, stores
    "layer": (layer, 2, 1),
    "viewed": (viewed, 1, 0),
    "mm": (plain, 1, 0),
    "a sum of products": (of_products, 1, 0),
}


def read_later(x: Tensor, up: Tensor) -> Any:
    residual = x.exp()
    return (residual + torch.bmm(x, up), residual.sin())


def read_later_by_a_view(x: Tensor, up: Tensor) -> Any:
    residual = x.exp()
    last = residual[:, -1]
    return (residual + torch.bmm(x, up), last.sin())


def returned(x: Tensor, up: Tensor) -> Any:
    residual = x.exp()
    return (residual + torch.bmm(x, up), residual)


def an_input(x: Tensor, up: Tensor) -> Any:
    return (x + torch.bmm(x, up),)


def a_view_of_an_input(x: Tensor, up: Tensor) -> Any:
    return (x.transpose(0, 1).transpose(0, 1) + torch.bmm(x, up),)


def its_own_factor(x: Tensor, up: Tensor) -> Any:
    residual = x.exp()
    return (residual + torch.bmm(residual.view(N, ROWS, D), up),)


def broadcast(x: Tensor, up: Tensor) -> Any:
    return (x.exp() + torch.bmm(x[:1], up[:1]),)


def product_read_twice(x: Tensor, up: Tensor) -> Any:
    product = torch.bmm(x, up)
    return (x.exp() + product, product.sin())


def scaled(x: Tensor, up: Tensor) -> Any:
    return (torch.add(x.exp(), torch.bmm(x, up), alpha=2),)


def transposed(x: Tensor, up: Tensor) -> Any:
    residual = x.transpose(1, 2).contiguous().exp().transpose(1, 2).sin()  # strides of the operand
    return (residual + torch.bmm(x, up),)


def random(x: Tensor, up: Tensor) -> Any:
    return (torch.bernoulli(x.sigmoid()) + torch.bmm(x, up),)


LEAVES_ALONE = [
    read_later,
    read_later_by_a_view,
    returned,
    an_input,
    a_view_of_an_input,
    its_own_factor,
    broadcast,
    product_read_twice,
    scaled,
    transposed,
    random,
]


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str) -> None:
    function, sums, stores = FIRES[name]
    args = [rand(N, ROWS, D), rand(N, D, D), rand(N, D, D), rand(N, ROWS, D)]
    module = graph_of(function, args)
    accumulate(module.graph)
    module.graph.lint()
    module.recompile()
    assert (count(module.graph, ADD), count(module.graph, STORE)) == (sums, stores)
    mine, theirs = [[x.clone() for x in args] for _ in range(2)]
    for result, expected in zip((*module(*mine), *mine), (*function(*theirs), *theirs), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("function", LEAVES_ALONE, ids=lambda function: function.__name__)
def test_leaves_alone(function: Callable[..., Any]) -> None:
    args = [rand(N, ROWS, D), rand(N, D, D)]
    module = graph_of(function, args)
    before = str(module.graph)
    accumulate(module.graph)
    assert str(module.graph) == before


def test_a_place_that_is_read_is_not_written_early() -> None:
    def swap(x: Tensor, up: Tensor, place: Tensor) -> tuple[Tensor, ...]:
        summed = x.exp() + torch.bmm(x, up)
        kept = place.sin()
        place.copy_(summed)
        return (kept,)

    args = [rand(N, ROWS, D), rand(N, D, D), rand(N, ROWS, D)]
    module = graph_of(swap, args)
    accumulate(module.graph)
    module.recompile()
    assert (count(module.graph, ADD), count(module.graph, STORE)) == (1, 0)
    mine, theirs = [[x.clone() for x in args] for _ in range(2)]
    torch.testing.assert_close((module(*mine), mine), (swap(*theirs), theirs))


def test_totals_that_are_made_of_each_other() -> None:
    def nested(x: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        first = x.exp()
        second = first * 2
        return (first + torch.bmm(x, up), second + torch.bmm(x, up.sin()))

    args = [rand(N, ROWS, D), rand(N, D, D)]
    module = graph_of(nested, args)
    accumulate(module.graph)
    module.recompile()
    assert count(module.graph, ADD) == 2
    torch.testing.assert_close(module(*args), nested(*args))


@needs_compiler
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_by_inductor(dynamic: bool) -> None:
    compiled = torch.compile(layer, dynamic=dynamic, fullgraph=True, options=OPTIONS)
    for n in (N, N + 1):
        args = [rand(n, ROWS, D), rand(n, D, D), rand(n, D, D), torch.zeros(n, ROWS, D, dtype=torch.float64)]
        mine, theirs = [[x.clone() for x in args] for _ in range(2)]
        torch.testing.assert_close((compiled(*mine), mine), (layer(*theirs), theirs))


@needs_compiler
def test_gradients_of_a_compiled_function() -> None:
    def function(x: Tensor, up: Tensor) -> Tensor:
        residual = x.exp()
        residual = residual + torch.bmm(norm(residual), up)
        return residual + torch.bmm(residual.sin(), up)

    compiled = torch.compile(function, fullgraph=True, options=OPTIONS)
    args = [rand(N, ROWS, D).requires_grad_(), rand(N, D, D).requires_grad_()]
    mine = torch.autograd.grad(compiled(*args).sin().sum(), args)
    torch.testing.assert_close(mine, torch.autograd.grad(function(*args).sin().sum(), args))


class Residual(Recurrent):
    """Two residual sums a layer, the first of them with what the layer remembers."""

    sizes = {"up": (4, 4), "down": (4, 4)}  # noqa: RUF012

    def within(self, h: Tensor, layer: Any) -> Tensor:
        h = h + layer["up"](norm(h))
        return h + layer["down"](norm(h).sin())


@needs_compiler
@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_program(monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_cpu(monkeypatch, "accumulate")
    added = counted(monkeypatch, ADD)
    model = made(Residual)
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="inductor")
    assert_equal_runs(model, fast, [features(1), features(4), features(2), features(7)])
    assert max(added) == 2
