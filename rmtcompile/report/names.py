"""Names for people: what the user's program calls a value, and where a value comes from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from rmtcompile.binding.arguments import by_name
from rmtcompile.binding.captured import Call
from rmtcompile.binding.trees import leaves_with_paths
from rmtcompile.compiler.results import outs_of
from rmtcompile.ir.program import Each, Source
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, INIT, PROLOGUE
from rmtcompile.schedule import short_type

if TYPE_CHECKING:
    from rmtcompile.compiler.pipeline import Compiled
    from rmtcompile.passes.grid.reroll import LiveIn


def op_name(node: fx.Node) -> str:
    """`linear` for `aten.linear.default`."""
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))


def type_of(value: Any) -> str:
    """`f32[1,20,64]` of a node, of a fake value or of several."""
    value = value.meta.get("val") if isinstance(value, fx.Node) else value
    if isinstance(value, torch.Tensor):
        return short_type(str(value.dtype), value.shape)
    if isinstance(value, (list, tuple)):
        return f"({', '.join(type_of(item) for item in value)})"
    return ""


def model_name(model: Any) -> str:
    """`ARMT`, or the qualified name of a function."""
    return (
        type(model).__name__
        if isinstance(model, nn.Module)
        else str(getattr(model, "__qualname__", repr(model)))
    )


def input_labels(fn: Any, spec: pytree.TreeSpec) -> list[str]:
    """The name of each leaf of (args, kwargs) as the signature of `fn` has it: `input_ids`, `cache[0]`."""
    args, kwargs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    labels = [f"input {i}" for i in range(spec.num_leaves)]
    for path, index in leaves_with_paths(by_name(fn, args, kwargs)):
        if isinstance(index, int) and 0 <= index < len(labels):
            labels[index] = str(getattr(path[0], "key", path[0])) + pytree.keystr(path[1:])
    return labels


def module_of(node: fx.Node, compiled: Compiled) -> str:
    """Path of the innermost module whose call made the node."""
    calls: list[Call] = compiled.capture.calls if compiled.capture.graph is node.graph else []
    scope = node.meta.get("scope", ())
    return calls[scope[-1]].path if scope and scope[-1] < len(calls) else ""


def inside(path: str, layer_path: str) -> str:
    """`path` as seen from the layer: `self_attn.q_proj` for `model.layers.3.self_attn.q_proj`."""
    for root in layer_path.split(" + "):
        if path == root:
            return ""
        if path.startswith((f"{root}.", f"{root}[")):
            return path[len(root) :].removeprefix(".")
    return path


def outputs_in(rule: Any) -> list[int]:
    """Numbers of the outputs that a result, or a value that is left behind, is made of."""
    return [out.index for out in outs_of(rule)]


def state_names(compiled: Compiled) -> dict[tuple[int, int, int], str]:
    """What the model calls the values that cells leave in it: (layer, class, operation) -> `association`."""
    outputs = compiled.rolled.outputs
    found: dict[tuple[int, int, int], str] = {}
    named = [(effect.name, index) for effect, rule in compiled.effects for index in outputs_in(rule)]
    first = len(outputs) - len(compiled.written)
    named += [(name, first + i) for i, (_, name) in enumerate(compiled.written)]
    for name, index in named:
        source = outputs[index]
        if isinstance(source, Source) and source.kind == CELL:
            short = inside(name, compiled.layer_paths[source.layer])
            for number, node in source.nodes:
                found.setdefault((source.layer, number, node), short)
    return found


def lane_names(compiled: Compiled) -> dict[str, str]:
    """The user's name of each lane that carries, as far as the forward keeps the value in the model."""
    states = state_names(compiled)
    taps = {way: tap for tap in compiled.program.taps if tap.value.kind == CELL for way in tap.group_outputs}
    found: dict[str, str] = {}
    for lane in compiled.program.lanes:
        for feed in lane.feeds:
            tap = taps.get((feed.group, feed.source))
            if not feed.offset[0] or tap is None:
                continue
            names = (states.get((tap.value.layer, number, node)) for number, node in tap.value.nodes)
            name = next((name for name in names if name), None)
            if name and lane.name not in found:
                found[lane.name] = name if name not in found.values() else f"{name} ({lane.name})"
    return found


def value_name(source: Source | Each | None, states: dict[tuple[int, int, int], str]) -> str | None:
    """The user's name of the value behind a live-in, or None."""
    if source is None or source.kind != CELL:
        return None
    return next((states[key] for c, i in source.nodes if (key := (source.layer, c, i)) in states), None)


def where_from(live_in: LiveIn, layer: int) -> str:
    """`cell (s - 1, l)`, `prologue(s)`, `hoisted`, and what the first segments read instead."""
    text = _where(live_in.steady, layer)
    for segment, source in sorted(live_in.early.items()):
        text += f"; in segment {segment} {_where(source, layer)}"
    return text


def _where(source: Source | Each | None, layer: int) -> str:
    if isinstance(source, Each):
        return f"{source.kind} of each segment from {source.first} on"
    if source is None:
        return "?"
    if source.kind == CELL:
        return f"cell ({_segment(source)}, {_relative('l', layer - source.layer)})"
    if source.kind in (PROLOGUE, EPILOGUE):
        return f"{source.kind}({_segment(source)})"
    if source.kind == INIT:
        return "hoisted, computed once"
    return "argument of the forward" if source.kind == "input" else "of the model"


def _segment(source: Source) -> str:
    return _relative("s", source.segment) if source.relative else str(source.segment)


def _relative(name: str, back: int) -> str:
    return name if not back else f"{name} - {back}" if back > 0 else f"{name} + {-back}"


def ranges(numbers: Iterable[int]) -> str:
    """`0..3, 5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


def pattern(paths: Iterable[str]) -> str:
    """`model.layers.{0..3}` for four numbered paths; a list otherwise."""
    import re

    paths = list(paths)
    split = [re.fullmatch(r"(.*?)(\d+)(\D*)", path) for path in paths]
    heads = {(m[1], m[3]) for m in split if m}
    if len(paths) > 1 and all(split) and len(heads) == 1:
        head, tail = next(iter(heads))
        return f"{head}{{{ranges(int(m[2]) for m in split if m)}}}{tail}"
    return ", ".join(paths)
