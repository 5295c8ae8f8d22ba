"""Makes nodes of the new graph, with the metadata of the node that is being read."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rmtcompile.errors import UnsupportedError
from rmtcompile.passes.flat.functionalise.nodes import grad_mode, taken_over, where
from rmtcompile.passes.flat.functionalise.values import Values, dense_order, same_strides

aten = torch.ops.aten


class Builder:
    """A graph that grows.

    Attributes:
        graph: the new graph;  values: the fake values of its nodes.
        reader: the original node that is visited: new nodes take over its metadata.
        grad: whether gradients are recorded, see `grad_mode`;  autocast: the autocast regions that are open.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph = fx.Graph()
        self.values = Values(gm.graph)
        self.reader: fx.Node = next(iter(gm.graph.nodes))
        self.grad: bool | None = None
        self.autocast: list[bool] = []

    def track_markers(self, node: fx.Node) -> None:
        """Follow contexts, or the markers of gradients and of autocast."""
        self.grad = grad_mode(node, self.grad)
        if node.target is torch.amp.autocast_mode._enter_autocast:
            self.autocast.append(len(node.args) < 3 or node.args[2] is not False)
        elif node.target is torch.amp.autocast_mode._exit_autocast and self.autocast:
            self.autocast.pop()

    def emit(self, op: str, target: Any, args: Any = (), kwargs: Any = None, *, val: Any = None) -> fx.Node:
        """A node of the new graph; `val` is its fake value if it is known."""
        node = self.graph.create_node(op, target, args, kwargs or {})
        node.meta = taken_over(self.reader)
        node.meta["val"] = (
            self.values.run(target, args, kwargs or {}) if val is None else self.values.local(val)
        )
        return node

    def call(self, target: Any, *args: Any, val: Any = None, **kwargs: Any) -> fx.Node:
        """A call on nodes of the new graph."""
        return self.emit("call_function", target, args, kwargs, val=val)

    def own(self, node: fx.Node) -> fx.Node:
        """The value in memory of its own, from offset 0: what absolute strides and offsets are about."""
        if dense_order(node.meta["val"]) is None:
            raise UnsupportedError(
                "as_strided on a tensor with gaps that was written before", [where(self.reader)]
            )
        return self.call(aten.clone.default, node)

    def restride(self, value: fx.Node, like: torch.Tensor) -> fx.Node:
        """The value with the strides of the tensor it overwrites: a later `view` may rely on them."""
        val = value.meta["val"]
        if same_strides(val, like):
            return value
        order = dense_order(like)
        if order is None:
            empty = self.call(aten.new_empty_strided.default, value, list(like.shape), list(like.stride()))
            return self.call(aten.copy.default, empty, value)
        plain = order == sorted(order)
        if not plain:
            value = self.call(aten.permute.default, value, order)
        value = self.call(aten.clone.default, value, memory_format=torch.contiguous_format)
        if not plain:
            value = self.call(aten.permute.default, value, sorted(range(len(order)), key=lambda d: order[d]))
        return value

    def fit(self, value: fx.Node, like: torch.Tensor) -> fx.Node:
        """The value cast and broadcast as an in-place operation does with its result."""
        val = value.meta["val"]
        if val.device != like.device:
            value = self.call(aten.to.device, value, like.device, like.dtype)
        elif val.dtype != like.dtype or any(self.autocast):
            value = self.call(aten.to.dtype, value, like.dtype)
        if value.meta["val"].shape != like.shape:
            value = self.call(aten.expand.default, value, list(like.shape))
        return value
