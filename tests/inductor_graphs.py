"""Graphs as passes inside Inductor get them, and what such tests share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from rmtcompile.passes.cell.inductor import PASSES, Passes
from rmtcompile.runtime.engine import Engine
from rmtcompile.runtime.execute import Executor

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
)


def all_but(name: str) -> frozenset[str]:
    """What is switched off so that one pass is left."""
    return frozenset(name for passes in PASSES.values() for name in passes) - {name}


def graph_of(function: Callable[..., Any], args: list[Tensor]) -> fx.GraphModule:
    """As Inductor has it: functional, then `copy_` into what is written."""
    module = make_fx(functionalize(function, remove="mutations"), tracing_mode="fake")(*args)
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.copy.default:
            node.replace_all_uses_with(node.args[1])
    module.graph.eliminate_dead_code()
    return module


def count(graph: fx.Graph, target: Any) -> int:
    return sum(node.target is target for node in graph.nodes)


def counted(monkeypatch: pytest.MonkeyPatch, target: Any) -> list[int]:
    """How many calls of `target` each graph holds, after the passes, that is compiled later."""
    found: list[int] = []
    run = Passes.__call__

    def call(self: Passes, graph: fx.Graph) -> None:
        run(self, graph)
        found.append(count(graph, target))

    monkeypatch.setattr(Passes, "__call__", call)
    monkeypatch.setattr(Passes, "uuid", lambda self: None)  # nothing compiled from the cache
    return found


def run_on_cpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let one pass, and no other, run on CPU too."""

    def engine(executor: Executor, backend: Any, keeps_buffers: bool) -> Engine:
        return Engine(executor.program, backend, keeps_buffers, all_but(name))

    monkeypatch.setattr(Executor, "new_engine", engine)


class Recurrent(nn.Module):
    """Layers whose state each segment leaves to the next; `within` is what a layer makes of its input."""

    sizes: dict[str, tuple[int, int]]

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in self.sizes.items()})
            for _ in range(layers)
        )

    def within(self, h: Tensor, layer: Any) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor | None] = [None] * len(self.layers)
        out = []
        for h in x.split(3, 1):
            for l, layer in enumerate(self.layers):
                if (state := states[l]) is not None:
                    h = h + 0.5 * state
                h = self.within(h, layer)
                states[l] = h.tanh()
            out.append(h)
        return torch.cat(out, 1)
