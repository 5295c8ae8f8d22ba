"""runtime/unread.py: parameters that only unread memories depend on have no gradients, as in the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import assert_same, made

import rmtcompile
from rmtcompile.runtime.unread import dependents

pytestmark = pytest.mark.filterwarnings("default")  # torch's own, of a tensor that is no leaf


class Writing(nn.Module):
    """A layer whose `write` makes nothing but its memory."""

    def __init__(self, d: int = 4, keeps: bool = False) -> None:
        super().__init__()
        self.mix, self.read, self.write = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.keeps, self.memory = keeps, torch.zeros(1, d, dtype=torch.float64)

    def forward(self, h: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        h = h + torch.tanh(self.mix(h)) * torch.sigmoid(self.read(memory))[:, None]
        return h, memory + torch.tanh(self.write(h.mean(1)))


class Walk(nn.Module):
    """Layers of that kind; memories begin with a parameter, and may be left in the layers."""

    def __init__(self, back: int = 1, keeps: bool = False, shares: bool = False) -> None:
        super().__init__()
        layers = [Writing(keeps=keeps) for _ in range(3)]
        for layer in layers[1:] if shares else ():
            layer.write = layers[0].write
        self.layers, self.back = nn.ModuleList(layers), back
        self.start = nn.Parameter(torch.randn(1, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        written: list[list[Tensor]] = [[self.start.expand(x.shape[0], 4)] * self.back for _ in self.layers]
        outs = []
        for h in x.split(4, 1):
            for layer, memories in zip(self.layers, written, strict=True):
                h, memory = layer(h, memories[-self.back])
                memories.append(memory)
                if layer.keeps:
                    layer.memory = memory
            outs.append(self.head(h))
        return torch.cat(outs, 1)


class Tokens(nn.Module):
    """Memory tokens that go through all layers; what comes behind the layers makes the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.start, self.write = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        memory, outs = self.start.expand(x.shape[0], 1, 4), []
        for h in x.split(4, 1):
            h = torch.cat([memory, h], 1)
            for layer in self.layers:
                h = h + torch.tanh(layer(h))
            memory = torch.tanh(self.write(h[:, :1]))
            outs.append(h[:, 1:])
        return torch.cat(outs, 1)


def gradients(call: Any, model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    call(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore::rmtcompile.errors.SequentialScheduleWarning")
@pytest.mark.parametrize(
    "build",
    [Walk, lambda: Walk(2), lambda: Walk(keeps=True), lambda: Walk(shares=True), Tokens],
    ids=["memories", "two back", "left behind", "shared", "tokens"],
)
@pytest.mark.parametrize("recompute", ["none", "level"])
def test_gradients_of_short_texts(build: Any, recompute: str) -> None:
    model = made(build)
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin, backend="aot_eager", recompute=recompute)
    without = set()
    for segments in (3, 1, 2, 4):
        x = torch.randn(2, 4 * segments, 4, dtype=torch.float64)
        theirs, mine = gradients(model, model, x), gradients(fast, twin, x)
        nothing = {name for name, grad in theirs.items() if grad is None}
        assert nothing == {name for name, grad in mine.items() if grad is None}
        assert_same(*({k: g for k, g in one.items() if g is not None} for one in (theirs, mine)), 1e-9)
        without |= nothing
    assert any("write" in name for name in without)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_steps_of_one_segment() -> None:
    """Launched, recorded, replayed."""
    model = made(Walk).cuda()
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin)
    x = torch.randn(2, 4, 4, dtype=torch.float64, device="cuda")
    theirs = gradients(model, model, x)
    for _ in range(4):
        mine = gradients(fast, twin, x)
        assert [name for name, grad in mine.items() if grad is None] == [
            name for name, grad in theirs.items() if grad is None
        ]
        assert_same(*({k: g for k, g in one.items() if g is not None} for one in (theirs, mine)), 1e-9)


def test_parts_of_one_segment() -> None:
    """What a part writes is read by the next one, unless its history ends there."""
    model = made(Walk)
    fast = rmtcompile.optimize(model, backend="aot_eager")
    x = torch.randn(2, 8, 4, dtype=torch.float64)
    for ends in (False, True):
        model.zero_grad(set_to_none=True)
        _, state = fast.run(x[:, :4])
        out, _ = fast.run(x[:, 4:], state=state.detach() if ends else state)
        out.square().sum().backward()
        assert (model.layers[0].write.weight.grad is None) == ends


class Returning(Walk):
    """Gives its memories, too, stacked."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        memories = [self.start.expand(x.shape[0], 4) for _ in self.layers]
        outs = []
        for h in x.split(4, 1):
            for i, layer in enumerate(self.layers):
                h, memories[i] = layer(h, memories[i])
            outs.append(self.head(h))
        return torch.cat(outs, 1), torch.stack(memories)


@pytest.mark.parametrize("used", [0, 1])
def test_a_loss_of_some_results(used: int) -> None:
    model = made(Returning)
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin, backend="aot_eager")
    for segments in (3, 1, 2, 5):
        x = torch.randn(2, 4 * segments, 4, dtype=torch.float64)
        calls = (lambda x: model(x)[used]), (lambda x: fast(x)[used])
        theirs, mine = (gradients(call, one, x) for call, one in zip(calls, (model, twin), strict=True))
        assert [k for k, g in theirs.items() if g is None] == [k for k, g in mine.items() if g is None]
        assert_same(*({k: g for k, g in one.items() if g is not None} for one in (theirs, mine)), 1e-9)


def test_an_optimizer_passes_them_over() -> None:
    """Ten steps of texts that grow: the same weights, those that decay included."""
    model = made(Walk)
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin, backend="aot_eager")
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-2, weight_decay=0.1) for one in (model, twin)]
    for segments in (1, 1, 1, 2, 2, 1, 3):
        x = torch.randn(2, 4 * segments, 4, dtype=torch.float64)
        for call, one, optimizer in zip((model, fast), (model, twin), optimizers, strict=True):
            gradients(call, one, x)
            optimizer.step()
    assert_same(model.state_dict(), twin.state_dict(), 1e-9)


def test_dependents() -> None:
    def cell(a: Tensor, b: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        return a * b, b.sin(), n + 1

    a, n = torch.randn(3), torch.arange(3)
    assert dependents(cell, (a, a, n)) == (frozenset([0]), frozenset([0, 1]), frozenset())
    assert dependents(lambda a: (a[int(a[0].item()) :],), (a,)) is None
