"""Sharing: parameters that are one with others stay so, and tensors that lose their memory are told of."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toys import Toy, assert_same, features, made

import rmtcompile


def trained(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One step; gives the result and the gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    out = run(x)
    out.square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    return out.detach(), gradients


def tie(model: nn.Module) -> None:
    for layer in model.layers[:-1]:
        layer.mix.weight = model.layers[-1].mix.weight


def tie_data(model: nn.Module) -> None:
    for layer in model.layers[:-1]:
        layer.mix.weight.data = model.layers[-1].mix.weight.data


def flatten(model: nn.Module) -> None:
    """As trainers do that update all parameters at once."""
    model.flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    start = 0
    for p in model.parameters():
        p.data = model.flat[start : start + p.numel()].view_as(p)
        start += p.numel()


@pytest.mark.parametrize("change", [tie, tie_data, flatten])
@pytest.mark.parametrize("before", [False, True], ids=["at once", "after a call"])
def test_parameters_that_share_memory_go_on_to(change: Callable[[nn.Module], None], before: bool) -> None:
    theirs, mine = made(Toy), made(Toy)
    fast = rmtcompile.optimize(mine)
    if before:
        trained(theirs, theirs, features(4))
        trained(mine, fast, features(4))
    change(theirs)
    change(mine)
    for step in range(3):
        assert_same(trained(theirs, theirs, features(4)), trained(mine, fast, features(4)))
        with torch.no_grad():
            for model in (theirs, mine):
                if change is flatten:
                    model.flat.mul_(1.0 + step / 10)
                else:
                    model.layers[-1].mix.weight.mul_(1.0 + step / 10)
            assert_same(theirs(features(5)), fast(features(5)))


@torch.no_grad()
def test_memory_of_several_processes_stays_theirs(caplog: pytest.LogCaptureFixture) -> None:
    model = made(Toy).share_memory()
    fast = rmtcompile.optimize(model)
    with caplog.at_level(logging.WARNING, "rmtcompile"):
        for _ in range(2):
            assert_same(model(features(4)), fast(features(4)))
    assert all(p.is_shared() for p in model.parameters())
    assert caplog.text.count("are shared with other processes: they stay where they are") == 1


def test_who_holds_the_memory_of_before_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = made(Toy)
    out = model(features(4))  # what backward keeps does not count
    with caplog.at_level(logging.WARNING, "rmtcompile"):
        rmtcompile.optimize(copy.deepcopy(model))(features(4))
        rmtcompile.optimize(model)(features(4))
        assert "take them again" not in caplog.text
        other = made(Toy)
        kept = other.state_dict()
        rmtcompile.optimize(other)(features(4))
    assert caplog.text.count("take them again") == 1
    assert len(kept) == len(list(other.parameters())) and out.requires_grad


@torch.no_grad()
def test_tensors_without_memory_are_passed_over() -> None:
    """Those of transforms look like any others."""
    model = made(Toy)
    kept = model.state_dict()
    leaked: list[Tensor] = [torch.eye(2).to_sparse()]
    torch.func.vmap(lambda x: leaked.append(x) or x)(torch.ones(2, 3))  # type: ignore[func-returns-value]
    assert_same(model(features(4)), rmtcompile.optimize(copy.deepcopy(model))(features(4)))
    assert_same(model(features(4)), rmtcompile.optimize(model)(features(4)))
    assert len(leaked) == 2 and kept
