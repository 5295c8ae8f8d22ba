"""Trace events (the Chrome trace-event format), for Perfetto."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmtcompile.schedule.data import Schedule

PLANNED_US = 100.0
_LEVELS_TRACK = 0


def to_chrome_trace(
    schedule: Schedule, times: Sequence[float] | None = None, backward: Sequence[float] = ()
) -> str:
    """A JSON object with `traceEvents`: a track for the levels, one a layer, and a counter for the width.

    Args:
        times: microseconds of each level.
        backward: of each level's part of backward, which is shown behind, from the last level to the first.
    """
    if backward and len(backward) != schedule.n_levels:
        raise ValueError(f"one time of backward a level: expected {schedule.n_levels}, got {len(backward)}")
    if times is not None and len(times) != schedule.n_levels:
        raise ValueError(f"one time a level: expected {schedule.n_levels}, got {len(times)}")
    spans = [float(t) for t in times] if times is not None else [PLANNED_US] * schedule.n_levels
    events = _tracks(schedule)
    start = 0.0
    for level, duration in enumerate(spans):
        events += _level_events(schedule, level, start, duration)
        start += duration
    for level in reversed(range(len(backward))):
        events += _level_events(schedule, level, start, float(backward[level]), "backward of ")
        start += float(backward[level])
    events.append(_event("C", "width", start, args={"cells": 0}))
    return json.dumps(
        {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {
                "schedule": repr(schedule)[1:-1],
                "times": "measured" if times is not None else f"planned, {PLANNED_US:g} us a level",
            },
        },
        separators=(",", ":"),
    )


def _event(phase: str, name: str, start: float, track: int = _LEVELS_TRACK, **more: Any) -> dict[str, Any]:
    return {"ph": phase, "name": name, "ts": round(start, 3), "pid": 1, "tid": track, **more}


def _tracks(schedule: Schedule) -> list[dict[str, Any]]:
    """Names, and an order that puts the levels first and layer 0 last, as in the grid."""
    names = {_LEVELS_TRACK: "levels"} | {1 + layer: f"layer {layer}" for layer in range(schedule.n_layers)}
    events = [_event("M", "process_name", 0, args={"name": "rmtcompile schedule"})]
    for track, name in names.items():
        order = 0 if track == _LEVELS_TRACK else 1 + schedule.n_layers - track
        events.append(_event("M", "thread_name", 0, track, args={"name": name}))
        events.append(_event("M", "thread_sort_index", 0, track, args={"sort_index": order}))
    return events


def _level_events(
    schedule: Schedule, level: int, start: float, duration: float, which: str = ""
) -> list[dict[str, Any]]:
    cells = schedule.levels[level]
    window = schedule.windows[level]
    dur = round(duration, 3)
    facts = {
        "width": len(cells),
        "phase": schedule.phases.of(level),
        "layers": f"{window.start}..{window.stop - 1}" + (f" step {window.step}" if window.step > 1 else ""),
    }
    events = [
        _event("C", "width", start, args={"cells": len(cells)}),
        _event("X", f"{which}level {level}", start, cat="level", dur=dur, args=facts),
    ]
    if schedule.alpha == 0:
        # All segments of the layer share one track, where slices may not overlap.
        layer = cells[0][1]
        name = f"{which}segments {cells[0][0]}..{cells[-1][0]}"
        return [*events, _event("X", name, start, 1 + layer, cat="cell", dur=dur, args={"level": level})]
    for s, layer in cells:
        args = {"segment": s, "layer": layer, "level": level, "variant": schedule.variant_of((s, layer))}
        events.append(_event("X", f"{which}segment {s}", start, 1 + layer, cat="cell", dur=dur, args=args))
    return events
