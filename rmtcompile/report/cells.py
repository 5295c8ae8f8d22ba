"""The cells of a compiled program for the viewer: their operations, and what enters and leaves them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
from torch import fx, nn

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.ir.program import Each, Port, Source
from rmtcompile.passes.emit import target_name
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, INIT, PROLOGUE
from rmtcompile.passes.grid.reroll import ClassRule, LiveIn
from rmtcompile.report.names import inside, module_of, op_name, state_names, value_name, where_from
from rmtcompile.schedule import Carry, Cell, Schedule
from rmtcompile.viewer import CellView, FunctionView, OpView, ValueView

Key = tuple[int, int, int]  # (layer, class, operation)

AROUND = {
    INIT: "once, for all segments",
    PROLOGUE: "for each segment, before layer 0",
    EPILOGUE: "for each segment, after the last layer",
}
"""When the regions outside the grid run."""


def cells_of(compiled: Compiled, schedule: Schedule) -> Iterator[CellView]:
    """One view for each pair of kind and variant, from a layer in the middle of the kind."""
    about = _About(compiled, schedule.carries)
    for kind in dict.fromkeys(schedule.layer_kinds):
        layers = [layer for layer, name in enumerate(schedule.layer_kinds) if name == kind]
        layer = layers[len(layers) // 2]
        for variant in dict.fromkeys(schedule.segment_variants):
            segment = schedule.segment_variants.index(variant)
            number = compiled.rolled.classes[(CELL, layer)].of(segment, schedule.n_segments)
            if number in compiled.rolled.rules[(CELL, layer)]:
                yield _cell(about, kind, variant, (layers[0], layer), number)


def around_of(compiled: Compiled, schedule: Schedule) -> Iterator[CellView]:
    """Init, prologue and epilogue, each as most segments have it."""
    about = _About(compiled, schedule.carries)
    for kind, when in AROUND.items():
        rules = compiled.rolled.rules.get((kind, -1), {})
        if not rules:
            continue
        rule = rules[max(rules)]
        names = _names(about, rule, -1, "")
        ops = tuple(_op(compiled, node, "", names) for node in rule.body.nodes)
        live_ins, params = _entering(about, rule, rule, (-1, -1), names)
        if ops:
            yield CellView(kind, when, ops, tuple(live_ins), params=tuple(params))


def generated_of(compiled: Compiled) -> Iterator[FunctionView]:
    """The functions of the emitted module that compute n cells at once, as they stand after all passes."""
    for cell in compiled.emitted.cells:
        group = next((one for one in compiled.program.groups if one.name == cell.group), None)
        ports = {port.name: port for port in group.ports} if group is not None else {}
        inputs = [node for node in cell.graph.nodes if node.op == "placeholder"]
        output = next(node for node in cell.graph.nodes if node.op == "output")
        yield FunctionView(
            cell.name,
            tuple(_generated(compiled, node) for node in cell.graph.nodes if node.op == "call_function"),
            tuple(_input(node, ports.get(node.name)) for node in inputs),
            tuple(value.name for value in output.args[0] if isinstance(value, fx.Node)),
        )


def _input(node: fx.Node, port: Port | None) -> ValueView:
    shape, dtype = _type(node)
    if port is None:
        return ValueView(node.name, shape, dtype)
    return ValueView(node.name, _grouped(shape) if port.has_axis else shape, dtype, port.role)


def _grouped(shape: tuple[int, ...]) -> tuple[int | str, ...]:
    """The shape of n cells; that of the capture has a number of its own there."""
    return ("n", *shape[1:]) if shape else ()


def _generated(compiled: Compiled, node: fx.Node) -> OpView:
    shape, dtype = _type(node)
    calls, scope = compiled.capture.calls, node.meta.get("scope", ())
    path = calls[scope[-1]].path if scope and scope[-1] < len(calls) else ""
    layer = next((root for root in compiled.layer_paths if inside(path, root) != path), "")
    return OpView(
        node.name,
        op_name(node),
        _grouped(shape),
        dtype,
        str(node.meta.get("source", "")),
        inside(path, layer),
        tuple(operand.name for operand in node.all_input_nodes),
        _target(node),
    )


def operations_of(compiled: Compiled, count: int) -> Callable[[Cell], tuple[OpView, ...]]:
    """A function from the cells of `count` segments to their operations."""

    def operations(cell: Cell) -> tuple[OpView, ...]:
        segment, layer = cell
        number = compiled.rolled.classes[(CELL, layer)].of(segment, count)
        rule = compiled.rolled.rules[(CELL, layer)][number]
        path = compiled.layer_paths[layer]
        names = _names(_About(compiled, ()), rule, layer, path)
        return tuple(_op(compiled, node, path, names) for node in rule.body.nodes)

    return operations


class _About:
    """What is known of the values of a program: who reads them, and what the user calls them."""

    def __init__(self, compiled: Compiled, carries: tuple[Carry, ...]) -> None:
        self.compiled = compiled
        self.carries = carries

    @cached_property
    def states(self) -> dict[Key, str]:
        return state_names(self.compiled)

    @cached_property
    def readers(self) -> Mapping[Key, list[str]]:
        return _readers(self.compiled, self.states)

    def carried(self, live_in: LiveIn, node: fx.Node, layer: int) -> str | None:
        """The name of the carry that a live-in is, where only one fits."""
        source = live_in.steady
        if not isinstance(source, Source) or source.kind != CELL or not source.relative or layer < 0:
            return None
        offset = (source.segment, layer - source.layer)
        shape = _type(node)[0]
        fits = [
            carry.name
            for carry in self.carries
            if carry.offset == offset and carry.shape == shape and source.layer in carry.producer_layers
        ]
        return fits[0] if len(fits) == 1 else None


def _cell(about: _About, kind: str, variant: str, layers: tuple[int, int], number: int) -> CellView:
    compiled, (lowest, layer) = about.compiled, layers
    rules = compiled.rolled.rules
    rule = rules[(CELL, layer)][number]
    path = compiled.layer_paths[layer]
    names = _names(about, rule, layer, path)
    live_ins, params = _entering(about, rule, rules[(CELL, lowest)].get(number, rule), layers, names)
    live_outs = []
    for i, node in enumerate(rule.body.nodes):
        notes = about.readers.get((layer, number, i))
        if notes:
            state = about.states.get((layer, number, i))
            shown = f"{names[node]}, carried as {state}" if state else names[node]
            live_outs.append(_value(shown, node, "to " + ", ".join(notes)))
    carried = {name for key, name in about.states.items() if key[0] == layer}
    return CellView(
        kind,
        variant,
        tuple(_op(compiled, node, path, names) for node in rule.body.nodes),
        tuple(live_ins),
        tuple(live_outs),
        tuple(sorted(carried)),
        tuple(params),
        tuple(f.name for f in compiled.emitted.cells if f.group == kind and number in f.classes),
    )


def _names(about: _About, rule: ClassRule, layer: int, path: str) -> dict[fx.Node, str]:
    """Names by position for operations, and what the model calls them for values from outside."""
    names: dict[fx.Node, str] = {}
    taken: Counter[str] = Counter()

    def fresh(name: str) -> str:
        taken[name] += 1
        return name if taken[name] == 1 else f"{name}_{taken[name] - 1}"

    for live_in, node in zip(rule.sources, rule.body.live_ins, strict=True):
        if not isinstance(node, fx.Node):
            continue
        steady = live_in.steady
        if isinstance(steady, Source) and steady.kind in ("leaf", "input"):
            names[node] = fresh(inside(steady.name, path))
        else:
            hidden = isinstance(steady, Source) and steady.kind in (CELL, PROLOGUE) and layer >= 0
            name = value_name(steady, about.states) or about.carried(live_in, node, layer)
            names[node] = fresh(name or ("x" if hidden else op_name(node)))
    for node in rule.body.nodes:
        names[node] = fresh(op_name(node))
    return names


def _entering(
    about: _About, rule: ClassRule, below: ClassRule, layers: tuple[int, int], names: dict[fx.Node, str]
) -> tuple[list[ValueView], list[ValueView]]:
    """Live-ins and parameters of `rule`, of `layers[1]`, with what the lowest layer reads from elsewhere."""
    lowest, layer = layers
    live_ins: list[ValueView] = []
    params: list[ValueView] = []
    for live_in, first, node in zip(rule.sources, below.sources, rule.body.live_ins, strict=True):
        if not isinstance(node, fx.Node):
            continue
        steady = live_in.steady
        if isinstance(steady, Source) and steady.kind == "leaf":
            tensor = about.compiled.leaves[steady.name].tensor
            shown = ValueView(names[node], tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            if isinstance(tensor, nn.Parameter):
                params.append(shown)
                continue
        where, at_first = where_from(live_in, layer), where_from(first, lowest)
        if at_first != where:
            where += f"; in layer {lowest} {at_first}"
        live_ins.append(_value(names[node], node, where))
    return live_ins, params


def _op(compiled: Compiled, node: fx.Node, path: str, names: dict[fx.Node, str]) -> OpView:
    shape, dtype = _type(node)
    return OpView(
        names[node],
        op_name(node),
        shape,
        dtype,
        str(node.meta.get("source", "")),
        inside(module_of(node, compiled), path),
        tuple(names[operand] for operand in node.all_input_nodes if operand in names),
        _target(node),
    )


def _target(node: fx.Node) -> str:
    """`aten.linear.default`, or the name of a function of ours."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return target_name(node.target)


