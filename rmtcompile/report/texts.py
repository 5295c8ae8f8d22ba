"""Each stage of the compiler as text.

program ARMT(input_ids: i64[1,128]) -> f32[1,128,256]             # 4 layers x 8 segments, 32 cells
cell later (x: f32[1,20,64], association: f32[1,1,48,64]; W: 15 params)            # 116 ops
grid  x(s,l) <- cell (s, l - 1)  offset (0,1)     association(s,l) <- cell (s - 1, l)  offset (1,0)
schedule  11 levels, width 4, 32 cells in 11 grouped calls
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from rmtcompile.ir.program import Each, Source
from rmtcompile.passes.grid.partition import CELL
from rmtcompile.report.names import (
    lane_names,
    op_name,
    pattern,
    ranges,
    state_names,
    type_of,
    value_name,
    where_from,
)
from rmtcompile.schedule import Schedule, short_type

if TYPE_CHECKING:
    from rmtcompile.compiler.pipeline import Compiled
    from rmtcompile.ir.program import Group, Lane, LaneEntry, Program
    from rmtcompile.passes.grid.reroll import ClassRule

_CODE = 84  # column at which types and sources begin


def beside(left: str, right: str, column: int = _CODE) -> str:
    """`left   # right`, in columns."""
    return f"{left:<{column}}  # {right}" if right else left


# -- graphs


def argument(value: Any) -> str:
    """An argument of an operation as Python would write it; nodes by name."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(argument, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, slice):
        return f"{argument(value.start)}:{argument(value.stop)}"
    return str(value)


def operation(node: fx.Node) -> str:
    """`linear_2 = linear(mul_4, w_1)`."""
    args = [argument(arg) for arg in node.args]
    args += [f"{name}={argument(value)}" for name, value in node.kwargs.items()]
    return f"{node.name} = {op_name(node)}({', '.join(args)})"


def graph_text(module: fx.GraphModule, path_of: Callable[[fx.Node], str], leaves: Mapping[str, str]) -> str:
    """A captured graph: a heading a module call, types and source lines on the right.

    Args:
        path_of: path of the module that ran a node.
        leaves: what the model calls the tensors that the graph reads.
    """
    lines: list[str] = []
    heading: str | None = None
    for node in module.graph.nodes:
        if node.op == "placeholder":
            lines.append(beside(f"input {node.name}", type_of(node)))
        elif node.op == "get_attr":
            name = leaves.get(str(node.target), str(node.target))
            lines.append(beside(f"{node.name} = {name}", type_of(node) or _held(module, node)))
        elif node.op == "output":
            lines += ["", f"return {argument(node.args[0])}"]
        else:
            if path_of(node) != heading:
                heading = path_of(node)
                lines += ["", f"-- {heading or 'outside of all modules'}"]
            lines.append(beside(operation(node), _facts(node)))
    return "\n".join(lines)


def _held(module: fx.GraphModule, node: fx.Node) -> str:
    return type_of(getattr(module, str(node.target), None))


def _facts(node: fx.Node) -> str:
    return "  ".join(part for part in (type_of(node), str(node.meta.get("source", ""))) if part)


# -- analyses


def partition_text(compiled: Compiled) -> str:
    """The layers, and the operations of each region of the smallest capture."""
    base = compiled.rolled.base
    lines = [f"{base.n_layers} layers x {base.count} segments, in the smallest capture"]
    lines += [f"  layer {layer}: {path}" for layer, path in enumerate(compiled.layer_paths)]
    order = {"init": 0, "prologue": 1, "cell": 2, "epilogue": 3}
    for region in sorted(base.bodies, key=lambda r: (r.segment, order[r.kind], r.layer)):
        body = base.bodies[region]
        lines += ["", f"{region}: {len(body.nodes)} operations, {len(body.live_ins)} live-ins"]
        lines += [f"  {beside(operation(node), _facts(node), _CODE - 2)}" for node in body.nodes]
    return "\n".join(lines)


