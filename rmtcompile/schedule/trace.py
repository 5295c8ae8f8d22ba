"""Trace events (the Chrome trace-event format), for Perfetto.

    process   one device      levels, and a track a layer
              bands           one process a band, with its own levels and layers, in its own time
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rmtcompile.schedule.bands import PLANNED_US, BandTimes, planned, words
from rmtcompile.schedule.paths import Cell

if TYPE_CHECKING:
    from rmtcompile.schedule.data import Schedule

_LEVELS_TRACK = 0
_ONLY = 1
"""The process of a schedule without bands, and that of the lowest band."""


def to_chrome_trace(
    schedule: Schedule,
    times: Sequence[float] | None = None,
    backward: Sequence[float] = (),
    bands: Sequence[BandTimes] = (),
) -> str:
    """A JSON object with `traceEvents`: a track for the levels, one a layer, and a counter for the width; a
    process a band.

    Args:
        times: microseconds of each level.
        backward: of each level's part of backward, which is shown behind, from the last level to the first.
        bands: when the levels of each band ran, instead of `times`.
    """
    if backward and len(backward) != schedule.n_levels:
        raise ValueError(f"one time of backward a level: expected {schedule.n_levels}, got {len(backward)}")
    if times is not None and len(times) != schedule.n_levels:
        raise ValueError(f"one time a level: expected {schedule.n_levels}, got {len(times)}")
    if bands and len(bands) != len(schedule.bands):
        raise ValueError(f"times of each band: expected {len(schedule.bands)}, got {len(bands)}")
    if schedule.bands:
        events = _bands(schedule, bands or planned(schedule, times), backward)
    else:
        events = _one_process(schedule, times, backward)
    is_measured = times is not None or bool(bands)
    return json.dumps(
        {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {
                "schedule": repr(schedule)[1:-1],
                "times": "measured" if is_measured else f"planned, {PLANNED_US:g} us a level",
            },
        },
        separators=(",", ":"),
    )


def _one_process(
    schedule: Schedule, times: Sequence[float] | None, backward: Sequence[float]
) -> list[dict[str, Any]]:
    spans = [float(t) for t in times] if times is not None else [PLANNED_US] * schedule.n_levels
    events = _tracks("rmtcompile schedule", range(schedule.n_layers))
    start = 0.0
    for level, duration in enumerate(spans):
        events += _level_events(schedule, level, schedule.levels[level], start, duration)
        start += duration
    for level in reversed(range(len(backward))):
        duration = float(backward[level])
        events += _level_events(schedule, level, schedule.levels[level], start, duration, "backward of ")
        start += duration
    return [*events, _event("C", "width", start, args={"cells": 0})]


def _bands(
    schedule: Schedule, bands: Sequence[BandTimes], backward: Sequence[float]
) -> list[dict[str, Any]]:
    """The events of each band, the highest first, as in the grid."""
    events: list[dict[str, Any]] = []
    before: dict[int, float] = {}
    for p, (layers, times) in enumerate(zip(schedule.bands, bands, strict=True)):
        process, grid = _ONLY + p, schedule.band_grid(p)
        name = f"band {p}, {words(layers)}" + f", {times.place}" * bool(times.place)
        events += _tracks(name, layers, process, len(bands) - p)
        for level, begin, end in times.spans:
            behind = {"behind_us": round(begin - before[level], 3)} if level in before else {}
            given = schedule, level, grid.cells(level), begin, end - begin
            events += _level_events(*given, process=process, facts=behind)
        events.append(_event("C", "width", times.spans[-1].end, process=process, args={"cells": 0}))
        before = {span.level: span.begin for span in times.spans}
    if backward:
        process, start = _ONLY + len(bands), max(times.total_us for times in bands)
        events += _tracks("backward of all bands", range(0), process, len(bands) + 1)
        for level in reversed(range(len(backward))):
            dur = round(float(backward[level]), 3)
            name = f"backward of level {level}"
            events.append(_event("X", name, start, process=process, cat="level", dur=dur))
            start += float(backward[level])
    return events


def _event(
    phase: str, name: str, start: float, track: int = _LEVELS_TRACK, process: int = _ONLY, **more: Any
) -> dict[str, Any]:
    return {"ph": phase, "name": name, "ts": round(start, 3), "pid": process, "tid": track, **more}


def _tracks(name: str, layers: range, process: int = _ONLY, order: int = 0) -> list[dict[str, Any]]:
    """Names, and an order that puts the levels first and the lowest layer last, as in the grid."""
    names = {_LEVELS_TRACK: "levels"} | {1 + layer: f"layer {layer}" for layer in layers}
    events = [_event("M", "process_name", 0, process=process, args={"name": name})]
    if order:
        events.append(_event("M", "process_sort_index", 0, process=process, args={"sort_index": order}))
    for track, called in names.items():
        place = 0 if track == _LEVELS_TRACK else 1 + layers.stop - track
        events.append(_event("M", "thread_name", 0, track, process, args={"name": called}))
        events.append(_event("M", "thread_sort_index", 0, track, process, args={"sort_index": place}))
    return events


def _level_events(
    schedule: Schedule,
    level: int,
    cells: Sequence[Cell],
    start: float,
    duration: float,
    which: str = "",
    process: int = _ONLY,
    facts: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """A level: its cells, or those of one band.

    Args:
        which: stands before the names.
        facts: more to say of the level.
    """
    dur, step = round(duration, 3), max(schedule.alpha, 1)
    said = {"width": len(cells), "phase": schedule.phases.of(level), **(facts or {})}
    if cells:
        alive = [layer for _, layer in cells]
        said["layers"] = f"{min(alive)}..{max(alive)}" + (f" step {step}" if step > 1 else "")
    events = [
        _event("C", "width", start, process=process, args={"cells": len(cells)}),
        _event("X", f"{which}level {level}", start, process=process, cat="level", dur=dur, args=said),
    ]
    if schedule.alpha == 0:
        # All segments of the layer share one track, where slices may not overlap.
        layer = cells[0][1]
        name = f"{which}segments {cells[0][0]}..{cells[-1][0]}"
        return [*events, _event("X", name, start, 1 + layer, cat="cell", dur=dur, args={"level": level})]
    for s, layer in cells:
        args = {"segment": s, "layer": layer, "level": level, "variant": schedule.variant_of((s, layer))}
        name = f"{which}segment {s}"
        events.append(_event("X", name, start, 1 + layer, process, cat="cell", dur=dur, args=args))
    return events
