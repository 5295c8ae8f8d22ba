"""The walk: each load is replaced by the value that it loads, in graph order."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx
from torch.fx.node import map_arg

from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.modes import graph_module
from rmtcompile.ir.segmentation import Cuts
from rmtcompile.passes.flat.functionalise import (
    PERMUTES,
    alias_root,
    grad_mode,
    is_mutating,
    overload_name,
    remove_dead,
    same_strides,
    where,
)
from rmtcompile.passes.flat.store_forwarding import joins, shapes, stores
from rmtcompile.passes.flat.store_forwarding.layouts import refresh
from rmtcompile.passes.flat.store_forwarding.loads import Loads
from rmtcompile.passes.flat.store_forwarding.nodes import (
    as_load,
    is_reshape,
    is_static_tensor,
    operand_of,
    shape_of,
    val_of,
)

aten = torch.ops.aten


@contextmanager
def deep_recursion() -> Iterator[None]:
    """Loads climb chains of stores by recursion, one store at a time; Python's default depth is too small."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 100_000))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


class Forwarder(Loads):
    """Rewrites a copy of a graph, node by node in order."""

    def __init__(self, gm: fx.GraphModule, windows: str = "", cuts: Cuts | None = None) -> None:
        super().__init__(gm, {**shapes.RULES, **joins.RULES, **stores.RULES}, windows, cuts)
        self.dirty: set[fx.Node] = set()
        self.original = set(self.graph.nodes)
        self.count = 0

    def run(self) -> fx.GraphModule:
        output = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        roots: list[fx.Node] = []
        map_arg(output.args, lambda n: roots.append(alias_root(n)))
        for node in list(self.graph.nodes):
            self.here = node
            self.grad = grad_mode(node, self.grad)
            if self.grad is False:
                self.no_grad.add(node)
            if is_mutating(node):
                raise UnsupportedError(
                    "forward needs a functional graph", [where(node)], "functionalise first"
                )
            if node in self.dirty and refresh(self, node):
                self.dirty.update(node.users)
            if node.op == "call_function" and node not in self.pinned and is_static_tensor(node):
                self._visit(node)
        self._protect(output, roots)
        remove_dead(self.graph)
        if not self.count and self.original <= set(self.graph.nodes):
            return self.gm
        return graph_module(self.gm, self.graph)

    def _protect(self, output: fx.Node, roots: list[fx.Node]) -> None:
        """An output that was memory of its own must not become a view of an input or attribute."""
        self.here = output
        before = iter(roots)

        def own(node: fx.Node) -> fx.Node:
            root, was = alias_root(node), next(before)
            external = root.op in ("placeholder", "get_attr") and isinstance(
                node.meta.get("val"), torch.Tensor
            )
            if not external or (root.op, root.target) == (was.op, was.target):
                return node
            return self.emit(aten.clone.default, node)

        output.args = map_arg(output.args, own)

    def _visit(self, node: fx.Node) -> None:
        view, name = as_load(node), overload_name(node)
        found: fx.Node | None = None
        if view is not None:
            found = self.try_load(view.source, view.dim, view.range)
        elif is_reshape(node):
            found = shapes.undone(self, node)
        elif name in PERMUTES:
            found = shapes.permuted(self, node)
        elif name == "alias":
            found = operand_of(node)
        elif name == "expand" and is_static_tensor(node.args[0]):
            found = operand_of(node) if shape_of(operand_of(node)) == shape_of(node) else None
        elif name in ("stack", "cat"):
            found = joins.fewer(self, node)
            if found is None and self.lists and name == "cat":
                found = joins.listed(self, node)
        elif name in ("select_scatter", "slice_scatter"):
            found = stores.stored(self, node)
        elif name in ("roll", "flip"):
            found = joins.reordered(self, node)
        elif name in ("index_select", "index"):
            found = joins.gathered(self, node)
        if found is None or found is node:
            return
        if self.grad is False and found not in self.no_grad:  # `found` may have a gradient, `node` has none
            found = self.emit(aten.detach.default, found)
        self._replace(node, found)

    def _replace(self, node: fx.Node, found: fx.Node) -> None:
        self.count += 1
        if not same_strides(val_of(node), val_of(found)):
            self.dirty.update(node.users)
        node.replace_all_uses_with(found)


def forward_stores(gm: fx.GraphModule, windows: str = "", cuts: Cuts | None = None) -> fx.GraphModule:
    """Rewrites loads of stored values into the values; the same module object if there is nothing to do.

    Args:
        windows: what a window of the last few segments is, which is cut and put together anew in each.
            "held": one value, as it is written: a load that meets several stored values at once stays a load.
            "listed": its parts: what joins it with something else joins them.
        cuts: of inputs; what is taken of one of their segments stays so, and is no part of the whole input.
    """
    with deep_recursion():
        return Forwarder(gm, windows, cuts).run()