def rules_text(compiled: Compiled) -> str:
    """The rules: which body each region has at segment s of S, and where its live-ins come from."""
    rolled = compiled.rolled
    counts = " and ".join(map(str, rolled.proved_on))
    lines = [f"read from the capture with {rolled.base.count} segments, proved on those with {counts}"]
    states = state_names(compiled)
    shown: dict[Any, str] = {}
    for (kind, layer), by_class in rolled.rules.items():
        classes = rolled.classes[(kind, layer)]
        for number, rule in sorted(by_class.items()):
            title = f"{kind} {layer}" if kind == CELL else kind
            lines += ["", f"{title}, {_class(number, classes.head)}: {len(rule.body.nodes)} operations"]
            lines += [f"  {line}" for line in _live_ins(rule, layer, states)]
            known = shown.setdefault(rule.body.key, lines[-1 - len(rule.sources)])
            if known is not lines[-1 - len(rule.sources)]:
                lines.append(f"  operations as in {known.partition(':')[0]}")
                continue
            ints = iter(rule.ints)
            loose = kind != CELL
            for node in rule.body.nodes:
                values = [str(next(ints)) for _ in _integers(node)] if loose else []
                moving = [value for value in values if "s" in value.lower()]
                note = f"{_facts(node)}{'  integers: ' + ', '.join(moving) if moving else ''}"
                lines.append(f"  {beside(operation(node), note, _CODE - 2)}")
    lines += ["", "outputs"]
    lines += [f"  {i}: {_output(source)}" for i, source in enumerate(rolled.outputs)]
    return "\n".join(lines)


def _integers(node: fx.Node) -> Iterator[int]:
    """The integers among a node's arguments, in the order in which a body lists them."""

    def walk(value: Any) -> Iterator[int]:
        if isinstance(value, (list, tuple)):
            for item in value:
                yield from walk(item)
        elif isinstance(value, dict):
            for item in value.values():
                yield from walk(item)
        elif type(value) is int:
            yield value

    yield from walk(node.args)
    yield from walk(dict(node.kwargs))


def _class(number: int, head: int) -> str:
    if number < 0:
        return "the last segment" if number == -1 else f"segment S - {-number}"
    return f"segment {number}" if number < head else f"segments {head}.." if head else "every segment"


def _live_ins(rule: ClassRule, layer: int, states: Any) -> Iterator[str]:
    for live_in, node in zip(rule.sources, rule.body.live_ins, strict=True):
        steady = live_in.steady
        name = value_name(steady, states) or (
            node.name if isinstance(node, fx.Node) else f"[{', '.join(n.name for n in node or ())}]"
        )
        where = where_from(live_in, layer)
        if isinstance(steady, Source) and steady.kind in ("leaf", "input"):
            where = f"{steady.name}, {where}"
        yield f"{name}: {type_of(node) if isinstance(node, fx.Node) else 'a list'} <- {where}"


def _output(source: Source | Each) -> str:
    if isinstance(source, Each):
        return f"{source.kind} of every segment"
    segment = "S - 1" if source.relative and not source.segment else f"S - {1 + source.segment}"
    place = segment if source.relative else str(source.segment)
    if source.kind in ("leaf", "input", "init"):
        return source.name or source.kind
    return f"cell ({place}, {source.layer})" if source.kind == CELL else f"{source.kind}({place})"


def dependence_text(compiled: Compiled) -> str:
    """The offsets, each with its witness."""
    from rmtcompile.report.explanation_text import offset_words

    lines = []
    for offset, found in sorted(compiled.dependences.items()):
        lines += [
            f"({offset[0]},{offset[1]})  {offset_words(offset)}",
            f"  {found.consumer}",
            f"  reads {found.producer} {found.reason}".rstrip(),
        ]
    return "\n".join(lines) or "no cell reads another"


# -- the program


def route_text(compiled: Compiled, program: Program) -> str:
    """Groups with their ports, lanes with what feeds them, taps."""
    names = lane_names(compiled)
    lines = []
    for group in program.groups:
        lines += [f"group {group.name}: layers {ranges(group.layers)}, classes {sorted(group.classes)}"]
        lines += [f"  {_port(port, names)}" for port in group.ports]
        lines += [
            f"  {beside(operation(node), _facts(node), _CODE - 2)}"
            for node in group.graph.nodes
            if node.op == "call_function"
        ]
        output = next(node for node in group.graph.nodes if node.op == "output")
        pairs = zip(group.outputs, output.args[0], strict=True)
        lines += [f"  {name} = {argument(value)}" for name, value in pairs]
        lines.append("")
    lines += [line for lane in program.lanes for line in _lane(lane, names)]
    for tap in program.taps:
        kept = "of every segment" if tap.keep is None else f"of the last {tap.keep + 1} segments"
        kept += f" and of {', '.join(map(str, sorted(tap.pinned)))}" * bool(tap.pinned)
        value = f"{tap.value.kind} {tap.value.layer}" if tap.value.kind == CELL else tap.value.kind
        lines.append(f"tap {tap.name}: of {value}, made {' '.join(map(str, tap.when))}, kept {kept}")
    return "\n".join(lines)


