"""Dataflow as graphs that Google's Model Explorer opens: the grid of cells, and what is inside of cells.

One collection: the cells with their dependences; the operations of each kind of cell, as the model has them;
those of the regions around the grid; and the functions of the emitted module, which compute n cells at once.
A node of the first graph leads to the graph of its cell.  Namespaces are layer / region / module path.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rmtcompile.schedule import Cell, Schedule
from rmtcompile.viewer.view_model import CellView, FunctionView, OpView, ValueView, ViewModel

Node = dict[str, Any]


def to_explorer(view: ViewModel, opened: Mapping[Cell, Sequence[OpView]] | None = None) -> str:
    """The graphs of a view as JSON.

    Args:
        opened: cells with their operations; they get graphs of their own, in the place of the kinds of cells.
    """
    inside = [_opened(cell, ops) for cell, ops in opened.items()] if opened else _kinds(view)
    graphs = [
        _cells(view, opened or {}),
        *inside,
        *(_graph(cell.kind, cell.kind, cell.ops, cell.live_ins, cell.params) for cell in view.around),
        *(_function(one) for one in view.generated),
    ]
    return json.dumps({"label": view.title, "graphs": graphs}, indent=1)


def _cells(view: ViewModel, opened: Mapping[Cell, Sequence[OpView]]) -> dict[str, Any]:
    schedule = view.schedule
    known = {(cell.kind, cell.variant) for cell in view.cells}
    nodes = []
    for level, cells in enumerate(schedule.levels):
        for cell in cells:
            sort = (schedule.kind_of(cell), schedule.variant_of(cell))
            about = {"level": level, "phase": schedule.phases.of(level), "kind": sort[0], "variant": sort[1]}
            edges = [(str(other), _carried(schedule, other, cell)) for other in schedule.producers(cell)]
            about |= {f"reads of {other}": names for other, names in edges if names}
            node = _node(
                str(cell), f"({cell[0]},{cell[1]})", f"layer {cell[1]}", about, (e for e, _ in edges)
            )
            graph = (
                _cell_id(cell) if cell in opened else _kind_id(*sort) if sort in known and not opened else ""
            )
            nodes.append({**node, "subgraphIds": [graph]} if graph else node)
    return {"id": "cells", "nodes": nodes}


def _carried(schedule: Schedule, writer: Cell, reader: Cell) -> str:
    offset = (reader[0] - writer[0], reader[1] - writer[1])
    fits = (c for c in schedule.carries if c.offset == offset and writer[1] in c.writers(schedule.n_layers))
    return ", ".join(carry.name for carry in fits)


def _kind_id(kind: str, variant: str) -> str:
    return f"cell of {kind}, {variant}"


def _cell_id(cell: Cell) -> str:
    return f"cell of segment {cell[0]}, layer {cell[1]}"


def _kinds(view: ViewModel) -> list[dict[str, Any]]:
    return [_of_kind(cell) for cell in view.cells]


def _of_kind(cell: CellView) -> dict[str, Any]:
    outputs = [(value.name.partition(",")[0], value.name, value.note) for value in cell.live_outs]
    region = f"{_part(cell.kind)}/{_part(cell.variant)}"
    return _graph(_kind_id(cell.kind, cell.variant), region, cell.ops, cell.live_ins, cell.params, outputs)


def _opened(cell: Cell, ops: Sequence[OpView]) -> dict[str, Any]:
    return _graph(_cell_id(cell), f"layer {cell[1]}/segment {cell[0]}", ops)


def _function(one: FunctionView) -> dict[str, Any]:
    weights = [value for value in one.inputs if value.note in ("weight", "rows")]
    others = [value for value in one.inputs if value not in weights]
    return _graph(one.name, one.name, one.ops, others, weights, [(name, name, "") for name in one.outputs])


def _graph(
    name: str,
    region: str,
    ops: Iterable[OpView],
    live_ins: Iterable[ValueView] = (),
    weights: Iterable[ValueView] = (),
    outputs: Iterable[tuple[str, str, str]] = (),
) -> dict[str, Any]:
    """A graph of operations with what enters on the left and what leaves, as (operation, name, note)."""
    nodes = [
        _node(value.name, value.name, f"{region}/{place}", {"type": value.type, "from": value.note})
        for place, values in (("inputs", live_ins), ("weights", weights))
        for value in values
    ]
    known = {node["id"] for node in nodes}
    for op in ops:
        path = "/".join([region, *map(_part, filter(None, op.module.split(".")))])
        about = {"name": op.name, "target": op.target, "type": op.type, "source": op.source}
        nodes.append(_node(op.name, op.op, path, about, (i for i in op.inputs if i in known)))
        known.add(op.name)
    nodes += [
        _node(f"output {i}", shown, f"{region}/outputs", {"goes": note}, [op] if op in known else [])
        for i, (op, shown, note) in enumerate(outputs)
    ]
    return {"id": name, "nodes": nodes}


def _part(name: str) -> str:
    """A name as one part of a namespace."""
    return name.replace("/", "|")


def _node(
    name: str, label: str, namespace: str, about: Mapping[str, object], inputs: Iterable[str] = ()
) -> Node:
    return {
        "id": name,
        "label": label,
        "namespace": namespace,
        "attrs": [{"key": key, "value": str(value)} for key, value in about.items() if value != ""],
        "incomingEdges": [
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(i)}
            for i, source in enumerate(inputs)
        ],
    }
