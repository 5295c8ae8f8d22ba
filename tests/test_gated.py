"""gated.py: a product of two halves that meet elementwise computes the expression too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inductor_graphs import Recurrent, all_but, count, counted, graph_of, needs_compiler, run_on_cpu
from torch import Tensor, fx
from toys import assert_equal_runs, features, made

import rmtcompile
from rmtcompile.passes.cell.inductor import Passes
from rmtcompile.passes.cell.inductor.gated import choose, gated

OPTIONS = {"post_grad_custom_post_pass": Passes(all_but("gated"))}
GATED = torch.ops.rmtcompile.gated_product.default
PRODUCTS = (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)
N, ROWS, D = 3, 5, 4


@pytest.fixture(autouse=True)
def _always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gated.__globals__, "choose", lambda product, gate: (4, True))


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def halves(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return torch.bmm(x, w).reshape(-1, 1, ROWS, 2 * D).split([D, D], -1)


def swiglu(x: Tensor, w: Tensor) -> Tensor:
    g, u = halves(x, w)
    return F.silu(g) * u


def up_first(x: Tensor, w: Tensor) -> Tensor:
    u, g = halves(x, w)
    return u * F.silu(g)


def geglu(x: Tensor, w: Tensor) -> Tensor:
    g, u = torch.bmm(x, w).chunk(2, -1)
    return F.gelu(g) * u


def tanh_geglu(x: Tensor, w: Tensor) -> Tensor:
    g, u = torch.bmm(x, w).chunk(2, -1)
    return F.gelu(g, approximate="tanh") * (u + 1)


def of_one(x: Tensor, w: Tensor) -> Tensor:
    g, u = torch.mm(x[0], w[0]).unsqueeze(0).unsqueeze(1).chunk(2, -1)
    return F.silu(g) * u


def reglu(x: Tensor, w: Tensor) -> Tensor:
    y = torch.bmm(x, w)
    return (y[..., :D].relu() * y[..., D:] - 0.5) / 3


def swish(x: Tensor, w: Tensor) -> Tensor:
    g, u = torch.bmm(x, w).split(D, -1)
    return g * torch.sigmoid(-1.5 * g).sqrt() * torch.rsqrt(u.exp()) * u.tanh()


def plain(x: Tensor, w: Tensor) -> Tensor:
    g, u = torch.mm(x[0], w[0]).split(D, -1)
    return torch.erf(g) * u


FIRES = [swiglu, up_first, geglu, tanh_geglu, of_one, reglu, swish, plain]


def product_read(x: Tensor, w: Tensor) -> Any:
    y = torch.bmm(x, w)
    g, u = y.split(D, -1)
    return g.relu() * u, y.sum()


def half_read(x: Tensor, w: Tensor) -> Any:
    g, u = torch.bmm(x, w).split(D, -1)
    return g.relu() * u, u.sum()


def two_results(x: Tensor, w: Tensor) -> Any:
    g, u = torch.bmm(x, w).split(D, -1)
    return g.relu() * u, g.exp()


def halves_apart(x: Tensor, w: Tensor) -> Any:
    g, u = torch.bmm(x, w).split(D, -1)
    return g.relu(), u


def uneven(x: Tensor, w: Tensor) -> Any:
    g, u = torch.bmm(x, w).split([D - 1, D + 1], -1)
    return g.relu().sum() * u


def quarters(x: Tensor, w: Tensor) -> Any:
    a, b, c, d = torch.bmm(x, w).split(D // 2, -1)
    return a.relu() * b, c * d


def a_half_twice(x: Tensor, w: Tensor) -> Any:
    y = torch.bmm(x, w)
    return y[..., :D].relu() * y[..., :D]


def other_dim(x: Tensor, w: Tensor) -> Any:
    a, b = torch.bmm(x, w).reshape(N, 2 * ROWS, D).chunk(2, 1)
    return a.relu() * b


def biased(x: Tensor, w: Tensor) -> Any:
    g, u = (torch.bmm(x, w) + x.sum()).split(D, -1)
    return g.relu() * u


def unknown(x: Tensor, w: Tensor) -> Any:
    g, u = torch.bmm(x, w).split(D, -1)
    return torch.bernoulli(g.sigmoid()) * u


def with_another(x: Tensor, w: Tensor) -> Any:
    g, u = torch.bmm(x, w).split(D, -1)
    return g.relu() * x * u


def narrowed(x: Tensor, w: Tensor) -> Any:
    g, u = torch.bmm(x, w).split(D, -1)
    return (g * u).float()


def scaled(x: Tensor, w: Tensor) -> Any:
    g, u = torch.bmm(x, w).split(D, -1)
    return torch.add(g, u, alpha=2)


def infinite(x: Tensor, w: Tensor) -> Any:
    g, u = torch.bmm(x, w).split(D, -1)
    return g * u + float("inf")


LEAVES_ALONE = [
    product_read,
    half_read,
    two_results,
    halves_apart,
    uneven,
    quarters,
    a_half_twice,
    other_dim,
    biased,
    unknown,
    with_another,
    narrowed,
    scaled,
]


@pytest.mark.parametrize("function", FIRES, ids=lambda function: function.__name__)
def test_fires(function: Callable[..., Any]) -> None:
    args = [rand(N, ROWS, D), rand(N, D, 2 * D)]
    module = decomposed(function, args)
    gated(module.graph)
    module.graph.lint()
    module.recompile()
    assert count(module.graph, GATED) == 1
    assert not any(node.target in PRODUCTS for node in module.graph.nodes)
    torch.testing.assert_close(module(*args), function(*args))


@pytest.mark.parametrize("function", LEAVES_ALONE, ids=lambda function: function.__name__)
def test_leaves_alone(function: Callable[..., Any]) -> None:
    args = [rand(N, ROWS, D), rand(N, D, 2 * D)]
    module = decomposed(function, args)
    before = str(module.graph)
    gated(module.graph)
    assert str(module.graph) == before


def test_what_follows_is_left_out_where_it_is_not_known() -> None:
    args = [rand(N, ROWS, D), rand(N, D, 2 * D)]
    module = decomposed(infinite, args)
    gated(module.graph)
    module.recompile()
    assert count(module.graph, GATED) == 1
    torch.testing.assert_close(module(*args), infinite(*args))


def test_operands_are_read_where_the_product_was() -> None:
    """Another pass may write over an operand between the product and what is made of it."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = x.exp()
        g, u = torch.bmm(total, w).split(D, -1)
        summed = total + torch.bmm(x, w[..., :D])
        return F.silu(g) * u, summed

    args = [rand(N, ROWS, D), rand(N, D, 2 * D)]
    module = decomposed(function, args)
    Passes()(module.graph)
    module.graph.lint()
    module.recompile()
    assert count(module.graph, GATED) == count(module.graph, torch.ops.rmtcompile.accumulate.default) == 1
    torch.testing.assert_close(module(*args), function(*args))