def _port(port: Any, names: dict[str, str]) -> str:
    if port.role == "weight":
        parts = [pattern(leaf) for leaf in zip(*port.source.leaves, strict=True)]
        return f"{port.name}: weight {' | '.join(parts)}{port.source.conversion}"
    if port.role == "lane":
        return f"{port.name}: lane {port.source}{_alias(port.source, names)}"
    if port.role == "shared":
        return f"{port.name}: shared, {port.source.name or port.source.kind}"
    if port.role == "rows":
        return f"{port.name}: weight {port.source.leaf}{port.source.index}, stacked in the model"
    if port.is_weight:
        return f"{port.name}: weight {pattern(source.name for source in port.source)}, not stacked"
    return f"{port.name}: {port.role}"


def _alias(lane: str, names: dict[str, str]) -> str:
    return f" ({names[lane]})" if lane in names else ""


def _lane(lane: Lane, names: dict[str, str]) -> Iterator[str]:
    kind = short_type(str(lane.dtype), lane.shape)
    yield f"lane {lane.name}{_alias(lane.name, names)}: {kind}, layers {ranges(lane.layers)}"
    for feed in lane.feeds:
        source = f"{feed.source} of {feed.group}" if feed.group else f"lane {feed.source}"
        yield f"  offset ({feed.offset[0]},{feed.offset[1]}) from {source}, layers {ranges(feed.layers)}"
    for entry in lane.entries:
        yield f"  layer {entry.layer}: {_entry(entry)}"


def _entry(entry: LaneEntry) -> str:
    parts = [f"segment {s} from {source.name or source.kind}" for s, source in entry.early]
    if entry.steady is not None:
        parts.append(f"{'later ' if parts else ''}from {entry.steady.name or entry.steady.kind}")
    return ", ".join(parts)


def lift_text(compiled: Compiled) -> str:
    """The cell functions, computing n cells at once; n is the leading axis."""
    lines: list[str] = []
    for cell in compiled.emitted.cells:
        nodes = [node for node in cell.graph.nodes if node.op == "call_function"]
        lines += [f"{cell.name}: group {cell.group}, {len(nodes)} operations"]
        lines += [f"  {beside(operation(node), _facts(node), _CODE - 2)}" for node in nodes]
        lines.append("")
    return "\n".join(lines).rstrip()


def program_text(compiled: Compiled, schedule: Schedule, title: str, inputs: tuple[str, ...]) -> str:
    """The whole program in a few lines; see the module docstring."""
    size = f"{schedule.n_layers} layers x {schedule.n_segments} segments, {schedule.n_cells} cells"
    result = ", ".join(result_types(compiled, schedule.n_segments)) or "nothing"
    lines = [beside(f"program {title}({', '.join(inputs)}) -> {result}", size)]
    lines += [_cell_line(compiled, group) for group in compiled.program.groups]
    lines += _grid_lines(compiled)
    return "\n".join([*lines, str(schedule)])


def result_types(compiled: Compiled, count: int) -> list[str]:
    """Types of the tensors that the forward returns for `count` segments; sizes grow evenly."""
    from rmtcompile.report.names import outputs_in

    rolled = compiled.rolled
    types = []
    for index in outputs_in(compiled.result):
        extents = (compiled.capture.extent, compiled.longest)
        a, b = (one.outputs[index] if index < len(one.outputs) else None for one in extents)
        if isinstance(rolled.outputs[index], Each):
            types.append(f"{count} x {type_of(a)}")
        elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dim() == b.dim():
            few, by = rolled.proved_on[0], max(1, rolled.proved_on[-1] - rolled.proved_on[0])
            more = [(int(n) - int(m)) // by for m, n in zip(a.shape, b.shape, strict=True)]
            shape = [int(m) + n * (count - few) for m, n in zip(a.shape, more, strict=True)]
            types.append(short_type(str(a.dtype), shape))
    return types


def _cell_line(compiled: Compiled, group: Group) -> str:
    names = lane_names(compiled)
    lanes = {lane.name: lane for lane in compiled.program.lanes}
    values = [
        f"{names.get(port.source, port.source)}: "
        f"{short_type(str(lanes[port.source].dtype), lanes[port.source].shape)}"
        for port in group.ports
        if port.role == "lane"
    ]
    weights = sum(port.is_weight for port in group.ports)
    count = sum(node.op == "call_function" for node in group.graph.nodes)
    return beside(f"cell {group.name} ({', '.join(values)}; W: {weights} params)", f"{count} ops")


def _grid_lines(compiled: Compiled) -> Iterator[str]:
    names = lane_names(compiled)
    for lane in compiled.program.lanes:
        name = names.get(lane.name, lane.name)
        for feed in lane.feeds:
            ds, dl = feed.offset
            segment = f"s-{ds}" if ds else "s"
            layer = "l" if not dl else f"l{-dl:+d}"
            yield f"grid  {name}(s,l) <- {feed.source}({segment},{layer})  offset ({ds},{dl})"
