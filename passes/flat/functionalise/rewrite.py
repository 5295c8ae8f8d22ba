"""The walk: copies a graph node by node, with values in place of memory."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from rmtcompile.errors import InternalError
from rmtcompile.ir.modes import graph_module
from rmtcompile.passes.flat.functionalise.contents import Contents
from rmtcompile.passes.flat.functionalise.memory import Alias, Object, Several
from rmtcompile.passes.flat.functionalise.nodes import alias_root, is_mutating, overload_name, remove_dead
from rmtcompile.passes.flat.functionalise.roots import Roots
from rmtcompile.passes.flat.functionalise.sources import object_of, source_of
from rmtcompile.passes.flat.functionalise.values import same_strides
from rmtcompile.passes.flat.functionalise.views import IDENTITIES
from rmtcompile.passes.flat.functionalise.writes import check_hidden_writes, visit_write

aten = torch.ops.aten


@dataclass(frozen=True)
class Functional:
    """A graph without writes, and what the original left in its inputs and attributes.

    Attributes:
        module: same placeholders; returns what the original returned if `writes` is empty, and otherwise the
            pair (what the original returned, the list of written values in the order of `writes`).
        writes: for each mutated placeholder or attribute, by name, the node of `module` that holds its final
            content.  Attributes that share a storage are written through the one that covers the others.
    """

    module: fx.GraphModule
    writes: dict[str, fx.Node]


class Rewriter(Contents):
    """Copies a graph node by node.

    Attributes:
        env: for each original node its `Object`, `Several`, or a value that is no tensor.
        copied: nodes that were copied as they are, with the memory and the version that they show.
        roots: the memory of placeholders and attributes.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.gm = gm
        self.env: dict[fx.Node, Any] = {}
        self.copied: dict[fx.Node, tuple[fx.Node, Alias, int]] = {}
        self.roots = Roots(gm, self.values)

    def run(self) -> Functional:
        for node in self.gm.graph.nodes:
            self.reader = node
            if node.op == "output":
                return self._output(node)
            self._visit(node)
        raise InternalError("functionalise: the graph has no output")

    def read(self, node: fx.Node) -> Any:
        """The present content of an original node, as a node (or list of nodes) of the new graph."""
        value = self.env[node]
        if isinstance(value, Object):
            new, alias, version = self.copied.get(node, (None, None, -1))
            if new is not None and alias is value.alias and version == alias.base.version:
                return new
            return self.current(value.alias)
        if isinstance(value, Several):
            return (
                value.node
                if value.is_current
                else [self._read_item(value, i) for i in range(len(value.items))]
            )
        return value

    def _read_item(self, several: Several, i: int) -> Any:
        item = several.items[i]
        if isinstance(item, Object) and (item.alias.parent is not None or item.alias.node is not None):
            return self.current(item.alias)
        return self.call(operator.getitem, several.node, i)

    def _copy(self, node: fx.Node) -> fx.Node:
        """The node as it is, on present contents."""
        args, kwargs = map_arg(node.args, self.read), map_arg(node.kwargs, self.read)
        new = self.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        new.meta = dict(node.meta)
        return new

    def _visit(self, node: fx.Node) -> None:
        self.track_markers(node)
        if node.op in ("placeholder", "get_attr"):
            self._visit_input(node)
        elif is_mutating(node):
            visit_write(self, node)
        elif node.target is operator.getitem and isinstance(self._first(node), Several):
            self._visit_item(node, self._first(node))
        else:
            check_hidden_writes(self.gm, node)
            self._visit_pure(node)

    def _first(self, node: fx.Node) -> Any:
        first = node.args[0]
        return self.env[first] if isinstance(first, fx.Node) else None

    def _visit_input(self, node: fx.Node) -> None:
        known = self.roots.objects.get(str(node.target))
        if known is None:
            self.env[node] = self._copy(node)
            return
        self.env[node] = known
        if known.alias.base.version == 0:
            new = self._copy(node)
            self.copied[node] = (new, known.alias, 0)
            if known.alias.node is None:
                known.alias.node = new

    def _visit_item(self, node: fx.Node, source: Several) -> None:
        assert isinstance(node.args[1], int)
        item = source.items[node.args[1]]
        if not isinstance(item, Object):
            self.env[node] = self._copy(node)
            return
        self.env[node] = item
        alias = item.alias
        if alias.version == alias.base.version and alias.node is None:
            alias.node = self._copy(node)
            self.copied[node] = (alias.node, alias, alias.version)

    def _visit_pure(self, node: fx.Node) -> None:
        vals = node.meta.get("val")
        if node.op != "call_function" or vals is None:
            self.env[node] = self._copy(node)
            return
        if isinstance(vals, (list, tuple)):
            sources = [source_of(self, node, val, i) for i, val in enumerate(vals)]
            new = self._copy(node)
            items = [
                object_of(self, node, s, v, i, vals, None)
                for i, (s, v) in enumerate(zip(sources, vals, strict=True))
            ]
            self.env[node] = Several(new, items)
            return
        if not isinstance(vals, torch.Tensor):
            self.env[node] = self._copy(node)
            return
        source = source_of(self, node, vals, None)
        if source is not None and overload_name(node) in IDENTITIES and _is_identity(source.alias, vals):
            self.env[node] = source
            self.changed = True
            return
        new = self._copy(node)
        self.env[node] = made = object_of(self, node, source, vals, None, (), new)
        self.copied[node] = (new, made.alias, made.alias.version)

    def _read_output(self, node: fx.Node) -> Any:
        value, now = self.env[node], self.read(node)
        name = value.alias.base.name if isinstance(value, Object) else None
        return self._owned(now, name) if isinstance(now, fx.Node) else now

    def _owned(self, node: fx.Node, name: str | None) -> fx.Node:
        """A result that was memory of its own stays so, though it is now an input or attribute itself."""
        root = alias_root(node)
        external = root.op in ("placeholder", "get_attr") and isinstance(root.meta.get("val"), torch.Tensor)
        if not external or str(root.target) == name or not self.changed:
            return node
        known = self.roots.objects.get(str(root.target))
        if known is not None and known.alias.base.name == name and name is not None:
            return node
        return self.call(aten.clone.default, node)

    def _output(self, node: fx.Node) -> Functional:
        if not self.changed:
            return Functional(self.gm, {})
        result = map_arg(node.args[0], self._read_output)
        writes = {}
        for item in self.roots.objects.values():
            root = item.alias.root
            if root.base.version and root.base.name is not None and root.base.name not in writes:
                writes[root.base.name] = self._owned(self.current(root), None)
        output = self.graph.output((result, list(writes.values())) if writes else result)
        output.meta = {k: v for k, v in node.meta.items() if k != "val"}
        remove_dead(self.graph)
        return Functional(graph_module(self.gm, self.graph), writes)


def _is_identity(alias: Alias, val: torch.Tensor) -> bool:
    return alias.val.shape == val.shape and alias.val.dtype == val.dtype and same_strides(alias.val, val)


def functionalise(gm: fx.GraphModule) -> Functional:
    """Rewrites a captured graph so that no node mutates; the same module object if there is nothing to do."""
    return Rewriter(gm).run()
