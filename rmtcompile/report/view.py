"""A compiled program for the viewer: its cells with their operations, its passes, its code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from rmtcompile.passes.partition import CELL, EPILOGUE, INIT, PROLOGUE
from rmtcompile.pipeline import Compiled
from rmtcompile.program import Each, Source
from rmtcompile.report.explanation import explain_last, offset_line
from rmtcompile.report.names import (
    inside,
    model_name,
    module_of,
    op_name,
    state_names,
    value_name,
    where_from,
)
from rmtcompile.report.stages import cell_counts, counts_of, programs
from rmtcompile.schedule import Schedule
from rmtcompile.viewer import CellView, OpView, PassView, ValueView, ViewModel, render

if TYPE_CHECKING:
    from rmtcompile.api import Optimized
    from rmtcompile.passes.reroll import ClassRule

Readers = Mapping[tuple[int, int, int], list[str]]  # (layer, class, operation) -> who reads it


def save_view(fast: Optimized, path: str | Path, title: str | None = None) -> Path:
    """Write the viewer of the last call's program; a suffix other than `.html` gives the schedule alone.

    Raises:
        RMTCompileError: nothing was captured yet.
        ValueError: the suffix is unknown.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        return fast.schedule.save(path)
    path.write_text(render(view_model(fast, title)), encoding="utf-8")
    return path


def view_model(fast: Optimized, title: str | None = None) -> ViewModel:
    """Everything that the viewer shows of the last call's program."""
    compiled, schedule = fast.compiled, fast.schedule
    found = explain_last(fast)
    measured = fast.last_profile
    if measured is not None and measured.schedule != schedule:
        measured = None
    lengths = " and ".join(map(str, found.proved_on))
    facts = [
        ("plan", found.plan),
        ("skew", str(schedule.alpha)),
        ("compiled in", f"{found.seconds:.1f} s"),
        ("captured", f"{lengths} segments"),
    ]
    return ViewModel(
        title=title or model_name(fast.model),
        schedule=schedule,
        cells=tuple(_cells(compiled, schedule)),
        passes=tuple(_passes(compiled, fast.compiled.passes_off)),
        code=compiled.emitted.source,
        code_phases=dict(compiled.emitted.phases),
        profile=measured.view() if measured is not None else None,
        device=measured.device if measured is not None else "",
        facts=tuple(facts),
        notes=(
            f"{found.plan}: {found.why}",
            *(offset_line(offset) for offset in found.offsets),
            *(f"reads {text}" for text in found.inputs),
        ),
    )


# -- cells


def _cells(compiled: Compiled, schedule: Schedule) -> Iterator[CellView]:
    """One view for each pair of kind and variant, from a layer in the middle of the kind."""
    readers, states = _readers(compiled), state_names(compiled)
    for kind in dict.fromkeys(schedule.layer_kinds):
        layers = [layer for layer, name in enumerate(schedule.layer_kinds) if name == kind]
        layer = layers[len(layers) // 2]
        for variant in dict.fromkeys(schedule.segment_variants):
            segment = schedule.segment_variants.index(variant)
            number = compiled.rolled.classes[(CELL, layer)].of(segment, schedule.n_segments)
            if number in compiled.rolled.rules[(CELL, layer)]:
                yield _cell(compiled, kind, variant, (layers[0], layer), number, readers, states)


def _cell(
    compiled: Compiled,
    kind: str,
    variant: str,
    layers: tuple[int, int],
    number: int,
    readers: Readers,
    states: dict[tuple[int, int, int], str],
) -> CellView:
    layer = layers[1]
    rule = compiled.rolled.rules[(CELL, layer)][number]
    path = compiled.layer_paths[layer]
    names = _names(rule, layer, number, path, states)
    live_ins, params = _entering(compiled, number, layers, path, names)
    ops = tuple(_op(compiled, node, path, names) for node in rule.body.nodes)
    live_outs = []
    for i, node in enumerate(rule.body.nodes):
        notes = readers.get((layer, number, i))
        if notes:
            state = states.get((layer, number, i))
            shown = f"{names[node]}, carried as {state}" if state else names[node]
            live_outs.append(_value(shown, node, "to " + ", ".join(notes)))
    carried = {states[key] for key in states if key[0] == layer}
    return CellView(
        kind, variant, ops, tuple(live_ins), tuple(live_outs), tuple(sorted(carried)), tuple(params)
    )


def _names(
    rule: ClassRule, layer: int, number: int, path: str, states: dict[tuple[int, int, int], str]
) -> dict[fx.Node, str]:
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
            names[node] = fresh(value_name(steady, states) or ("x" if hidden else op_name(node)))
    for node in rule.body.nodes:
        names[node] = fresh(op_name(node))
    return names


def _entering(
    compiled: Compiled, number: int, layers: tuple[int, int], path: str, names: dict[fx.Node, str]
) -> tuple[list[ValueView], list[ValueView]]:
    """Live-ins and parameters of `layers[1]`; what the lowest layer reads from elsewhere is noted."""
    lowest, layer = layers
    rule = compiled.rolled.rules[(CELL, layer)][number]
    below = compiled.rolled.rules[(CELL, lowest)].get(number, rule)
    live_ins: list[ValueView] = []
    params: list[ValueView] = []
    for live_in, first, node in zip(rule.sources, below.sources, rule.body.live_ins, strict=True):
        if not isinstance(node, fx.Node):
            continue
        steady = live_in.steady
        if isinstance(steady, Source) and steady.kind == "leaf":
            tensor = compiled.leaves[steady.name].tensor
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
    )


