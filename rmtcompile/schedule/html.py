"""The notebook form: the picture and a table of facts."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from rmtcompile.schedule.text import bands_of, plural, runs, span

if TYPE_CHECKING:
    from rmtcompile.schedule.data import Schedule


def to_html_fragment(schedule: Schedule) -> str:
    """HTML for a notebook cell: no script, no network."""
    left = 'style="text-align:left"'
    rows = "".join(
        f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(value)}</td></tr>"
        for name, value in facts(schedule)
    )
    return (
        f'<div style="overflow-x:auto;max-width:100%">{schedule.to_svg()}'
        f'<table style="margin-top:.5em"><tbody>{rows}</tbody></table></div>'
    )


def facts(schedule: Schedule) -> Iterator[tuple[str, str]]:
    """What a reader wants to know first, as (name, value)."""
    phases = schedule.phases
    levels = plural(schedule.n_levels, "level")
    yield "cells", f"{schedule.n_cells:,} in {levels}, level = {schedule.level_rule}"
    yield "parallelism", f"width {schedule.width}, {schedule.mean_width:.2f} on average"
    path = plural(schedule.critical_path, "level")
    yield "critical path", f"{path}, {'reached' if schedule.is_optimal else 'shorter than this schedule'}"
    yield "offsets", " ".join(f"({ds},{dl})" for ds, dl in sorted(schedule.offsets)) or "none"
    yield "ramp-up", span(phases.ramp_up)
    yield "steady", span(phases.steady)
    yield "ramp-down", span(phases.ramp_down)
    if schedule.bands:
        yield "bands", bands_of(schedule)
    if len(set(schedule.segment_variants)) > 1:
        yield "variants", runs(schedule.segment_variants)
    for carry in schedule.carries:
        total = carry.total_bytes(schedule.n_layers)
        yield f"carry {carry.name}", f"{carry.type}, offset {carry.offset}, {total:,} bytes in all"
