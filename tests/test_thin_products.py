"""passes/cell/thin_products.py: products with one column become sums; wider ones are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_grouped_query import rand, run, trace
from toys import AttributeState, assert_equal_runs, features, made

import rmtcompile
from rmtcompile.passes.cell.lift import lift
from rmtcompile.passes.cell.thin_products import is_thin, thin_products

Cell = Callable[..., Any]

FIRES: dict[str, tuple[Cell, list[torch.Tensor]]] = {
    "matmul": (lambda phi, z: phi @ z.unsqueeze(-1), [rand(2, 3, 5, 4), rand(2, 3, 4)]),
    "broadcast": (lambda phi, z: phi @ z.unsqueeze(-1), [rand(2, 3, 5, 4), rand(4)]),
    "bmm": (torch.bmm, [rand(2, 5, 4), rand(2, 4, 1)]),
    "mm": (torch.mm, [rand(5, 4), rand(4, 1)]),
    "linear": (F.linear, [rand(2, 5, 4), rand(1, 4)]),
    "bias": (F.linear, [rand(2, 5, 4), rand(1, 4), rand(1)]),
    "several users": (lambda a, b: (a @ b).exp() + (a @ b).sum(), [rand(2, 5, 4), rand(2, 4, 1)]),
    "chain": (lambda a, b, c: (a @ b) @ c, [rand(5, 4), rand(4, 1), rand(1, 1)]),
}


def assert_close(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FIRES)
def test_fires(name: str) -> None:
    cell, args = FIRES[name]
    graph = trace(cell, args)
    before = str(graph)
    thin = thin_products(graph)
    assert str(graph) == before and not any(is_thin(node) for node in thin.nodes)
    thin.lint()
    assert_close(run(thin, args), cell(*args))


@pytest.mark.parametrize("name", FIRES)
def test_lifted(name: str) -> None:
    """Each of n cells gets what it gets alone."""
    cell, args = FIRES[name]
    graph = thin_products(trace(cell, args))
    stacked = [torch.stack([arg, arg + 1, 2 * arg]) for arg in args]
    names = [node.name for node in graph.nodes if node.op == "placeholder"]
    got = run(lift(graph, names).graph, stacked)
    got = got[0] if isinstance(got, (tuple, list)) else got
    assert_close(got, torch.stack([cell(*(arg[i] for arg in stacked)) for i in range(3)]))


@pytest.mark.parametrize(
    ("cell", "args"),
    [
        (torch.matmul, [rand(5, 4), rand(4, 2)]),
        (torch.matmul, [rand(5, 4), rand(4)]),
        (torch.matmul, [rand(4), rand(4, 1)]),
        (F.linear, [rand(5, 4), rand(3, 4)]),
    ],
)
def test_leaves_alone(cell: Cell, args: list[torch.Tensor]) -> None:
    graph = trace(cell, args)
    assert thin_products(graph) is graph


def test_half_precision_sums_in_float32() -> None:
    a, b = rand(64, 512), rand(512, 1)
    graph = thin_products(trace(torch.mm, [a.bfloat16(), b.bfloat16()]))
    (got,) = [run(graph, [a.bfloat16(), b.bfloat16()])]
    exact = a.bfloat16().double() @ b.bfloat16().double()
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).norm() / exact.norm() < 3e-3


@torch.no_grad()
def test_only_for_compiled_cells() -> None:
    fast = rmtcompile.optimize(made(AttributeState))
    assert_equal_runs(made(AttributeState), fast, [features(3)])
    assert "thin_products" in fast._programs._compile_options((features(3),), {}).passes_off
    compiled = rmtcompile.optimize(made(AttributeState), backend="aot_eager")
    assert_equal_runs(made(AttributeState), compiled, [features(3)])
    assert "thin_products" not in compiled._programs._compile_options((features(3),), {}).passes_off