def decomposed(function: Callable[..., Any], args: list[Tensor]) -> fx.GraphModule:
    """As Inductor has it."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(
        graph_of(function, args), decomposition_table=select_decomp_table(), tracing_mode="fake"
    )(*args)


def test_there_is_no_kernel_on_cpu() -> None:
    args = [rand(N, ROWS, D), rand(N, D, 2 * D)]
    module = decomposed(swiglu, args)
    product = next(node for node in module.graph.nodes if node.target is torch.ops.aten.bmm.default)
    assert choose(product, "") is None


@needs_compiler
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled_by_inductor(dynamic: bool, dtype: torch.dtype) -> None:
    compiled = torch.compile(swiglu, dynamic=dynamic, fullgraph=True, options=OPTIONS)
    for n in (N, N + 1):
        x, w = rand(n, ROWS, D), rand(n, D, 2 * D)
        tolerance = {} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
        got = compiled(x.to(dtype), w.to(dtype))
        torch.testing.assert_close(got, swiglu(x.to(dtype), w.to(dtype)), **tolerance)


@needs_compiler
def test_gradients_of_a_compiled_function() -> None:
    compiled = torch.compile(swiglu, fullgraph=True, options=OPTIONS)
    args = [rand(N, ROWS, D).requires_grad_(), rand(N, D, 2 * D).requires_grad_()]
    mine = torch.autograd.grad(compiled(*args).sin().sum(), args)
    torch.testing.assert_close(mine, torch.autograd.grad(swiglu(*args).sin().sum(), args))


class Gated(Recurrent):
    """Gate and up projections."""

    sizes = {"gate": (4, 6), "up": (4, 6), "down": (6, 4)}  # noqa: RUF012

    def within(self, h: Tensor, layer: Any) -> Tensor:
        return h + layer["down"](F.silu(layer["gate"](h)) * layer["up"](h))


@needs_compiler
@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_program(monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_cpu(monkeypatch, "gated")
    found = counted(monkeypatch, GATED)
    model = made(Gated)
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="inductor")
    assert_equal_runs(model, fast, [features(1), features(4), features(2), features(7)])
    assert max(found) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("cells", "rows", "inner", "half"),
    [(1, 128, 64, 128), (3, 200, 96, 136), (2, 1, 8, 8), (5, 129, 1000, 264), (1, 384, 2048, 4096)],
)
def test_the_kernel(cells: int, rows: int, inner: int, half: int, dtype: torch.dtype) -> None:
    kernel = pytest.importorskip("rmtcompile.passes.cell.inductor.gated_kernel")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    x = torch.randn(cells, rows, inner, device="cuda").to(dtype)
    w = (torch.randn(cells, 2 * half, inner, device="cuda") / inner**0.5).to(dtype).mT
    for name, text in GATES.items():
        expected = torch.ops.rmtcompile.gated_product(x.cpu().float(), w.cpu().float(), text, 0, False)
        for config in kernel.CONFIGS:
            got = kernel.gated_product(x, w, text, config).cpu().float()
            error = (got - expected).norm() / expected.norm()
            assert error < 5e-3, (name, config)
        apart = kernel._product_apart(x, w, text).cpu().float()
        assert (apart - expected).norm() < 1e-2 * expected.norm(), name


GATES = {
    "swiglu": "def gate(x0, x1):\n    y0 = x0 * sigmoid(x0)\n    return y0 * x1\n",
    "all": "def gate(x0, x1):\n    y0 = erf(x0) + exp(tanh(x1))\n    return y0 / rsqrt(sqrt(relu(x0) + 1))\n",
}


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_by_inductor_on_cuda(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    found = counted(monkeypatch, GATED)
    torch._dynamo.reset()
    compiled = torch.compile(swiglu_wide, dynamic=dynamic, fullgraph=True, options=OPTIONS)
    for n in (4, 5, 1):
        x = torch.randn(n, 256, 512, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(n, 2048, 512, device="cuda", dtype=torch.bfloat16).mul_(0.05).mT
        expected = swiglu_wide(x.double(), w.double())
        assert (compiled(x, w) - expected).norm() < 1e-2 * expected.norm()
    assert found == [1] * len(found) and found


@pytest.mark.gpu
def test_the_choice_is_measured() -> None:
    kernel = pytest.importorskip("rmtcompile.passes.cell.inductor.gated_kernel")
    state, text = torch.cuda.get_rng_state(), GATES["swiglu"]
    sizes = (torch.device("cuda", 0), torch.bfloat16, 4, 256, 512, 1024)
    best = kernel.fastest(*sizes, text)
    assert best is None or best in kernel.CONFIGS
    assert kernel.fastest(*sizes, text) is best
    assert kernel.fastest(*sizes, text.replace("sigmoid", "unknown")) is None, "what does not compile"
    assert torch.equal(torch.cuda.get_rng_state(), state)


def swiglu_wide(x: Tensor, w: Tensor) -> Tensor:
    g, u = torch.bmm(x, w).reshape(-1, 1, 256, 2048).chunk(2, -1)
    return F.silu(g) * u
