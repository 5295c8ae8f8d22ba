"""Cell functions: a group's graph lifted to n cells, for a mix of classes and for each class alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rmtcompile.ir.program import Group
from rmtcompile.ir.randomness import drop_dead, is_random
from rmtcompile.passes.cell.lift import (
    SEGMENTS,
    cell_by_cell,
    each_cell,
    grouped_attention,
    lift,
    stack_cells,
    vmapped,
)
from rmtcompile.passes.cell.padded import REST
from rmtcompile.passes.emit.sizes import Opening, opening
from rmtcompile.passes.emit.text import Writer, comment, plain_name, target_name, write_nodes
from rmtcompile.passes.grid.if_conversion import class_name


@dataclass(frozen=True)
class CellFunction:
    """A cell function of the emitted module: which group and classes it serves, and its lifted graph."""

    name: str
    group: str
    classes: tuple[int, ...]
    graph: fx.Graph


def cell_functions(group: Group) -> Iterator[CellFunction]:
    """The group's graph for a mix of classes, and one for each class by itself where there are several."""
    masks = [port for port in group.ports if port.role == "mask"]
    if not masks:
        yield _lifted(f"cell_{group.name}", group, group.classes, group.graph)
        return
    alone = set(group.classes)
    for port in masks:
        alone -= set(port.source)
        yield _lifted(
            f"cell_{group.name}_{class_name(port.source[0])}", group, port.source, _assume(group, port.name)
        )
    yield _lifted(f"cell_{group.name}_later", group, tuple(sorted(alone)), _assume(group, None))
    yield _lifted(f"cell_{group.name}_mixed", group, group.classes, group.graph)


def _assume(group: Group, mask: str | None) -> fx.Graph:
    """The group's graph for cells that are all of the class of `mask` (or of none of the masks)."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(group.graph, copied))
    names = {port.name for port in group.ports if port.role == "mask"}
    for node in list(graph.nodes):
        if (
            node.op == "call_function"
            and node.args
            and isinstance(node.args[0], fx.Node)
            and node.args[0].name in names
        ):
            chosen = node.args[1] if node.args[0].name == mask else node.args[2]
            assert isinstance(chosen, fx.Node)
            if chosen.meta["val"].shape != node.meta["val"].shape:
                with graph.inserting_before(node):
                    expanded = graph.call_function(
                        torch.ops.aten.expand.default, (chosen, list(node.meta["val"].shape))
                    )
                expanded.meta.update(node.meta)
                chosen = expanded
            node.replace_all_uses_with(chosen)
            graph.erase_node(node)
    drop_dead(graph)
    return graph


def _lifted(name: str, group: Group, classes: tuple[int, ...], graph: fx.Graph) -> CellFunction:
    shared = {port.name for port in group.ports if not port.has_axis}
    for node in [n for n in graph.nodes if n.op == "placeholder" and not n.users]:
        graph.erase_node(node)
    batched = [node.name for node in graph.nodes if node.op == "placeholder" and node.name not in shared]
    result = lift(graph, batched)
    lifted = result.graph
    output = next(node for node in lifted.nodes if node.op == "output")
    values = list(output.args[0])
    placeholders = [node for node in lifted.nodes if node.op == "placeholder"]
    whole = [node for node in placeholders if node.name in batched and not node.meta.get("grows")]
    reference = next(iter(whole), None)
    with lifted.inserting_before(output):
        for i, (value, has_axis) in enumerate(zip(values, result.batched_outputs, strict=True)):
            if not has_axis:
                count: Any = 1  # the one layer of a kind reads an input of one segment
                if reference is not None:
                    count = lifted.call_function(torch.ops.aten.sym_size.int, (reference, 0))
                rows = [count, *value.meta["val"].shape]
                with_axis = lifted.call_function(torch.ops.aten.expand.default, (value, rows))
                values[i] = lifted.call_function(torch.ops.aten.clone.default, (with_axis,))
            elif value.target is not each_cell and _is_view_of_input(value):
                values[i] = lifted.call_function(torch.ops.aten.clone.default, (value,))
                values[i].meta.update(value.meta)
    output.args = (tuple(values),)
    return CellFunction(name, group.name, tuple(classes), lifted)


def _is_view_of_input(node: fx.Node) -> bool:
    """Whether a result may share memory with a lane that is written before the result is read."""
    while node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        aliases = schema is None or any(result.alias_info is not None for result in schema.returns)
        maybe = getattr(node.target, "_opname", "") in ("reshape", "contiguous", "to", "flatten", "dropout")
        if not (aliases or maybe) or not node.all_input_nodes or is_random(node):
            return False
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


FALLBACKS = {one.__name__: one for one in (cell_by_cell, each_cell, grouped_attention, stack_cells, vmapped)}


def uses_own_attention(graph: fx.Graph) -> bool:
    """Whether a cell calls the operation of `passes/cell/open_attention.py`."""
    return any(target_name(node.target) == "torch.ops.rmtcompile.attention" for node in graph.nodes)


def fallbacks_of(graph: fx.Graph) -> set[str]:
    """Names of the functions that a cell calls for operations without a batching rule."""
    return {name for name, target in FALLBACKS.items() if any(node.target is target for node in graph.nodes)}


def write_cell(writer: Writer, cell: CellFunction, group: Group) -> None:
    nodes = [node for node in cell.graph.nodes if node.op == "call_function"]
    params = [node for node in cell.graph.nodes if node.op == "placeholder"]
    which = ", ".join(class_name(c) if c < 0 or c < max(group.classes) else "later" for c in cell.classes)
    writer.function(
        cell.name, [node.name for node in params], f"n cells of {group.name} at once (segments: {which})."
    )
    roles = {port.name: port for port in group.ports}
    if params and params[0].name == REST:
        writer.line(f"# {REST}: how much of it the last segment has   i64[]")
    for node in (node for node in params if node.name not in (SEGMENTS, REST)):
        port = roles[node.name]
        writer.line(f"# {node.name}: {_role(port)}{comment(node, port.has_axis)[3:].join(('  ', ''))}")
    if (found := opened(cell)) is not None:
        for line in found.lines:
            writer.line(line)
    write_nodes(writer, nodes, plain_name, batched=True)
    output = next(node for node in cell.graph.nodes if node.op == "output")
    values = ", ".join(value.name for value in output.args[0])
    writer.line(f"return ({values},)")
    writer.end()


def opened(cell: CellFunction) -> Opening | None:
    """How the function gets the free sizes it needs."""
    params = [n for n in cell.graph.nodes if n.op == "placeholder"]
    shapes = [(node.name, node.meta.get("sizes", ())) for node in params]
    values = [(dict(n.kwargs), n.args) for n in cell.graph.nodes if n.op == "call_function"]
    output = next(node for node in cell.graph.nodes if node.op == "output")
    return opening(shapes, values, [value.meta.get("sizes", ()) for value in output.args[0]])


def _role(port: Any) -> str:
    if port.role == "weight":
        return "weight " + " | ".join(port.source.leaves[0]) + port.source.conversion
    if port.role == "rows":
        return f"weight {port.source.leaf}{port.source.index}"
    if port.role == "lane":
        return f"lane {port.source}"
    if port.role == "shared":
        return f"shared {port.source.name or port.source.kind}"
    if port.role == "layer":
        return f"of the layer, {port.source[0].name or port.source[0].kind}"
    return str(port.role)
