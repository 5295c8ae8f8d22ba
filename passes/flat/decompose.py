"""Decompose: recurrent cells that cannot run for several layers at once become the operations they are made
of.

    lstm_cell(x, (h, c), w_ih, w_hh)   ->   linear, add, chunk, sigmoid, tanh, mul

torch keeps `lstm_cell` and its relatives whole, with no batching rule, and its own decomposition writes in
place.

Requires: a functional graph. Ensures: same values, up to rounding (the whole operation has a fused kernel).
Reference: the equations in the documentation of `torch.nn.LSTMCell`, `GRUCell` and `RNNCell`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


def _lstm(x: Tensor, state: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
    h, c = state
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
    xr, xz, xn = F.linear(x, w_ih, b_ih).chunk(3, -1)
    hr, hz, hn = F.linear(h, w_hh, b_hh).chunk(3, -1)
    reset, update = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    new = torch.tanh(xn + reset * hn)
    return (h - new) * update + new


def _rnn(activation: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
        return activation(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh))

    return cell


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.lstm_cell.default: _lstm,
    aten.gru_cell.default: _gru,
    aten.rnn_tanh_cell.default: _rnn(torch.tanh),
    aten.rnn_relu_cell.default: _rnn(torch.relu),
}


def can_decompose(node: fx.Node) -> bool:
    """Whether the node is a recurrent cell."""
    return node.op == "call_function" and node.target in DECOMPOSITIONS


def decompose(module: fx.GraphModule) -> fx.GraphModule:
    """Inline the decomposition of every such node; the same object where there is none."""
    found = [node for node in module.graph.nodes if can_decompose(node)]
    known: dict[Any, fx.GraphModule] = {}
    for node in found:
        key = _key(node)
        if key not in known:
            known[key] = _traced(node, DECOMPOSITIONS[node.target])
        _put(node, known[key])
    if found:
        module.recompile()
    return module


def inline(node: fx.Node, function: Callable[..., Any], pre_dispatch: bool = True) -> list[fx.Node]:
    """Put what `function` does with the node's arguments in its place; gives the new nodes, which take over
    its metadata."""
    return _put(node, _traced(node, function, pre_dispatch))


def _key(node: fx.Node) -> Any:
    """Equal for calls whose decompositions are the same: all layers and segments share one, mostly."""
    place = {operand: f"operand {i}" for i, operand in enumerate(node.all_input_nodes)}
    vals = [operand.meta["val"] for operand in place]
    types = tuple((tuple(v.shape), v.stride(), v.dtype, v.device, v.requires_grad) for v in vals)
    return node.target, types, repr(fx.node.map_arg((node.args, node.kwargs), place.__getitem__))


def _traced(node: fx.Node, function: Callable[..., Any], pre_dispatch: bool = True) -> fx.GraphModule:
    """What `function` does with arguments like the node's; its inputs are the node's, in their order."""
    operands = node.all_input_nodes

    def body(*tensors: torch.Tensor) -> Any:
        values = dict(zip(operands, tensors, strict=True))
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        return function(*args, **kwargs)

    vals = [operand.meta["val"] for operand in operands]
    return make_fx(body, tracing_mode="fake", pre_dispatch=pre_dispatch)(*vals)


def _put(node: fx.Node, traced: fx.GraphModule) -> list[fx.Node]:
    """Put a copy of a traced graph in the node's place."""
    graph = node.graph
    mapping: dict[fx.Node, fx.Node] = {}
    made = []
    with graph.inserting_before(node):
        placeholders = iter(node.all_input_nodes)
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                mapping[inner] = next(placeholders)
            elif inner.op == "output":
                results = inner.args[0]
            else:
                mapping[inner] = graph.node_copy(inner, mapping.__getitem__)
                mapping[inner].meta = {**node.meta, "val": inner.meta.get("val")}
                made.append(mapping[inner])
    if isinstance(results, (list, tuple)):
        for user in list(node.users):
            index = user.args[1]
            assert isinstance(index, int)  # the nodes that read a tuple are `getitem`s
            user.replace_all_uses_with(mapping[results[index]])
            graph.erase_node(user)
    elif results is not None:
        node.replace_all_uses_with(mapping[results])
    graph.erase_node(node)
    return made
