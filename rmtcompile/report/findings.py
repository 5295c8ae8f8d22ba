"""Explain: fills in an `Explanation` from a compiled program, or from the refusal to compile one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.errors import UnsupportedError
from rmtcompile.passes.grid.partition import CELL
from rmtcompile.passes.grid.wavefront import wavefront
from rmtcompile.report.explanation import (
    Axis,
    Explanation,
    Kind,
    Offset,
    Refusal,
    Speedup,
    StageReport,
    Variant,
)
from rmtcompile.report.facts import Facts, facts_of, is_loaded
from rmtcompile.report.names import input_labels, model_name, type_of
from rmtcompile.report.plans import Measured, bands_of, measured_plans
from rmtcompile.report.scheduled import schedule_of
from rmtcompile.schedule import Schedule, blocking, blocking_reason, short_type, skew

if TYPE_CHECKING:
    from rmtcompile.optimized import Optimized


def explain_refusal(
    fast: Optimized, error: UnsupportedError, stage: str, args: Any, kwargs: Any
) -> Explanation:
    """The explanation of a model that is refused: the evidence, and what would help.

    Args:
        stage: the last stage of the compiler that was reached.
    """
    refusal = Refusal(type(error).__name__, error.what, error.evidence, error.remedy, stage)
    return Explanation(model_name(fast.model), refusal, _types(fast.model, args, kwargs))


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
    entry, count = fast._ran
    compiled, backend = entry.compiled, entry.executor.backend
    facts = facts_of(compiled)
    schedule = schedule_of(compiled, count, facts, bands_of(entry.executor))
    inputs, axes = inputs_of(fast)
    measured = measured_plans(entry.executor, schedule.n_segments)
    plan, why = plan_of(fast, compiled, schedule, measured)
    return Explanation(
        model=model_name(fast.model),
        inputs=inputs,
        layers=compiled.layer_paths,
        segments=count,
        axes=axes,
        parts=compiled.parts,
        proved_on=compiled.proved_on,
        followed_to=max(entry.lengths.followed_to, compiled.proved_on[-1]),
        compared_to=entry.lengths.checked_to,
        unfollowed=entry.lengths.unknown,
        shortest=compiled.fewest,
        only=compiled.fixed,
        variants=_variants(compiled, schedule, facts),
        kinds=_kinds(compiled, schedule, facts),
        offsets=_offsets(compiled),
        carries=schedule.carries,
        operations=(_captured(compiled), facts.rules),
        hoisted=facts.hoisted,
        apart=facts.apart,
        merged=_shrunk_by(compiled, "number"),
        dropped=_shrunk_by(compiled, "drop"),
        optimised=facts.optimised,
        schedule=schedule,
        plan=plan,
        why=why,
        speedups=_speedups(fast, schedule, plan, measured),
        backend=backend if isinstance(backend, str) else getattr(backend, "__name__", "custom"),
        stages=tuple(
            StageReport(s.name, s.seconds, sum(s.before.values()), sum(s.after.values()), s.difference)
            for s in compiled.stages
        ),
        compile_seconds=measured.compile_seconds,
        workspace_seconds=measured.workspace_seconds,
        recorded=measured.recorded,
        bands=measured.bands,
        recomputed=entry.executor.keeping.block,
        fitted=entry.executor.keeping.words,
        checkpoint=compiled.capture.checkpoint,
        loaded=is_loaded(compiled),
        unused=tuple(fast._programs.shelf.notes),
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
    values = [value for value in flat if isinstance(value, torch.Tensor)]
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


def _variants(compiled: Compiled, schedule: Schedule, facts: Facts) -> tuple[Variant, ...]:
    layer = schedule.n_layers // 2
    return tuple(
        Variant(name, segments, _operations_of(compiled, schedule, facts, layer, segments[0]))
        for name, segments in _segments_of(schedule).items()
    )


def _segments_of(schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """The segments of each variant."""
    found: dict[str, list[int]] = {}
    for segment, name in enumerate(schedule.segment_variants):
        found.setdefault(name, []).append(segment)
    return {name: tuple(segments) for name, segments in found.items()}


def _operations_of(
    compiled: Compiled, schedule: Schedule, facts: Facts, layer: int, segment: int
) -> int:
    number = compiled.rolled.classes[(CELL, layer)].of(segment, schedule.n_segments)
    return facts.bodies[layer, number]


def _kinds(compiled: Compiled, schedule: Schedule, facts: Facts) -> tuple[Kind, ...]:
    groups = {group.name: group for group in compiled.program.groups}
    found = []
    for name in dict.fromkeys(schedule.layer_kinds):
        if name not in groups:  # nothing reads these layers
            continue
        group = groups[name]
        operations = tuple(
            (variant, _operations_of(compiled, schedule, facts, group.layers[0], segments[0]))
            for variant, segments in _segments_of(schedule).items()
        )
        weights = sum(port.is_weight for port in group.ports)
        found.append(Kind(name, group.layers, weights, operations))
    return tuple(found)


def _offsets(compiled: Compiled) -> tuple[Offset, ...]:
    n_layers = compiled.program.n_layers
    blocked = blocking(compiled.program.offsets, n_layers)
    return tuple(
        Offset(o, d.consumer, d.producer, d.reason, skew({o}, n_layers), o in blocked)
        for o, d in sorted(compiled.dependences.items())
    )


def _captured(compiled: Compiled) -> int:
    """Operations of the largest capture."""
    stages = reversed(compiled.stages)
    captured = next((s for s in stages if s.name.startswith("capture")), compiled.stages[0])
    return sum(captured.after.values())


def _shrunk_by(compiled: Compiled, name: str) -> int:
    """By how many operations a stage made the largest capture smaller."""
    stage = next((s for s in reversed(compiled.stages) if s.name == name), None)
    return sum(stage.before.values()) - sum(stage.after.values()) if stage else 0


def plan_of(fast: Optimized, compiled: Compiled, schedule: Schedule, measured: Measured) -> tuple[str, str]:
    """The plan that runs, and the reason for it."""
    offsets, n_layers = compiled.program.offsets, schedule.n_layers
    if fast.options.plan == "sequential":
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
    if measured.chosen and len(measured.seconds) > 1:
        return measured.chosen, _cheaper(measured)
    if schedule.n_segments == 1:
        return "diagonal", "one segment alone has one cell a level; more segments will overlap"
    ends = "" if schedule.is_optimal else f" (the longest dependence path has {schedule.critical_path})"
    return "diagonal", (
        f"levels {schedule.level_rule} keep every dependence: {schedule.n_cells} cells in "
        f"{schedule.n_levels} levels{ends}, {schedule.mean_width:.2f} at once on average, "
        f"{schedule.width} at most"
    )


def _cheaper(measured: Measured) -> str:
    """`measured: diagonal 1.2 ms, sequential 2.4 ms`, the cheapest first."""
    ranked = sorted(measured.seconds.items(), key=lambda item: item[1])
    return "measured: " + ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in ranked)


def _speedups(fast: Optimized, schedule: Schedule, plan: str, measured: Measured) -> tuple[Speedup, ...]:
    """The sequential plan and the wide one; the profile is of the plan that runs."""
    profile = fast.last_profile
    is_of_this = profile is not None and profile.schedule == schedule and profile.sequential_us
    ratio = profile.speedup if profile is not None and is_of_this else None
    rows = [("sequential", schedule.n_cells, 1.0)]
    widest = schedule
    if schedule.alpha >= schedule.n_layers:  # what was not chosen, or not asked for
        widest = wavefront(schedule.offsets, schedule.n_layers, schedule.n_segments)
    if widest.n_levels < schedule.n_cells:
        rows.append(("diagonal", widest.n_levels, widest.mean_width))
    return tuple(
        Speedup(name, steps, predicted, ratio if name == plan else None, measured.seconds.get(name))
        for name, steps, predicted in rows
    )
