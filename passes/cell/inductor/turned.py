"""Turned: the gradient of a weight is made in the layout of the weight.

    permute(bmm(xT, dy))     ->     bmm(dyT, x)

Autograd takes the gradient of the transposed weight that a product reads, and transposes it. The result is
the same numbers lying across, and adding them to a sum that lies along costs three times as much (2026-11-28,
H100). Of single products (`mm`) autograd takes care itself.

Requires: Inductor's joint graph of forward and backward, before it is split: later the layout of gradients is
settled.
Ensures: the same outputs, gradients in other strides; a product may be rounded in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_ACROSS = [0, 2, 1]


def turned(graph: fx.Graph) -> None:
    """The pass; changes the graph."""
    output = graph.output_node()
    gradients = _backward(graph)
    for node in list(graph.nodes):
        if node not in gradients or node.target is not aten.permute.default or output not in node.users:
            continue
        product: Any = node.args[0]
        dims: Any = node.args[1]
        is_alone = product.target is aten.bmm.default and len(product.users) == 1
        if is_alone and list(dims) == _ACROSS:
            _turn(graph, node, product)
    graph.eliminate_dead_code()


def _backward(graph: fx.Graph) -> set[fx.Node]:
    """What follows from the gradients of the outputs; nothing where there is no backward."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if is_tangent or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _turn(graph: fx.Graph, node: fx.Node, product: Any) -> None:
    with graph.inserting_before(node):
        factors = []
        for factor in reversed(product.args):
            across = graph.call_function(aten.permute.default, (factor, _ACROSS))
            across.meta = dict(product.meta)
            across.meta["val"] = factor.meta["val"].permute(_ACROSS)
            factors.append(across)
        made = graph.call_function(aten.bmm.default, tuple(factors))
    value = node.meta["val"]
    made.meta = dict(node.meta)
    made.meta["val"] = value.new_empty(value.shape)
    node.replace_all_uses_with(made)


__all__ = ["turned"]
