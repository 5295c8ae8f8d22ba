"""What the cases of tests/ranks.py and tests/rank_faults.py are made of: models, calls, a rank's device."""

from __future__ import annotations

from typing import Any

import torch
import toys
from test_blocks import Player
from torch.utils._pytree import tree_leaves
from toys import Toy
from zoo.others import ZOO

import rmtcompile

DEVICES = ["cpu"]  # of this rank


def features(segments: int, **options: Any) -> torch.Tensor:
    return toys.features(segments, **options).to(DEVICES[-1])


def made(build: Any, **options: Any) -> torch.nn.Module:
    return toys.made(build, **options).to(DEVICES[-1])


def of_zoo(name: str, segments: int) -> tuple[torch.nn.Module, torch.Tensor]:
    entry = ZOO[name]
    (x,) = entry.inputs(2, segments)
    return entry.build().to(DEVICES[-1]), x.to(DEVICES[-1])


def kind() -> str:
    return torch.device(DEVICES[-1]).type


def optimized(model: torch.nn.Module, group: Any, **options: Any) -> Any:
    return rmtcompile.optimize(model, devices=group, backend="eager", **options)


class Failing(Toy):
    """Its embedding does not know all numbers."""

    def __init__(self) -> None:
        super().__init__(4)
        self.table = torch.nn.Embedding(5, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(self.table(ids))


def gradients(call: Any, model: torch.nn.Module, x: torch.Tensor) -> Any:
    """What a call gives, and the gradients of a loss of it."""
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    model.zero_grad()
    result = call(x)
    floats = [y for y in tree_leaves(result) if isinstance(y, torch.Tensor) and y.is_floating_point()]
    weighed = [(y * torch.linspace(0, 1, y.shape[-1]).to(y)).mean() for y in floats]
    torch.stack(weighed).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return result, found, x.grad


def refused(call: Any, kind: type[Exception] = rmtcompile.RMTCompileError) -> Any:
    try:
        call()
    except kind as error:
        return [type(error).__name__, str(error)]
    return "ran"


def broken(*_: Any) -> Any:
    raise ZeroDivisionError("of no use")


def recording(fast: Any, x: torch.Tensor) -> Any:
    """The executor of a program that has run; its levels are recorded, by hand where there are no graphs."""
    fast(x)
    executor = fast._last[0].executor
    if DEVICES[-1] == "cpu":
        executor._use_graphs, executor._engine = True, None
        executor.replays.device_for = lambda _: Player()
        fast(x)
    assert executor.replays._bands, str(executor.replays)
    return executor


def count_replays(executor: Any) -> list[int]:
    """Grows by the number of segments of each replayed run."""
    seen: list[int] = []
    levels = executor.replays.levels

    def noting(segments: int, *rest: Any) -> Any:
        seen.append(segments)
        return levels(segments, *rest)

    executor.replays.levels = noting
    return seen
