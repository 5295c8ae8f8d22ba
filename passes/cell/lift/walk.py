"""The walk over a cell's graph: what has the axis, what is copied, and a check of every lifted value."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rmtcompile.errors import InternalError, LiftError
from rmtcompile.ir.grown import is_grown
from rmtcompile.ir.randomness import is_random
from rmtcompile.passes.cell.lift.builder import (
    EXAMPLE_N,
    Builder,
    Rule,
    Value,
    aten,
    bind,
    inherited,
    replaced,
)
from rmtcompile.passes.cell.lift.draws import drawing
from rmtcompile.passes.cell.lift.fallback import refusal
from rmtcompile.passes.cell.lift.growing import SEGMENTS, each, grouped_attention
from rmtcompile.passes.cell.lift.rules import rule_for, without_pattern

_METADATA = ("aten.sym_", "aten.size.", "aten.dim.", "aten.numel.")


@dataclass(frozen=True)
class Lifted:
    """A cell's graph over n cells.

    Attributes:
        graph: placeholders and outputs as in the cell; meta `val` is an example for n = 2.
        batched_outputs: per output whether it has the axis; False where it depends on no batched placeholder.
    """

    graph: fx.Graph
    batched_outputs: tuple[bool, ...]


def lift(graph: fx.Graph, batched: Collection[str]) -> Lifted:
    """Rewrite a cell's graph to compute n cells at once over a new leading axis.

    Args:
        graph: the cell, functional aten operations; not modified. Its output is a node or a flat tuple.
        batched: names of the placeholders that get the axis; the cells share all others. Those with meta
            `grows` are tuples of one value a cell. Where sizes or integers depend on the segment, the graph
            has a placeholder `segments` more.

    Raises:
        LiftError: an operation has no rule and `torch.vmap` cannot do it either, or it writes or reads
            strides in a way that n cells at once would change.
    """
    unknown = set(batched) - {node.name for node in graph.nodes if node.op == "placeholder"}
    if unknown:
        raise ValueError(f"no such placeholders: {sorted(unknown)}")
    walk = _Walk(graph, frozenset(batched))
    for node in graph.nodes:
        walk.visit(node)
    return Lifted(walk.b.graph, walk.flags)


class _Walk:
    """State of one walk: the builder, and the lifted value of each node of the cell."""

    def __init__(self, graph: fx.Graph, batched: frozenset[str]) -> None:
        self.b = Builder(_mode_of(graph))
        self.batched = batched
        self.values: dict[fx.Node, Value] = {}
        self.flags: tuple[bool, ...] = ()
        self.segments: fx.Node | None = None
        if any(node.meta.get("grows") or is_grown((node.args, dict(node.kwargs))) for node in graph.nodes):
            self.segments = self.b.graph.placeholder(SEGMENTS)
            self.segments.meta["val"] = (None,) * EXAMPLE_N

    def visit(self, node: fx.Node) -> None:
        self.b.source = node
        if node.op == "placeholder":
            self.values[node] = self.placeholder(node)
        elif node.op == "output":
            self.output(node)
        elif self.is_growing(node):
            self.values[node] = self.each(node)
        else:
            is_reached = any(self.values[operand].batched for operand in node.all_input_nodes)
            is_own = is_reached or is_random(node)  # each cell draws its own numbers
            self.values[node] = self.lifted(node) if is_own else self.copied(node)

    def value_of(self, argument: Any) -> Any:
        """The lifted value of a node; for a number (a size, or a placeholder for one) what stands for it."""
        if not isinstance(argument, fx.Node):
            return argument
        value = self.values[argument]
        return value.node if isinstance(value.cell, int | float) else value

    def placeholder(self, node: fx.Node) -> Value:
        copy = self.b.graph.node_copy(node)
        cell = self.b.refake(_val(node))
        is_batched = node.name in self.batched
        copy.meta = inherited(node)
        copy.meta["val"] = cell
        if is_batched and node.meta.get("grows"):
            copy.meta["val"] = (cell,) * EXAMPLE_N
            return Value(copy, True, cell, grows=True)
        if is_batched:
            with self.b.mode:
                copy.meta["val"] = torch.empty((EXAMPLE_N, *cell.shape), dtype=cell.dtype, device=cell.device)
            self.b.reference = self.b.reference or copy
        return Value(copy, is_batched, cell)

    def is_growing(self, node: fx.Node) -> bool:
        """Whether an operation has to do with values of other sizes in other cells."""
        is_read = any(self.values[operand].grows for operand in node.all_input_nodes)
        return is_read or bool(node.meta.get("grows")) or is_grown((node.args, dict(node.kwargs)))

    def each(self, node: fx.Node) -> Value:
        """An operation cell by cell, where its operands or its result grow."""
        assert self.segments is not None and node.op == "call_function"
        cell = self.b.refake(_val(node))
        if not isinstance(cell, torch.Tensor | tuple | list):
            raise refusal(node, "it reads the size of a value that grows with the segments")
        if (grouped := self.attention(node)) is not None:
            return Value(grouped, True, cell)
        return each(self.b, node, self.segments, self.values, cell)

    def attention(self, node: fx.Node) -> fx.Node | None:
        """Attention to keys that grow as one call, where the query does not."""
        if node.target is not aten.scaled_dot_product_attention.default or node.meta.get("grows"):
            return None
        args = bind(node, node.target, *replaced((node.args, node.kwargs), self.value_of)).args
        query, key, value, mask = (args.pop(name) for name in ("query", "key", "value", "attn_mask"))
        own = query.batched and not query.grows and key.grows and value.grows
        if not own or {query.rank, key.rank, value.rank} != {4} or not (mask is None or mask.batched):
            return None
        return self.b.emit(grouped_attention, query, key, value, mask, **args)

    def copied(self, node: fx.Node) -> Value:
        """A node that no batched placeholder reaches: computed once for all cells."""
        cell = self.b.refake(node.meta.get("val"))
        if isinstance(cell, int | float):
            return Value(cell, False, cell)
        copy = self.b.graph.node_copy(node, self.node_of)
        copy.meta = inherited(node) | ({"val": cell} if "val" in node.meta else {})
        return Value(copy, False, cell)

    def node_of(self, operand: fx.Node) -> Any:
        return self.values[operand].node

    def lifted(self, node: fx.Node) -> Value:
        if node.target is operator.getitem:
            return self.item(node)
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            raise refusal(node, "only aten operations can be lifted")
        if node.target._schema.is_mutable:
            raise refusal(node, "it writes into its operand; the cell's graph must be functional")
        cell = self.b.refake(_val(node))
        if cell is None or isinstance(cell, int | float):
            return self.number(node, cell)
        op, plain_args, plain_kwargs = without_pattern(node)
        call = bind(node, op, *replaced((plain_args, plain_kwargs), self.value_of))
        is_batched = any(value.batched for value in call.values) or is_random(node)
        try:
            result = self.rule(node, op)(self.b, call) if is_batched else self.b.again(call)
        except LiftError:
            raise
        except Exception as error:
            raise InternalError(f"lift: the batching rule of {node.format_node()} failed: {error}") from error
        self.check(node, cell, result, is_batched)
        return Value(result, is_batched, cell)

    def rule(self, node: fx.Node, op: Any) -> Rule:
        """The batching rule of a node's operation."""
        return drawing(op) if is_random(node) else rule_for(op)

    def number(self, node: fx.Node, cell: Any) -> Value:
        """Sizes of a cell are constants; assertions about its metadata were checked when it was captured."""
        name = str(node.target)
        if cell is None and "_assert_tensor_metadata" not in name:
            raise refusal(node, "it has no result")
        if cell is not None and not name.startswith(_METADATA):
            raise refusal(node, "it reads a value out of a tensor")
        return Value(cell, False, cell)

    def item(self, node: fx.Node) -> Value:
        sequence, index = replaced(tuple(node.args), self.value_of)
        cell = self.b.refake(_val(node))
        if isinstance(sequence.node, tuple):
            return Value(sequence.node[index], True, cell)
        return Value(self.b.emit(operator.getitem, sequence, index), True, cell)

    def check(self, node: fx.Node, cell: Any, result: Any, is_batched: bool) -> None:
        """Every lifted value has the cell's shape behind the axis, the cell's dtype and its device."""
        if isinstance(cell, list | tuple):
            parts = result if isinstance(result, tuple) else result.meta["val"]
            for one, part in zip(cell, parts, strict=True):
                self.check(node, one, part, is_batched)
            return
        got = result.meta["val"] if isinstance(result, fx.Node) else result
        if not isinstance(cell, torch.Tensor):
            return
        want = ((EXAMPLE_N,) if is_batched else ()) + tuple(cell.shape)
        if (tuple(got.shape), got.dtype, got.device) != (want, cell.dtype, cell.device):
            raise InternalError(
                f"lift: {node.format_node()} gives {got.dtype}{list(got.shape)} for {EXAMPLE_N} cells, "
                f"expected {cell.dtype}{list(want)}"
            )

    def output(self, node: fx.Node) -> None:
        result = node.args[0]
        items = result if isinstance(result, list | tuple) else (result,)
        flags = []
        for item in items:
            if isinstance(item, list | tuple | dict):
                raise InternalError(f"lift: the output of a cell must be flat, got {result}")
            flags.append(isinstance(item, fx.Node) and self.values[item].batched)
        self.flags = tuple(flags)
        copy = self.b.graph.node_copy(node, self.node_of)
        copy.meta = inherited(node)


def _mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode of the cell's values, or a new one."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode()


def _val(node: fx.Node) -> Any:
    if "val" not in node.meta:
        raise InternalError(f"lift: {node.name} has no meta 'val'")
    return node.meta["val"]
