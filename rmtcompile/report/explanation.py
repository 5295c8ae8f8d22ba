"""Explain: what was found in a model, what is parallel and what not, and why; or why it is refused."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections import Counter
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.api import Optimized, optimize, schedule_of
from rmtcompile.errors import RMTCompileError, UnsupportedError
from rmtcompile.passes.partition import CELL, INIT
from rmtcompile.passes.wavefront import blocking, blocking_reason
from rmtcompile.pipeline import Compiled
from rmtcompile.report.names import input_labels, model_name, op_name, type_of
from rmtcompile.report.stages import changes
from rmtcompile.schedule import Carry, Schedule, short_type


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a model is not compiled: the error's name, what it found, where, and what would help."""

    error: str
    what: str
    evidence: tuple[str, ...]
    remedy: str
    stage: str = ""


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of an input that is cut into segments; `rest` elements are left for an incomplete last one."""

    input: str
    dim: int
    length: int
    rest: int


@dataclasses.dataclass(frozen=True)
class Variant:
    """A class of cells with the same operations: segments that have it, and how many operations there are."""

    name: str
    segments: tuple[int, ...]
    operations: int


@dataclasses.dataclass(frozen=True)
class Kind:
    """Layers whose cells run in one grouped call."""

    name: str
    layers: tuple[int, ...]
    weights: int


@dataclasses.dataclass(frozen=True)
class Offset:
    """A dependence offset with the place in the model that shows it, and the skew that it asks for."""

    offset: tuple[int, int]
    consumer: str
    producer: str
    reason: str
    skew: int
    blocks: bool


@dataclasses.dataclass(frozen=True)
class StageReport:
    """What a stage of the compiler took and did."""

    name: str
    seconds: float
    before: int
    after: int
    difference: str


@dataclasses.dataclass(frozen=True)
class Speedup:
    """How fast a plan is, as a multiple of the sequential order; `measured` is None without a profile."""

    plan: str
    steps: int
    predicted: float
    measured: float | None = None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What the compiler found in a model.

    `str()` gives text, `to_json()` data, `to_html()` a page; notebooks show a table.

    Attributes:
        model: name of the model.
        refusal: why it is not compiled; the rest is then as far as the compiler came.
        inputs: name and type of each tensor of the call.
        layers: module path of each layer.
        segments: segments of this call.
        axes: where the segments come from.
        proved_on: numbers of segments whose captures prove the rules.
        shortest: the fewest segments that the rules cover; `only` if the program serves this length alone.
        operations: operations of the largest capture, and those of the rules.
        hoisted: operations that run once instead of once a segment, by name.
        optimised: what each pass on the cells changed, as (pass, words).
        merged: operations found equal to others, or read by nothing, in the largest capture.
        plan, why: the plan chosen, and the reason.
        speedups: what each plan promises, and gave if it was measured.
        backend: how cell functions run.
    """

    model: str
    refusal: Refusal | None = None
    inputs: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    segments: int = 0
    axes: tuple[Axis, ...] = ()
    proved_on: tuple[int, ...] = ()
    shortest: int = 1
    only: int | None = None
    variants: tuple[Variant, ...] = ()
    kinds: tuple[Kind, ...] = ()
    offsets: tuple[Offset, ...] = ()
    carries: tuple[Carry, ...] = ()
    operations: tuple[int, int] = (0, 0)
    hoisted: tuple[tuple[str, int], ...] = ()
    merged: int = 0
    optimised: tuple[tuple[str, str], ...] = ()
    schedule: Schedule | None = None
    plan: str = ""
    why: str = ""
    speedups: tuple[Speedup, ...] = ()
    backend: str = ""
    stages: tuple[StageReport, ...] = ()

    @property
    def seconds(self) -> float:
        """Time from the first capture to the emitted module."""
        return sum(stage.seconds for stage in self.stages)

    def __str__(self) -> str:
        from rmtcompile.report.explanation_text import to_text

        return to_text(self)

    def _repr_html_(self) -> str:
        from rmtcompile.report.explanation_text import to_html_fragment

        return to_html_fragment(self)

    def to_html(self) -> str:
        """A page that needs no network."""
        from rmtcompile.report.explanation_text import to_html

        return to_html(self)

    def to_json(self, *, indent: int | None = None) -> str:
        """All fields, and the numbers of the schedule."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "schedule"}
        data = {name: _plain(value) for name, value in fields.items()}
        data["seconds"] = self.seconds
        data["parallelism"] = _parallelism(self.schedule) if self.schedule else None
        return json.dumps(data, indent=indent)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _parallelism(schedule: Schedule) -> dict[str, Any]:
    return {
        "cells": schedule.n_cells,
        "levels": schedule.n_levels,
        "level_rule": schedule.level_rule,
        "alpha": schedule.alpha,
        "width": schedule.width,
        "mean_width": schedule.mean_width,
        "critical_path": schedule.critical_path,
        "optimal": schedule.is_optimal,
        "grouped_calls": schedule.n_calls,
    }


def explain(model: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Say what the compiler finds in `model` when it is called as `model(*args, **kwargs)`; nothing is run.

    A model that is refused is explained, too: the evidence, and what would help.

    Args:
        model: an `nn.Module` or any callable on tensors, or what `optimize` gave for one.  Without
            further arguments, the program of its last call is explained.

    Raises:
        RMTCompileError: without arguments, and nothing was captured yet.
    """
    fast = model if isinstance(model, Optimized) else optimize(model)
    if not args and not kwargs:
        return explain_last(fast)
    reached: list[str] = []
    progress = fast._progress

    def report(line: str) -> None:
        reached.append(line)
        if progress:
            progress(line)

    fast._progress = report
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is part of the explanation
            fast.prepare(*args, **kwargs)
    except UnsupportedError as error:
        refusal = Refusal(
            type(error).__name__,
            error.what,
            error.evidence,
            error.remedy,
            reached[-1] if reached else "probe",
        )
        return Explanation(model_name(fast.model), refusal, _types(fast.model, args, kwargs))
    finally:
        fast._progress = progress
    return explain_last(fast)


