"""`str(schedule)`: a header, what is carried, the levels, and the grid with its level numbers.

    schedule  6 levels, width 3, 12 cells in 6 grouped calls       # 3 layers x 4 segments, level = s + l
      widths    1, 2, 3 x 2, 2, 1
      windows   layers 0, 0..1, 0..2 x 2, 1..2, 2
      0 [(0,0)]   1 [(0,1) (1,0)]   2 [(0,2) (1,1) (2,0)]   3 [(1,2) (2,1) (3,0)]   4 [(2,2) (3,1)]   ...

Big schedules are elided with exact counts.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from rmtcompile.schedule.bands import words

if TYPE_CHECKING:
    from rmtcompile.schedule.data import Schedule
    from rmtcompile.schedule.parts import Window

_WIDTH = 108
_MAX_CELLS, _MAX_ROWS, _MAX_COLUMNS = 8, 16, 20


def to_text(schedule: Schedule) -> str:
    """The whole text form, without a final newline."""
    lines = [_header(schedule), *_facts(schedule), *_levels(schedule), "", *_grid(schedule)]
    return "\n".join(lines)


def plural(count: int, noun: str) -> str:
    """`1 level`, `2 levels`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def span(levels: range) -> str:
    """`levels 0..2`, `level 3`, `none`."""
    if not levels:
        return "none"
    first, last = levels[0], levels[-1]
    return f"level {first}" if first == last else f"levels {first}..{last}"


def runs(names: Sequence[str]) -> str:
    """`first x 1, later x 3` for a list of names, in order."""
    return ", ".join(f"{name} x {sum(1 for _ in group)}" for name, group in groupby(names))


def bands_of(schedule: Schedule) -> str:
    """`0: layers 0..1, 1: layers 2..3, each a level behind the one before`."""
    listed = _elided_runs([f"{p}: {words(layers)}" for p, layers in enumerate(schedule.bands)], 5)
    if len(schedule.bands) == 1:
        return listed
    return listed + (", each a level behind the one before" if schedule.lag else ", all on the same level")


def _elided_runs(names: Sequence[str], limit: int = 12) -> str:
    """`1, 2, 3 x 7, 2, 1`, at most so many runs of equal names."""
    found = [(name, sum(1 for _ in group)) for name, group in groupby(names)]
    shown = elide(len(found), limit)
    words = [f"{name} x {count}" if count > 1 else name for name, count in found]
    text = [words[shown[0]]]
    for before, i in pairwise(shown):
        if i != before + 1:
            text.append("...")
        text.append(words[i])
    return ", ".join(text)


def _window(window: Window) -> str:
    layers = window.layers
    if len(layers) == 1:
        return str(layers[0])
    return f"{layers[0]}..{layers[-1]}" + f" by {window.step}" * (window.step > 1)


def _header(schedule: Schedule) -> str:
    head = (
        f"schedule  {plural(schedule.n_levels, 'level')}, width {schedule.width}, "
        f"{plural(schedule.n_cells, 'cell')} in {plural(schedule.n_calls, 'grouped call')}"
    )
    size = f"{plural(schedule.n_layers, 'layer')} x {plural(schedule.n_segments, 'segment')}"
    return f"{head:<60}  # {size}, level = {schedule.level_rule}"


