"""Graphs of callables for the tests of passes, and a run that checks what their metadata promises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from rmtcompile.passes.flat.functionalise import same_strides


class StrictRun(fx.Interpreter):
    """Runs a graph and checks what its metadata promises."""

    def run_node(self, n: fx.Node) -> Any:
        result, val = super().run_node(n), n.meta.get("val")
        if isinstance(val, torch.Tensor) and n.op != "output":
            assert result.shape == val.shape, n.format_node()
            assert result.dtype == val.dtype, n.format_node()
            assert same_strides(result, val), (n.format_node(), result.stride(), val.stride())
        return result


def capture(f: Callable[..., Any], *args: torch.Tensor) -> fx.GraphModule:
    """The graph of a callable, which is left as it was."""
    return make_fx(
        copy.deepcopy(f), tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True
    )(*[a.detach().clone() for a in args])  # fmt: skip
