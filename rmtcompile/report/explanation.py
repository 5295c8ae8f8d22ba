"""An explanation: what was found in a model, what is parallel and what not, and why; or why it is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from rmtcompile.schedule import Carry, Schedule


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
    """A class of segments whose cells have the same operations: how many, in a layer in the middle."""

    name: str
    segments: tuple[int, ...]
    operations: int


@dataclasses.dataclass(frozen=True)
class Kind:
    """Layers whose cells run in one grouped call.

    Attributes:
        weights: weights of a cell.
        operations: operations of a cell, as (variant, number).
    """

    name: str
    layers: tuple[int, ...]
    weights: int
    operations: tuple[tuple[str, int], ...] = ()


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
    """How fast a plan is.

    Attributes:
        steps: cells or levels, one after the other.
        predicted: how many times as fast as the sequential plan, if a level takes as long as a cell.
        measured: how many times as fast as the model's own forward; None without a profile.
        seconds: of one call, where plans were measured to choose one.
    """

    plan: str
    steps: int
    predicted: float
    measured: float | None = None
    seconds: float | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """What the compiler found in a model.

    `str()` gives the whole text, `repr()` one line, `to_json()` data, `to_html()` a page; notebooks show a
    table.

    Attributes:
        model: name of the model.
        refusal: why it is not compiled; the rest is then as far as the compiler came.
        inputs: name and type of each tensor of the call.
        layers: module path of each layer.
        segments: segments of this call.
        axes: where the segments come from.
        parts: segments of the grid that each of them is, where the model walks them in parts.
        proved_on: numbers of segments whose captures prove the rules.
        followed_to: the most segments for which operations, integers, sizes and operands of the forward were
            seen to be as the rules say; beyond it the rules are extrapolated.
        compared_to: the most segments for which values were compared with the model's; 0 if none were.
        unfollowed: why the forward could not be followed further; empty where it was never asked for more.
        shortest: the fewest segments that the rules cover; `only` if the program serves this length alone.
        operations: operations of the largest capture, and those of the rules.
        hoisted: operations that run once instead of once a segment, by name.
        optimised: what each pass on the cells changed, as (pass, words).
        apart: operations that run cell by cell inside of grouped calls, each with its line.
        merged, dropped: operations found equal to others, and read by nothing, in the largest capture.
        plan, why: the plan chosen, and the reason.
        speedups: what each plan promises, and gave if it was measured.
        backend: how cell functions run.
        stages: what each stage of the compiler took and did.
        compile_seconds: time in which the backend compiled the cell functions; None if it is not known.
        workspace_seconds: of one call as a CUDA graph, "with" and "without" cuBLAS's workspace, where both
            were measured; the faster one is kept.
        recorded: how runs are recorded as CUDA graphs, in words; empty where they are not.
        bands: how the layers are cut into bands, and what goes from one to another; empty where they are not.
        recomputed: the levels of a block that backward computes again; 0 where it keeps all values, or what
            fits.
        fitted: what the last training run kept of what fits, in words; empty where all was kept.
        checkpoint: where the forward asks for that itself; empty where it does not.
        loaded: whether the program came from a folder.
        unused: why programs of a folder were not used.
    """

    model: str
    refusal: Refusal | None = None
    inputs: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    segments: int = 0
    axes: tuple[Axis, ...] = ()
    parts: int = 1
    proved_on: tuple[int, ...] = ()
    followed_to: int = 0
    compared_to: int = 0
    unfollowed: str = ""
    shortest: int = 1
    only: int | None = None
    variants: tuple[Variant, ...] = ()
    kinds: tuple[Kind, ...] = ()
    offsets: tuple[Offset, ...] = ()
    carries: tuple[Carry, ...] = ()
    operations: tuple[int, int] = (0, 0)
    hoisted: tuple[tuple[str, int], ...] = ()
    apart: tuple[str, ...] = ()
    merged: int = 0
    dropped: int = 0
    optimised: tuple[tuple[str, str], ...] = ()
    schedule: Schedule | None = None
    plan: str = ""
    why: str = ""
    speedups: tuple[Speedup, ...] = ()
    backend: str = ""
    stages: tuple[StageReport, ...] = ()
    compile_seconds: float | None = None
    workspace_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    recorded: str = ""
    bands: tuple[str, ...] = ()
    recomputed: int = 0
    fitted: str = ""
    checkpoint: str = ""
    loaded: bool = False
    unused: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Time from the first capture to the emitted module."""
        return sum(stage.seconds for stage in self.stages)

    def __str__(self) -> str:
        from rmtcompile.report.explanation_text import to_text

        return to_text(self)

    def __repr__(self) -> str:
        said = [self.model]
        if self.layers:
            said.append(f"{len(self.layers)} layers")
        if self.schedule is not None:
            said.append(f"{self.schedule.n_levels} levels")
        said.append(f"refused: {self.refusal.error}" if self.refusal else f"plan {self.plan}")
        return f"<Explanation {', '.join(said)}>"

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
