"""What the viewer shows, as frozen data: plain values, so that anything can fill it and tests can read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rmtcompile.schedule import BandTimes, Carry, Schedule, blocking_reason, short_type
from rmtcompile.schedule.memory import alive_bytes, growth

PHASES = ("ramp_up", "steady", "ramp_down")
TEXT_CHARS = 300_000
"""The longest text of a pass that a page holds."""


@dataclasses.dataclass(frozen=True)
class OpView:
    """One operation of a cell.

    Args:
        name: of the value, unique in the cell (`linear_3`).
        op: what is computed (`linear`).
        shape, dtype: of the result.
        source: the user's `file:line`.
        module: path of the module that ran it, from the layer (`self_attn.q_proj`).
        inputs: names of the operations, live-ins and parameters it reads.
        target: what is called, in full (`aten.linear.default`).
    """

    name: str
    op: str
    shape: tuple[int | str, ...] = ()
    dtype: str = ""
    source: str = ""
    module: str = ""
    inputs: tuple[str, ...] = ()
    target: str = ""

    @property
    def type(self) -> str:
        """`bf16[1,1152,2048]`, or nothing for an operation without a tensor result."""
        return short_type(self.dtype, self.shape) if self.dtype else ""


@dataclasses.dataclass(frozen=True)
class ValueView:
    """A value that enters or leaves a cell, or a parameter of it; `note` says where from or where to."""

    name: str
    shape: tuple[int | str, ...] = ()
    dtype: str = ""
    note: str = ""

    @property
    def type(self) -> str:
        """`f32[8,64,64]`, or nothing for a value that is no tensor."""
        return short_type(self.dtype, self.shape) if self.dtype else ""


@dataclasses.dataclass(frozen=True)
class FunctionView:
    """A function of the emitted module that computes n cells at once.

    Args:
        ops: in the order in which they run; shapes begin with "n".
        inputs: its arguments.
        outputs: names of the values that it returns.
    """

    name: str
    ops: tuple[OpView, ...] = ()
    inputs: tuple[ValueView, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CellView:
    """The cells of one kind of layer and one variant of segment: they have the same operations.

    A region outside the grid is one, too: its kind is its name, its variant says when it runs.

    Args:
        kind: the name in `Schedule.layer_kinds`.
        variant: the name in `Schedule.segment_variants`.
        ops: in the order in which they run.
        live_ins, live_outs: values that come from, and go to, other cells.
        carries: names of the schedule's carries that this cell reads or writes.
        params: the parameters of one cell.
        functions: names of the functions in the emitted module that compute this cell.
    """

    kind: str
    variant: str
    ops: tuple[OpView, ...] = ()
    live_ins: tuple[ValueView, ...] = ()
    live_outs: tuple[ValueView, ...] = ()
    carries: tuple[str, ...] = ()
    params: tuple[ValueView, ...] = ()
    functions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class WitnessView:
    """The place in the model that shows a dependence offset: who reads, and what is read."""

    offset: tuple[int, int]
    reader: str
    writer: str


@dataclasses.dataclass(frozen=True)
class PassView:
    """One pass of the pipeline: how often each operation stood in the program before it and after it.

    `text` is the program after the pass; "" where it is not known.
    """

    name: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    seconds: float = 0.0
    note: str = ""
    text: str = ""


@dataclasses.dataclass(frozen=True)
class ProfileView:
    """Measured time.

    Args:
        level_us: microseconds of each level.
        kind_us: microseconds of each kind of operation, over the whole run.
        utilisation: share of the device's peak on each level, 0 to 1; empty if it was not measured.
        sequential_us: one call of the model's own forward, to compare with.
        outside_us: microseconds before the first level and after the last.
        level_kinds: for each level, microseconds of each kind of operation; empty if it was not measured.
        backward_us: microseconds of each level's part of backward; empty if it was not measured.
        bands: when the levels of each band ran; empty where the layers are not cut, or it was not measured.
    """

    level_us: tuple[float, ...]
    kind_us: Mapping[str, float] = dataclasses.field(default_factory=dict)
    utilisation: tuple[float, ...] = ()
    sequential_us: float | None = None
    outside_us: float = 0.0
    level_kinds: tuple[Mapping[str, float], ...] = ()
    backward_us: tuple[float, ...] = ()
    bands: tuple[BandTimes, ...] = ()


@dataclasses.dataclass(frozen=True)
class ViewModel:
    """Everything that one viewer file shows; only `title` and `schedule` are needed.

    Args:
        title: what the page is called, as a rule the model's name.
        schedule: the grid and its levels.
        cells: one template for each (kind, variant) that occurs.
        around: what runs outside the grid: before it, before layer 0, after the last layer.
        values: what cells hand to other cells of the same segment, as carries are described.
        generated: the functions of the emitted module that cells name in `functions`.
        witnesses: the place in the model that shows each offset.
        passes: the pipeline in order.
        code: the emitted module.
        code_phases: first and last line (from 1) of "ramp_up", "steady" and "ramp_down" in `code`.
        profile: measured times.
        device: what the profile was measured on.
        facts: more (name, value) pairs for the page's head, such as the plan chosen.
        explanation: (title, lines): what was found in the model, and why the plan was chosen.
    """

    title: str
    schedule: Schedule
    cells: tuple[CellView, ...] = ()
    around: tuple[CellView, ...] = ()
    values: tuple[Carry, ...] = ()
    generated: tuple[FunctionView, ...] = ()
    witnesses: tuple[WitnessView, ...] = ()
    passes: tuple[PassView, ...] = ()
    code: str = ""
    code_phases: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    profile: ProfileView | None = None
    device: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    explanation: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        n_lines = len(self.code.splitlines())
        for phase, (first, last) in self.code_phases.items():
            if phase not in PHASES or not 1 <= first <= last <= n_lines:
                raise ValueError(
                    f"code_phases[{phase!r}] = ({first}, {last}): expected one of {', '.join(PHASES)} "
                    f"and lines from 1 to {n_lines}"
                )
        if self.profile is None:
            return
        fields = ("level_us", "utilisation", "level_kinds")
        for name, values in ((name, getattr(self.profile, name)) for name in fields):
            if len(values) != self.schedule.n_levels and (values or name == "level_us"):
                raise ValueError(
                    f"profile.{name} has {len(values)} values for {self.schedule.n_levels} levels"
                )
        if self.profile.bands and len(self.profile.bands) != len(self.schedule.bands):
            raise ValueError(f"times of {len(self.profile.bands)} bands for {len(self.schedule.bands)}")


def to_dict(view: ViewModel) -> dict[str, Any]:
    """The page's data as JSON values; the names are those that the page's script reads."""
    texts = list(dict.fromkeys(p.text for p in view.passes if p.text))
    return {
        "title": view.title,
        "device": view.device,
        "facts": [list(fact) for fact in view.facts],
        "explanation": [[title, list(lines)] for title, lines in view.explanation],
        "schedule": _schedule(view.schedule),
        "memory": _memory(view.schedule, view.values),
        "cells": [_cell(cell) for cell in view.cells],
        "around": [_cell(cell) for cell in view.around],
        "generated": {f.name: [_op(op) for op in f.ops] for f in view.generated},
        "witnesses": [[list(w.offset), w.reader, w.writer] for w in view.witnesses],
        "passes": [
            {
                **dataclasses.asdict(p),
                "before": dict(p.before),
                "after": dict(p.after),
                "text": texts.index(p.text) if p.text else None,
            }
            for p in view.passes
        ],
        "texts": [_cut(text) for text in texts],
        "code": view.code,
        "codePhases": {phase: list(lines) for phase, lines in view.code_phases.items()},
        "profile": _profile(view.profile) if view.profile else None,
    }


def _schedule(schedule: Schedule) -> dict[str, Any]:
    phases = schedule.phases
    return {
        "layers": schedule.n_layers,
        "segments": schedule.n_segments,
        "alpha": schedule.alpha,
        "block": schedule.block or schedule.n_segments,
        "rule": schedule.level_rule,
        "offsets": [list(o) for o in sorted(schedule.offsets)],
        "readers": [list(schedule.readers(o)) for o in sorted(schedule.offsets)],
        "levels": schedule.n_levels,
        "criticalPath": schedule.critical_path,
        "calls": schedule.n_calls,
        "phases": {name: [r.start, r.stop] for name, r in zip(PHASES, phases)},
        "carries": [
            {
                "name": c.name,
                "offset": list(c.offset),
                "type": c.type,
                "bytes": c.nbytes,
                "total": c.total_bytes(schedule.n_layers),
                "layers": list(c.writers(schedule.n_layers)),
                "source": c.source,
                "through": c.through,
            }
            for c in schedule.carries
        ],
        "variants": list(schedule.segment_variants),
        "kinds": list(schedule.layer_kinds),
        "bands": [[band.start, band.stop] for band in schedule.bands],
        "lag": schedule.lag,
        "blocked": blocking_reason(schedule.offsets, schedule.n_layers),
    }


def _memory(schedule: Schedule, values: tuple[Carry, ...]) -> dict[str, Any]:
    """Bytes that are alive on each level, and how levels and bytes grow with the number of segments."""
    grid, found = schedule.grid, growth(schedule, values)
    return {
        "carried": list(alive_bytes(grid, schedule.carries)),
        "values": list(alive_bytes(grid, values)),
        "segments": [one.n_segments for one in found],
        "levels": [one.n_levels for one in found],
        "carriedAt": [one.carried for one in found],
        "valuesAt": [one.values for one in found],
    }


def _value(value: ValueView) -> dict[str, str]:
    return {"name": value.name, "type": value.type, "note": value.note}


def _cut(text: str) -> str:
    """A text that a page can hold."""
    if len(text) <= TEXT_CHARS:
        return text
    end = text.rfind("\n", 0, TEXT_CHARS) + 1 or TEXT_CHARS
    return f"{text[:end]}... cut here; fast.dump(folder) writes all {text.count(chr(10)) + 1:,} lines"


def _op(op: OpView) -> list[Any]:
    return [op.name, op.op, op.type, op.source, op.module, list(op.inputs), op.target]


def _cell(cell: CellView) -> dict[str, Any]:
    return {
        "kind": cell.kind,
        "variant": cell.variant,
        "ops": [_op(op) for op in cell.ops],
        "liveIns": [_value(v) for v in cell.live_ins],
        "liveOuts": [_value(v) for v in cell.live_outs],
        "carries": list(cell.carries),
        "params": [_value(v) for v in cell.params],
        "functions": list(cell.functions),
    }


def _profile(profile: ProfileView) -> dict[str, Any]:
    return {
        "levelUs": [round(t, 3) for t in profile.level_us],
        "kindUs": {kind: round(t, 3) for kind, t in profile.kind_us.items()},
        "utilisation": [round(u, 4) for u in profile.utilisation],
        "sequentialUs": profile.sequential_us,
        "outsideUs": round(profile.outside_us, 3),
        "levelKinds": [{kind: round(t, 3) for kind, t in one.items()} for one in profile.level_kinds],
        "backwardUs": [round(us, 3) for us in profile.backward_us],
        "bands": [_band(band) for band in profile.bands],
    }


def _band(band: BandTimes) -> dict[str, Any]:
    """When a band's levels ran; each as [level, begin, end]."""
    return {
        "place": band.place,
        "busyUs": round(band.busy_us, 3),
        "waitingUs": round(band.waiting_us, 3),
        "rampsUs": round(band.ramps_us, 3),
        "totalUs": round(band.total_us, 3),
        "spans": [[level, round(begin, 3), round(end, 3)] for level, begin, end in band.spans],
    }
