"""The grid as SVG: a column a segment, a row a layer (layer 0 at the bottom), coloured by phase.

The cells of a level are one path, so that a grid of 64 x 1024 stays a small file.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from rmtcompile.schedule.text import plural

if TYPE_CHECKING:
    from rmtcompile.schedule.data import Schedule

# Two shades for each phase: they alternate from level to level, or in bands where there are many levels, so
# that the wavefronts can be seen.
PALETTE = {
    "ramp-up": ("#f0b35a", "#f7cf94"),
    "steady": ("#3fa79b", "#7cc8be"),
    "ramp-down": ("#9a86d0", "#beb0e4"),
}
_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#333}.n{fill:#111;text-anchor:middle}"
    ".t{font-weight:600;font-size:12px}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.n{fill:#111}}"
)
_BORDERS = (
    ".b{stroke:#333;stroke-width:1.5;stroke-dasharray:5 3}"
    "@media(prefers-color-scheme:dark){.b{stroke:#ddd}}"
)
_LEFT, _TOP, _BOTTOM, _RIGHT, _LEGEND = 64, 34, 30, 12, 26
_BAND = 48
"""Room for the names of bands, right of the grid."""
_NUMBERED = 1200


def shade(schedule: Schedule, level: int) -> str:
    """The fill of a level: its phase's colour, in one of two shades."""
    band = max(1, schedule.n_levels // 24)
    return PALETTE[schedule.phases.of(level)][level // band % 2]


def _cell_size(schedule: Schedule) -> int:
    return max(3, min(30, 960 // schedule.n_segments, 720 // schedule.n_layers))


def to_svg(schedule: Schedule) -> str:
    """The picture as one self-contained SVG document."""
    size = _cell_size(schedule)
    names = _BAND if schedule.bands else 0
    width = max(_LEFT + size * schedule.n_segments + names + _RIGHT, 440)
    height = _TOP + size * schedule.n_layers + _BOTTOM + _LEGEND
    title = repr(schedule)[1:-1]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title><style>{_STYLE}{_BORDERS * bool(schedule.bands)}</style>",
        f'<text class="t" x="12" y="20">{escape(title.removeprefix("Schedule "))}</text>',
        *_paths(schedule, size),
        *_axes(schedule, size),
        *_bands(schedule, size),
        *_legend(schedule, height),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _corner(schedule: Schedule, s: int, layer: int, size: int) -> tuple[int, int]:
    return _LEFT + s * size, _TOP + (schedule.n_layers - 1 - layer) * size


def _paths(schedule: Schedule, size: int) -> Iterator[str]:
    gap = 2 if size >= 10 else (1 if size >= 5 else 0)
    side = size - gap
    numbered = size >= 16 and schedule.n_cells <= _NUMBERED
    phases = schedule.phases
    for level, cells in enumerate(schedule.levels):
        phase = phases.of(level)
        corners = [_corner(schedule, s, layer, size) for s, layer in cells]
        path = "".join(f"M{x} {y}h{side}v{side}h-{side}z" for x, y in corners)
        label = f"level {level}, {phase}: {plural(len(cells), 'cell')}"
        yield f'<path fill="{shade(schedule, level)}" d="{path}"><title>{label}</title></path>'
        if numbered:
            middle = side / 2
            font = 11 if size >= 22 else 8
            start = f'<text class="n" style="font-size:{font}px"'
            for x, y in corners:
                yield f'{start} x="{x + middle:g}" y="{y + middle + font / 3:.1f}">{level}</text>'


def _axes(schedule: Schedule, size: int) -> Iterator[str]:
    every = max(1, -(-16 // size))
    for layer in range(0, schedule.n_layers, every):
        _, y = _corner(schedule, 0, layer, size)
        yield f'<text x="{_LEFT - 6}" y="{y + size / 2 + 3:g}" text-anchor="end">layer {layer}</text>'
    every = max(1, -(-28 // size))
    bottom = _TOP + size * schedule.n_layers + 14
    for s in range(0, schedule.n_segments, every):
        x, _ = _corner(schedule, s, 0, size)
        yield f'<text x="{x + size / 2:g}" y="{bottom}" text-anchor="middle">{s}</text>'
    yield f'<text x="{_LEFT - 6}" y="{bottom}" text-anchor="end">segment</text>'


def _bands(schedule: Schedule, size: int) -> Iterator[str]:
    """The borders between bands, and the bands' names where they fit."""
    right = _LEFT + size * schedule.n_segments
    for p, layers in enumerate(schedule.bands):
        _, top = _corner(schedule, 0, layers[-1], size)
        if layers.stop < schedule.n_layers:
            y = top - (1 if size >= 10 else 0)
            yield f'<line class="b" x1="{_LEFT - 8}" y1="{y}" x2="{right + _BAND - 8}" y2="{y}"/>'
        if size * len(layers) >= 11:
            yield f'<text x="{right + 4}" y="{top + size * len(layers) / 2 + 3:g}">band {p}</text>'


def _legend(schedule: Schedule, height: int) -> Iterator[str]:
    x, y = 12, height - 12
    for name, levels in zip(PALETTE, schedule.phases, strict=True):
        if levels:
            text = f"{name}: {plural(len(levels), 'level')}"
            yield f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{PALETTE[name][0]}"/>'
            yield f'<text x="{x + 15}" y="{y}">{text}</text>'
            x += 34 + 6 * len(text)