def _types(model: Any, args: Any, kwargs: Any) -> tuple[str, ...]:
    flat, spec = pytree.tree_flatten((args, kwargs))
    labels = input_labels(model, spec)
    return tuple(
        f"{label}: {type_of(value)}"
        for label, value in zip(labels, flat, strict=True)
        if isinstance(value, torch.Tensor)
    )


def explain_last(fast: Optimized) -> Explanation:
    """The explanation of the program that the last call ran."""
    if fast._last is None:
        raise RMTCompileError("nothing is captured yet: call the optimized model once, or give its arguments")
    entry, count = fast._last
    compiled = entry.compiled
    schedule = schedule_of(compiled, count)
    inputs, axes = inputs_of(fast)
    rolled = compiled.rolled
    plan, why = plan_of(fast, compiled, schedule)
    backend = entry.executor.backend
    return Explanation(
        model=model_name(fast.model),
        inputs=inputs,
        layers=compiled.layer_paths,
        segments=count,
        axes=axes,
        proved_on=rolled.proved_on,
        shortest=rolled.minimum,
        only=rolled.fixed,
        variants=_variants(compiled, schedule),
        kinds=_kinds(compiled, schedule),
        offsets=_offsets(compiled),
        carries=schedule.carries,
        operations=_operations(compiled),
        hoisted=_hoisted(compiled),
        merged=_merged(compiled),
        optimised=tuple(changes(compiled, fast.compiled.passes_off)),
        schedule=schedule,
        plan=plan,
        why=why,
        speedups=_speedups(fast, schedule, plan),
        backend=backend if isinstance(backend, str) else getattr(backend, "__name__", "custom"),
        stages=tuple(
            StageReport(s.name, s.seconds, sum(s.before.values()), sum(s.after.values()), s.difference)
            for s in compiled.stages
        ),
    )


def inputs_of(fast: Optimized) -> tuple[tuple[str, ...], tuple[Axis, ...]]:
    """Name and type of each tensor that the last call was given, and the axes that are cut into segments."""
    assert fast._last is not None
    entry, count = fast._last
    flat, spec = pytree.tree_flatten(entry.example)
    labels = [
        label
        for label, value in zip(input_labels(fast.model, spec), flat, strict=True)
        if isinstance(value, torch.Tensor)
    ]
    capture = entry.compiled.captures[0]
    values = [node.meta["val"] for node in capture.graph.nodes if node.op == "placeholder"]
    shapes = entry.segmentation.shapes([value.shape for value in values], count)
    inputs = tuple(
        f"{label}: {short_type(str(value.dtype), shape)}"
        for label, value, shape in zip(labels, values, shapes, strict=True)
    )
    axes = tuple(
        Axis(labels[axis.leaf], axis.dim, axis.length, shapes[axis.leaf][axis.dim] % axis.length)
        for axis in entry.segmentation.axes
    )
    return inputs, axes