def _value(name: str, node: fx.Node, note: str) -> ValueView:
    return ValueView(name, *_type(node), note)


def _type(node: fx.Node) -> tuple[tuple[int, ...], str]:
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return (), ""
    return tuple(int(n) for n in val.shape), str(val.dtype).removeprefix("torch.")


def _readers(compiled: Compiled) -> dict[tuple[int, int, int], list[str]]:
    """For each value of a cell, who reads it outside the cell."""
    found: dict[tuple[int, int, int], list[str]] = {}

    def note(source: Source | Each | None, text: str) -> None:
        if source is None or source.kind != CELL:
            return
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
    states = state_names(compiled)
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


# -- passes


def _passes(compiled: Compiled, switched_off: frozenset[str]) -> Iterator[PassView]:
    """The stages of the last capture and what follows, each with the operations before it and after it."""
    stages = list(compiled.stages)
    start = max((i for i, s in enumerate(stages) if s.name.startswith("capture")), default=0)
    counts: dict[str, int] = {}
    if start:
        last = next(s for s in reversed(stages[:start]) if s.after)
        took = sum(s.seconds for s in stages[:start])
        yield PassView(
            stages[0].name, {}, _plain(last.after), took, "with the stages below it, up to partition"
        )
    around = _outside(compiled)
    for stage in stages[start:]:
        steps = _steps(compiled, stage.name, switched_off) or [(stage.name, stage.after or counts)]
        for i, (name, after) in enumerate(steps):
            if stage.name.startswith(_ON_CELLS):
                after = dict(around + Counter(after))
            before = _plain(stage.before) or counts
            after = _plain(after)
            yield PassView(name, before, after, stage.seconds if not i else 0.0, _note(name))
            counts = after


def _plain(counts: Mapping[str, int]) -> dict[str, int]:
    """`getitem` for `<built-in function getitem>`."""
    return {name.removeprefix("<built-in function ").removesuffix(">"): n for name, n in counts.items()}


_ON_CELLS = ("route", "align", "optimise", "lift", "emit")


def _steps(compiled: Compiled, name: str, switched_off: frozenset[str]) -> list[tuple[str, dict[str, int]]]:
    """The operations after a stage that does not work on one graph; its passes one by one."""
    if name.startswith("reroll"):
        bodies = {rule.body.key: rule.body for by in compiled.rolled.rules.values() for rule in by.values()}
        total = Counter(op_name(node) for body in bodies.values() for node in body.nodes)
        return [(name, dict(total))]
    if name.startswith(("route", "align", "optimise")):
        first = name.startswith("optimise")
        found = [(n, cell_counts(program)) for n, program in programs(compiled, switched_off)]
        return found[1:] if first else [(name, found[0][1])]
    if name.startswith(("lift", "emit")):
        return [(name, counts_of(cell.graph for cell in compiled.emitted.cells))]
    return []


def _outside(compiled: Compiled) -> Counter[str]:
    total: Counter[str] = Counter()
    for kind in (INIT, PROLOGUE, EPILOGUE):
        for rule in compiled.rolled.rules[(kind, -1)].values():
            total.update(op_name(node) for node in rule.body.nodes)
    return total


_NOTES = {
    "capture": "the model's own forward, traced once on tensors without memory",
    "functionalise": "no operation writes into its operands any more",
    "forward": "a read of a stored value is the value, past stacks, slices and rolls",
    "number": "equal operations become one: what is the same for all segments is found here",
    "partition": "each operation gets its place on the grid; the operations stay",
    "reroll": "one body for each class of segments instead of one for each segment",
    "dependence": "offsets between cells; the operations stay",
    "wavefront": "a level for each cell; the operations stay",
    "route": "one graph for each kind of layer, its variants merged",
    "causal": "a mask that lets each token see those before it becomes a flag of the attention",
    "grouped_query": "key and value heads are no longer repeated for the query heads that share them",
    "fuse_linears": "linears over the same input become one",
    "lift": "each cell function computes n cells; one function for each mixture of variants",
}


def _note(name: str) -> str:
    return next((text for key, text in _NOTES.items() if name.startswith(key)), "")
