"""`Schedule.save`: one writer for each suffix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rmtcompile.schedule.svg import shade

if TYPE_CHECKING:
    from rmtcompile.schedule.data import Schedule


Times = Sequence[float] | None

EXPLORED = ".explorer.json"
"""How the names of files for Model Explorer end."""


def save(schedule: Schedule, path: Path, times: Times = None) -> Path:
    """Write `schedule` to `path` in the format of its suffix, with measured times where it shows them."""
    suffix = _suffix(path)
    if suffix == ".png":
        _save_png(schedule, path)
    else:
        path.write_text(_TEXT[suffix](schedule, times), encoding="utf-8")
    return path


def check_name(path: str | Path, opens_cells: bool = False) -> None:
    """See that the name of a file to save says its format.

    Args:
        opens_cells: whether cells are opened to their operations.

    Raises:
        ValueError: the suffix is unknown, or a file of this format opens no cells.
    """
    path = Path(path)
    if opens_cells and not path.name.lower().endswith((".dot", EXPLORED)):
        raise ValueError(
            f"only .dot and {EXPLORED} files open cells, not {path.name!r}; the viewer opens them all"
        )
    if path.suffix.lower() not in (".html", ".htm"):
        _suffix(path)


def _suffix(path: Path) -> str:
    suffix = next((s for s in (*_TEXT, ".png") if path.name.lower().endswith(s)), None)
    if suffix is None:
        known = ", ".join((*_TEXT, ".png"))
        raise ValueError(f"cannot tell the format of {path.name!r}: the name should end in one of {known}")
    return suffix


def _viewer(schedule: Schedule, times: Times) -> str:
    from rmtcompile.viewer import ProfileView, ViewModel, render

    profile = ProfileView(tuple(times)) if times is not None else None
    return render(ViewModel(title="schedule", schedule=schedule, profile=profile))


def _explorer(schedule: Schedule, times: Times) -> str:
    from rmtcompile.viewer import ViewModel, to_explorer

    del times
    return to_explorer(ViewModel(title="schedule", schedule=schedule))


# ".trace.json" and ".explorer.json" stand before ".json": the first match counts.
_TEXT: dict[str, Callable[[Schedule, Times], str]] = {
    ".trace.json": lambda schedule, times: schedule.to_chrome_trace(times),
    EXPLORED: _explorer,
    ".json": lambda schedule, _: schedule.to_json() + "\n",
    ".svg": lambda schedule, _: schedule.to_svg(),
    ".html": _viewer,
    ".dot": lambda schedule, _: schedule.to_dot(),
    ".txt": lambda schedule, _: str(schedule) + "\n",
}


def _save_png(schedule: Schedule, path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import to_rgb
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "saving a schedule as .png needs matplotlib: pip install 'rmtcompile[viz]' "
            "(or save it as .svg, which needs nothing)"
        ) from error
    shades = [to_rgb(shade(schedule, t)) for t in range(schedule.n_levels)]
    rows = [
        [shades[schedule.level_of((s, layer))] for s in range(schedule.n_segments)]
        for layer in range(schedule.n_layers)
    ]
    cell = max(0.08, min(0.4, 12 / schedule.n_segments))
    inches = (max(4.5, schedule.n_segments * cell + 1), schedule.n_layers * cell + 1.2)
    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(rows, origin="lower", aspect="equal", interpolation="nearest")
    axes.set_xlabel("segment")
    axes.set_ylabel("layer")
    axes.set_title(repr(schedule)[len("<Schedule ") : -1], fontsize=9, loc="left")
    for border in schedule.borders:
        axes.axhline(border - 0.5, color="black", linewidth=1.5, linestyle="--")
    if schedule.n_cells <= 400:
        for cells in schedule.levels:
            for s, layer in cells:
                axes.text(s, layer, str(schedule.level_of((s, layer))), ha="center", va="center", fontsize=8)
    figure.savefig(path, dpi=150)