def _variants(compiled: Compiled, schedule: Schedule) -> tuple[Variant, ...]:
    found: dict[str, list[int]] = {}
    for segment, name in enumerate(schedule.segment_variants):
        found.setdefault(name, []).append(segment)
    layer, count = schedule.n_layers // 2, schedule.n_segments
    return tuple(
        Variant(name, tuple(segments), len(compiled.rolled.rule(CELL, layer, segments[0], count).body.nodes))
        for name, segments in found.items()
    )


def _kinds(compiled: Compiled, schedule: Schedule) -> tuple[Kind, ...]:
    groups = {group.name: group for group in compiled.program.groups}
    return tuple(
        Kind(name, groups[name].layers, sum(port.is_weight for port in groups[name].ports))
        for name in dict.fromkeys(schedule.layer_kinds)
        if name in groups
    )


def _offsets(compiled: Compiled) -> tuple[Offset, ...]:
    from rmtcompile.passes.wavefront import skew

    n_layers = compiled.program.n_layers
    blocked = blocking(compiled.program.offsets, n_layers)
    return tuple(
        Offset(o, d.consumer, d.producer, d.reason, skew({o}, n_layers), o in blocked)
        for o, d in sorted(compiled.dependences.items())
    )


def _operations(compiled: Compiled) -> tuple[int, int]:
    captured = next(
        (s for s in reversed(compiled.stages) if s.name.startswith("capture")), compiled.stages[0]
    )
    rules = compiled.rolled.rules
    kinds: dict[Any, int] = {}
    for by_class in rules.values():
        for rule in by_class.values():
            kinds[rule.body.key] = len(rule.body.nodes)
    return sum(captured.after.values()), sum(kinds.values())


def _hoisted(compiled: Compiled) -> tuple[tuple[str, int], ...]:
    nodes = compiled.rolled.rules[(INIT, -1)][0].body.nodes
    return tuple(Counter(op_name(node) for node in nodes).most_common())


def _merged(compiled: Compiled) -> int:
    stage = next((s for s in reversed(compiled.stages) if s.name == "number"), None)
    return sum(stage.before.values()) - sum(stage.after.values()) if stage else 0


def plan_of(fast: Optimized, compiled: Compiled, schedule: Schedule) -> tuple[str, str]:
    """The plan and the reason for it."""
    offsets, n_layers = compiled.program.offsets, schedule.n_layers
    if fast._options.plan == "sequential":
        return "sequential", "asked for with plan='sequential'"
    if n_layers == 1:
        return "sequential", "there is one layer, and its segments follow each other"
    blocked = blocking(offsets, n_layers)
    if blocked:
        witness = compiled.dependences[blocked[0]]
        return "sequential", (
            f"{blocking_reason(offsets, n_layers)}; {witness.consumer} reads {witness.producer} "
            f"{witness.reason}".rstrip()
        )
    if schedule.n_segments == 1:
        return "diagonal", "one segment alone has one cell a level; more segments will overlap"
    ends = "" if schedule.is_optimal else f" (the longest dependence path has {schedule.critical_path})"
    return "diagonal", (
        f"levels {schedule.level_rule} keep every dependence: {schedule.n_cells} cells in "
        f"{schedule.n_levels} levels{ends}, {schedule.mean_width:.2f} at once on average, "
        f"{schedule.width} at most"
    )


def _speedups(fast: Optimized, schedule: Schedule, plan: str) -> tuple[Speedup, ...]:
    measured = fast.last_profile
    ratio = measured.speedup if measured is not None and measured.schedule == schedule else None
    rows = [Speedup("sequential", schedule.n_cells, 1.0)]
    if plan == "diagonal":
        rows.append(Speedup("diagonal", schedule.n_levels, schedule.mean_width, ratio))
    return tuple(rows)


def offset_line(offset: Offset) -> str:
    """One offset as a sentence."""
    return f"offset ({offset.offset[0]},{offset.offset[1]}): {offset.consumer} reads {offset.producer}"
