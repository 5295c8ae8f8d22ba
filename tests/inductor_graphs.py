"""Graphs as passes inside Inductor get them, and what such tests share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from rmtcompile.passes.inductor import PASSES, Passes
from rmtcompile.runtime.engine import Engine
from rmtcompile.runtime.execute import Executor

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
)


def all_but(name: str) -> frozenset[str]:
    """What is switched off so that one pass is left."""
    return frozenset(PASSES) - {name}


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


def run_on_cpu(monkeypatch: pytest.MonkeyPatch, name: str, target: Any) -> list[int]:
    """Let one pass run on CPU too; how many calls of `target` each graph holds that is compiled later."""

    def engine(executor: Executor, backend: Any, keeps_buffers: bool) -> Engine:
        return Engine(executor.program, backend, keeps_buffers, all_but(name))

    found: list[int] = []
    run = Passes.__call__

    def counted(self: Passes, graph: fx.Graph) -> None:
        run(self, graph)
        found.append(count(graph, target))

    monkeypatch.setattr(Executor, "new_engine", engine)
    monkeypatch.setattr(Passes, "__call__", counted)
    monkeypatch.setattr(Passes, "uuid", lambda self: None)  # nothing compiled from the cache
    return found
