"""Forwards that take gradients themselves, or use other transforms of torch.func: memories that learn while
they are read (TTT, 2407.04620; Titans, 2501.00663)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from toys import SEGMENT, assert_same, features, made

import rmtcompile
from rmtcompile.errors import CaptureError
from rmtcompile.passes.flat.attention import attention


class Learning(nn.Module):
    """Each layer has a linear map for each input that takes one step of descent a segment."""

    def __init__(self, step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step
        self.starts = nn.ParameterList(nn.Parameter(torch.randn(4, 4)) for _ in range(3))
        self.keys = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        maps, out = [start.expand(x.shape[0], -1, -1) for start in self.starts], []
        for h in x.split(SEGMENT, 1):
            for l, key in enumerate(self.keys):
                k = key(h)
                maps[l] = maps[l] - 0.3 * self.step(maps[l], k, h)
                h = h + torch.tanh(k @ maps[l])
            out.append(h)
        return torch.cat(out, 1)


def loss(w: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ w - v).square().mean((-2, -1)).sum()


def by_autograd(w: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.enable_grad():
        w = w.detach().requires_grad_()
        return torch.autograd.grad(loss(w, k, v), w)[0]


def recall(memory: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda own, k: functional_call(memory, own, (k,))


def surprise(memory: nn.Module) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    return lambda own, k, v: (recall(memory)(own, k) - v).square().mean()


class PerInput(nn.Module):
    """A network as memory, with weights of its own for each input, and attention beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.memories = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4, bias=False), nn.SiLU(), nn.Linear(4, 4)) for _ in range(3)
        )
        self.projections = nn.ModuleList(nn.Linear(4, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = [
            {name: p.expand(x.shape[0], *p.shape) for name, p in memory.named_parameters()}
            for memory in self.memories
        ]
        out = []
        for h in x.split(SEGMENT, 1):
            for l, (memory, project) in enumerate(zip(self.memories, self.projections, strict=True)):
                h, weights[l] = self.layer(h, memory, project, weights[l])
            out.append(h)
        return torch.cat(out, 1)

    def layer(self, h: Tensor, memory: nn.Module, project: nn.Module, weights: Any) -> tuple[Tensor, Any]:
        q, k, v = project(h).chunk(3, -1)
        seen = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]
        remembered = vmap(recall(memory))(weights, q)
        learnt = vmap(grad(surprise(memory)))(weights, k, v)
        return h + seen + remembered, {name: 0.9 * w - 0.1 * learnt[name] for name, w in weights.items()}


class Apart(PerInput):
    """What is learnt is computed in a second call of the memory, after another module: a layer of its own,
    which is dead in the last segment, and in the only one."""

    def __init__(self) -> None:
        super().__init__()
        self.memories = nn.ModuleList(nn.Sequential(nn.Linear(4, 4, bias=False)) for _ in range(3))

    def layer(self, h: Tensor, memory: nn.Module, project: nn.Module, weights: Any) -> tuple[Tensor, Any]:
        remembered = vmap(recall(memory))(weights, h)
        q, k, v = project(h).chunk(3, -1)
        learnt = vmap(grad(surprise(memory)))(weights, k, v)
        return h + torch.tanh(q + remembered), {n: 0.9 * w - 0.1 * learnt[n] for n, w in weights.items()}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "grad": lambda: Learning(grad(loss)),
    "autograd": lambda: Learning(by_autograd),
    "vmap_grad": PerInput,
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_equal_on_diagonals(build: Callable[[], nn.Module]) -> None:
    model = made(build)
    fast = rmtcompile.optimize(model)
    for segments in (5, 1, 3, 8):
        x = features(segments)
        assert_same(model(x), fast(x))
    x = features(4)[:, :-1]
    assert_same(model(x), fast(x))
    assert fast.schedule.level_rule == "s + l"


@torch.no_grad()
def test_layers_that_are_dead_at_the_end() -> None:
    model = made(Apart)
    fast = rmtcompile.optimize(model)
    for segments in (5, 1, 3, 8):
        x = features(segments)
        assert_same(model(x), fast(x))
    assert "memories.0" in fast.compiled.layer_paths


@pytest.mark.parametrize("name", ["grad", "vmap_grad"])
def test_gradients_of_gradients(name: str) -> None:
    model = made(MODELS[name])
    fast = rmtcompile.optimize(model)
    x = features(4).requires_grad_()
    expected, got = (
        torch.autograd.grad(f(x).square().sum(), [x, *model.parameters()]) for f in (model, fast)
    )
    assert_same(expected, got)


def test_what_has_no_gradient_is_not_given_one() -> None:
    fast = rmtcompile.optimize(made(MODELS["autograd"]))
    with pytest.raises(CaptureError, match="takes gradients itself, and has a region without them"):
        fast(features(3))


class Half(Learning):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@torch.no_grad()
def test_autocast_inside_and_around() -> None:
    x = features(3).float()
    model = Half(grad(loss))
    assert_same(model(x), rmtcompile.optimize(model)(x))
    with torch.autocast("cpu", torch.bfloat16):
        plain = Learning(grad(loss))
        assert_same(plain(x), rmtcompile.optimize(plain)(x))


@torch.no_grad()
def test_kernels_of_attention_are_whole_again() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def fn(q: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        plain = F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=0.3)
        masked = F.scaled_dot_product_attention(q, k[:, :1].expand_as(k), k, attn_mask=mask)
        return plain, masked

    given = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), torch.randn(6, 6)
    traced = make_fx(fn, tracing_mode="fake")(*given)
    targets = [str(node.target) for node in attention(traced).graph.nodes if "attention" in str(node.target)]
    assert targets == ["aten.scaled_dot_product_attention.default"] * 2
    assert_same(fn(*given), tuple(traced(*given)))
