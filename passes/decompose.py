"""Decompose: composite operations that cannot run for several cells at once become the operations they are made of.

    lstm_cell(x, (h, c), w_ih, w_hh)   ->   linear, add, chunk, sigmoid, tanh, mul

Fires on composite operations for which `lift` has no rule; `linear`, attention, `einsum` and the like stay whole.

Requires: a functional graph. Ensures: same values, up to rounding where the composite has a fused kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from rmtcompile.passes.functionalise import functionalise
from rmtcompile.passes.lift.fallback import fallback
from rmtcompile.passes.lift.rules import rule_for


def can_decompose(node: fx.Node) -> bool:
    """Whether the node is a composite operation without a batching rule of its own."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or rule_for(target) is not fallback:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")


def decompose(module: fx.GraphModule) -> fx.GraphModule:
    """Inline the decomposition of every such node; the same object where there is none."""
    found = [node for node in module.graph.nodes if can_decompose(node)]
    for node in found:
        _inline(node)
    if found:
        module.recompile()
    return module


def _inline(node: fx.Node) -> None:
    graph, operands = node.graph, node.all_input_nodes
    vals = [operand.meta["val"] for operand in operands]
    target: Any = node.target

    def body(*tensors: torch.Tensor) -> Any:
        values = dict(zip(operands, tensors, strict=True))
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        return target.decompose(*args, **kwargs)

    traced = functionalise(make_fx(body, tracing_mode="fake")(*vals)).module
    mapping: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(node):
        placeholders = iter(operands)
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                mapping[inner] = next(placeholders)
            elif inner.op == "output":
                results = inner.args[0]
            else:
                mapping[inner] = graph.node_copy(inner, mapping.__getitem__)
                mapping[inner].meta = {**node.meta, "val": inner.meta.get("val")}
    if isinstance(results, (list, tuple)):
        for user in list(node.users):
            user.replace_all_uses_with(mapping[results[user.args[1]]])
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(mapping[results])
    graph.erase_node(node)