def _facts(schedule: Schedule) -> list[str]:
    offsets = " ".join(f"({ds},{dl})" for ds, dl in sorted(schedule.offsets)) or "none"
    path = schedule.critical_path
    verdict = "as short as the dependences allow" if schedule.is_optimal else f"critical path {path:,} levels"
    phases = schedule.phases
    facts = [
        f"  offsets   {offsets}     mean width {schedule.mean_width:.2f}, {verdict}",
        f"  phases    ramp-up {span(phases.ramp_up)}, steady {span(phases.steady)}, "
        f"ramp-down {span(phases.ramp_down)}",
        f"  widths    {_elided_runs([str(width) for width in schedule.widths])}",
        f"  windows   layers {_elided_runs([_window(window) for window in schedule.windows])}",
    ]
    for i, carry in enumerate(schedule.carries):
        total = carry.total_bytes(schedule.n_layers)
        label = "carries" if i == 0 else ""
        facts.append(
            f"  {label:<8}  {carry}, {carry.nbytes:,} bytes a cell, {total:,} bytes over "
            f"{plural(len(carry.writers(schedule.n_layers)), 'layer')}"
            + f", through {carry.through}"
            * bool(carry.through)
        )
    if len(set(schedule.segment_variants)) > 1:
        facts.append(f"  variants  {_short(runs(schedule.segment_variants))} (segments in order)")
    if len(set(schedule.layer_kinds)) > 1:
        facts.append(f"  kinds     {_short(runs(schedule.layer_kinds))} (layers, lowest first)")
    if schedule.bands:
        facts.append(f"  bands     {bands_of(schedule)}")
    return facts


def _short(text: str) -> str:
    return textwrap.shorten(text, 76, placeholder=" ...")


def _levels(schedule: Schedule) -> list[str]:
    shown = elide(schedule.n_levels, 24 if schedule.n_levels <= 24 else 9)
    items: list[str] = []
    for before, t in zip([None, *shown], shown, strict=False):
        if before is not None and t != before + 1:
            items.append(f"... {plural(t - before - 1, 'level')} ...")
        items.append(f"{t} [{_cells(schedule.levels[t])}]")
    return _wrap(items)


def _cells(cells: Sequence[tuple[int, int]]) -> str:
    shown = [f"({s},{layer})" for s, layer in cells]
    if len(shown) > _MAX_CELLS:
        shown = [*shown[:3], f"... {len(shown) - 5} more ...", *shown[-2:]]
    return " ".join(shown)


def _wrap(items: Sequence[str]) -> list[str]:
    lines = [""]
    for item in items:
        if len(lines[-1]) + len(item) + 3 > _WIDTH and lines[-1]:
            lines.append("")
        lines[-1] += ("   " if lines[-1] else "  ") + item
    return lines


def elide(count: int, limit: int) -> list[int]:
    """The indices to show of `count`: all of them, or the first two thirds and the last third of `limit`."""
    if count <= limit:
        return list(range(count))
    head = limit * 2 // 3
    return [*range(head), *range(count - (limit - head), count)]


def _grid(schedule: Schedule) -> list[str]:
    """Layers as rows, the lowest at the bottom; segments as columns."""
    rows, columns = elide(schedule.n_layers, _MAX_ROWS), elide(schedule.n_segments, _MAX_COLUMNS)
    cell = max(len(str(schedule.n_levels - 1)), len(str(schedule.n_segments - 1)))
    label = len(f"layer {schedule.n_layers - 1}")
    hidden = schedule.n_segments - len(columns)
    wide = (cell + 1) * len(columns) - 1 + 4 * bool(hidden)

    def row(head: str, values: Sequence[str], gap: str) -> str:
        cut = next((i for i, (a, b) in enumerate(pairwise(columns)) if b != a + 1), None)
        padded = [f"{value:>{cell}}" for value in values]
        if cut is not None:
            padded.insert(cut + 1, gap)
        return f"  {head:>{label}} | {' '.join(padded)}"

    lines = []
    for above, layer in zip([None, *reversed(rows)], reversed(rows), strict=False):
        crossed = sum(layer < border <= above for border in schedule.borders) if above is not None else 0
        if above is not None and layer != above - 1:
            hidden_borders = f", {plural(crossed, 'border')} of bands" * bool(crossed)
            lines.append(f"  {'...':>{label}} | ... {plural(above - layer - 1, 'layer')}{hidden_borders} ...")
        elif crossed:
            lines.append(f"  {'-' * label} + {'-' * wide}  band {schedule.band_of(layer)} below")
        values = [str(schedule.level_of((s, layer))) for s in columns]
        lines.append(row(f"layer {layer}", values, "..."))
    lines.append(row("segment", [str(s) for s in columns], "..."))
    if hidden:
        lines[-1] += f"   (... is {plural(hidden, 'segment')})"
    return lines
