"""Makes nodes before the one that is visited, with its metadata."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from rmtcompile.passes.flat.functionalise import PERMUTES, Values, alias_root, overload_name, taken_over
from rmtcompile.passes.flat.store_forwarding.nodes import is_reshape, operand_of, permutation, shape_of
from rmtcompile.passes.flat.store_forwarding.ranges import Range

aten = torch.ops.aten


class Builder:
    """A copy of a graph, and what may be added to it.

    Attributes:
        graph: the copy;  values: the fake values of its nodes.
        here: the node that is visited: new nodes stand before it and take over its metadata.
        grad: whether gradients are recorded, see `grad_mode`;  no_grad: nodes for which they were not.
        pinned: nodes whose memory is read by address; they stay as they are.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in gm.graph.nodes:
            mapping[node] = self.graph.node_copy(node, lambda n: mapping[n])
            mapping[node].meta = dict(node.meta)
        self.values = Values(self.graph)
        self.no_grad: set[fx.Node] = set()
        self.grad: bool | None = None
        self.here: fx.Node = next(iter(self.graph.nodes))
        self.pinned = _pinned(self.graph)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call on nodes, with its fake value."""
        with self.graph.inserting_before(self.here):
            node = self.graph.create_node("call_function", target, args, kwargs)
        node.meta = taken_over(self.here)
        node.meta["val"] = self.values.run(target, args, kwargs)
        if self.grad is False:
            self.no_grad.add(node)
        return node

    def reshape(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """The value in another shape, past reshapes below it."""
        while shape_of(x) != tuple(shape) and is_reshape(x) and self.is_open(x):
            x = operand_of(x)
        return x if shape_of(x) == tuple(shape) else self.emit(aten.reshape.default, x, list(shape))

    def permute(self, x: fx.Node, order: Sequence[int]) -> fx.Node:
        """The value with its dimensions in another order, past permutations below it."""
        if overload_name(x) in PERMUTES and self.is_open(x):
            inner = permutation(x)
            return self.permute(operand_of(x), [inner[d] for d in order])
        return x if list(order) == sorted(order) else self.emit(aten.permute.default, x, list(order))

    def join(self, target: Any, parts: Sequence[fx.Node], at: int) -> fx.Node:
        """A stack or concatenation; of one part, that part."""
        if len(parts) > 1:
            return self.emit(target, list(parts), at)
        shape = list(shape_of(parts[0]))
        return self.reshape(parts[0], shape[:at] + [1] * (target is aten.stack.default) + shape[at:])

    def take(self, x: fx.Node, d: int, r: Range) -> fx.Node:
        """The load itself, where it is not known what was stored."""
        if r.drop:
            return self.emit(aten.select.int, x, d, r.lo)
        if r.n == shape_of(x)[d]:
            return x
        return self.emit(aten.slice.Tensor, x, d, r.lo, r.at(r.n - 1) + 1, r.step)

    def is_open(self, x: fx.Node) -> bool:
        """Whether looking past a node changes nothing for gradients."""
        return x not in self.pinned and (x not in self.no_grad or self.grad is False)


def _pinned(graph: fx.Graph) -> set[fx.Node]:
    """What `as_strided` reads by address: its operand, the views that lead there, the memory below."""
    pinned: set[fx.Node] = set()
    for node in graph.nodes:
        if overload_name(node) in ("as_strided", "as_strided_scatter", "as_strided_copy"):
            at = node.args[0]
            root = alias_root(at)
            while at is not root:
                pinned.add(at)
                at = at.all_input_nodes[0]
            pinned.add(root)
    return pinned