def _value(name: str, node: fx.Node, note: str) -> ValueView:
    return ValueView(name, *_type(node), note)


def _type(node: fx.Node) -> tuple[tuple[int, ...], str]:
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return (), ""
    return tuple(int(n) for n in val.shape), str(val.dtype).removeprefix("torch.")


def _readers(compiled: Compiled, states: dict[Key, str]) -> dict[Key, list[str]]:
    """For each value of a cell, who reads it outside the cell."""
    found: dict[Key, list[str]] = {}

    def note(source: Source | Each, text: str) -> None:
        for number, node in source.nodes:
            notes = found.setdefault((source.layer, number, node), [])
            if text not in notes:
                notes.append(text)

    for (kind, layer), by_class in compiled.rolled.rules.items():
        for rule in by_class.values():
            for live_in in rule.sources:
                for source in (*live_in.early.values(), live_in.steady):
                    if isinstance(source, (Source, Each)) and source.kind == CELL:
                        note(source, _reader(kind, layer, source))
    for source in compiled.rolled.outputs:
        if source.kind == CELL:
            kept = any((source.layer, number, node) in states for number, node in source.nodes)
            note(source, "the model, which keeps it" if kept else "the result")
    return found


def _reader(kind: str, layer: int, source: Source | Each) -> str:
    ahead = source.segment if isinstance(source, Source) and source.relative else 0
    segment = f"s + {ahead}" if ahead else "s"
    if kind == CELL:
        up = layer - source.layer
        return f"cell ({segment}, {'l' if not up else f'l + {up}' if up > 0 else f'l - {-up}'})"
    return f"{kind}({segment})"
