"""Thin products: a matrix product with one column becomes a sum, which fuses with what is around it.

    matmul(phi[B,H,N,K], z[B,H,K,1])   ->   sum(phi * z^T, -1, keepdim)
    linear(x[B,N,K], w[1,K], b[1])     ->   sum(x * w, -1, keepdim) + b

Such a product is bound by memory: a kernel of its own, and often a second one that clears its workspace, for
what costs nothing inside the kernel that makes or reads its operands.  Without a compiler that fuses, the
product of the operands would be stored, so the pass is for compiled cells only.

Requires: a functional graph of one cell with meta `val`. Ensures: same outputs up to rounding; 16-bit
operands are multiplied and summed in float32, as matrix products do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from rmtcompile.passes.cell.lift.builder import bind

aten = torch.ops.aten


def is_thin(node: fx.Node) -> bool:
    """Whether a matrix product or linear has one column."""
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        a, b = (_shape(operand) for operand in node.args[:2])
        return len(a) >= 2 and len(b) >= 2 and b[-1] == 1
    if node.target is aten.linear.default:
        weight = _shape(node.args[1])
        return len(weight) == 2 and weight[0] == 1 and len(_shape(node.args[0])) >= 2
    return False


def thin_products(graph: fx.Graph) -> fx.Graph:
    """The graph with thin products as sums; the same object where there are none."""
    if not any(is_thin(node) for node in graph.nodes):
        return graph
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    for node in [node for node in new.nodes if is_thin(node)]:
        with new.inserting_before(node):
            replacement = _sum(new, node)
        node.replace_all_uses_with(replacement)
        new.erase_node(node)
    return new


def _sum(graph: fx.Graph, node: fx.Node) -> fx.Node:
    emit = _emitter(graph, node)
    arguments = bind(node, node.target, node.args, node.kwargs).args
    if node.target is aten.linear.default:
        a, row, bias = arguments["input"], arguments["weight"], arguments["bias"]
        row = emit(aten.select.int, row, 0, 0)  # [1, K] would put the axis of cells in the rows' place
    else:
        a, row = list(arguments.values())[:2]
        row, bias = emit(aten.transpose.int, row, -2, -1), None
    dtype = node.meta["val"].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    if wide != dtype:
        a, row = emit(aten.to.dtype, a, wide), emit(aten.to.dtype, row, wide)
    total = emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, a, row), [-1], True)
    if bias is not None:
        total = emit(aten.add.Tensor, total, emit(aten.to.dtype, bias, wide) if wide != dtype else bias)
    return emit(aten.to.dtype, total, dtype) if wide != dtype else total


def _emitter(graph: fx.Graph, source: fx.Node) -> Callable[..., fx.Node]:
    """Adds calls that inherit the meta of the node they stand for, with example values of their own."""

    def emit(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = dict(source.meta)
        node.meta["val"] = target(*fx.map_arg(args, lambda operand: operand.meta["val"]))
        return node

    return emit


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in value.meta["val"].shape)
