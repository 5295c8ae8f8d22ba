"""A compiled program for the viewer, and the files that show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rmtcompile.report.carries import values_of
from rmtcompile.report.cells import around_of, cells_of, generated_of, operations_of
from rmtcompile.report.explanation_text import sections
from rmtcompile.report.findings import explain_last
from rmtcompile.report.names import model_name
from rmtcompile.report.pass_texts import key_of, texts_of
from rmtcompile.report.passes import passes_of
from rmtcompile.report.shown import Shown
from rmtcompile.schedule import Cell
from rmtcompile.schedule.files import EXPLORED, check_name
from rmtcompile.schedule.graph import opened_cells
from rmtcompile.viewer import PassView, ViewModel, WitnessView, render, to_explorer

if TYPE_CHECKING:
    from rmtcompile.optimized import Optimized
    from rmtcompile.report.profiled import Profile


def save_view(
    fast: Optimized,
    path: str | Path,
    title: str | None = None,
    expand: Sequence[Cell] = (),
    capture: bool = False,
) -> Path:
    """Write the viewer of the last call's program; a suffix other than `.html` gives the schedule alone.

    `.trace.json` holds measured times if there is a profile of the last call's schedule, `.explorer.json` the
    operations of cells, too, for Model Explorer.

    What it returns is the path; a notebook shows the page behind it.

    Args:
        title: of the page; the model's name by default.
        expand: cells to open to their operations in a `.dot` or `.explorer.json` file.
        capture: capture the forward once more, so that the page has the texts of the first passes, too.

    Raises:
        RMTCompileError: nothing was captured yet.
        ValueError: the suffix is unknown, or there is no such cell.
    """
    path = Shown(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_name(path, opens_cells=bool(expand))
    if path.name.lower().endswith(EXPLORED):
        operations = operations_of(fast.compiled, fast.schedule.n_segments)
        opened = {cell: operations(cell) for cell in opened_cells(fast.schedule, expand)}
        path.write_text(to_explorer(view_model(fast, title), opened), encoding="utf-8")
        return path
    if expand:
        path.write_text(fast.schedule.to_dot(expand), encoding="utf-8")
        return path
    if path.suffix.lower() not in (".html", ".htm"):
        measured = _measured(fast)
        times = measured.level_us if measured is not None and measured.level_us else None
        if measured is not None and path.name.lower().endswith(".trace.json"):
            path.write_text(measured.to_chrome_trace(), encoding="utf-8")
        else:
            fast.schedule.save(path, times=times)
        return path
    path.write_text(render(view_model(fast, title, capture=capture)), encoding="utf-8")
    return path


def _measured(fast: Optimized) -> Profile | None:
    """The last profile, if it is of the last call's schedule."""
    found = fast.last_profile
    return found if found is not None and found.schedule == fast.schedule else None


def _passes(fast: Optimized, capture: bool) -> tuple[PassView, ...]:
    """The passes with the texts that are known.  A first capture that another one follows has none."""
    texts = texts_of(fast, capture=capture)
    passes = list(passes_of(fast.compiled, fast.compiled.passes_off))
    last = {key_of(one.name): one for one in passes}
    return tuple(
        replace(one, text=texts.get(key_of(one.name), "")) if last[key_of(one.name)] is one else one
        for one in passes
    )


def view_model(fast: Optimized, title: str | None = None, *, capture: bool = False) -> ViewModel:
    """Everything that the viewer shows of the last call's program; `capture` as of `save_view`."""
    compiled, schedule = fast.compiled, fast.schedule
    found = explain_last(fast)
    measured = _measured(fast)
    return ViewModel(
        title=title or model_name(fast.model),
        schedule=schedule,
        cells=tuple(cells_of(compiled, schedule)),
        around=tuple(around_of(compiled, schedule)),
        values=tuple(values_of(compiled)),
        generated=tuple(generated_of(compiled)),
        witnesses=tuple(
            WitnessView(o.offset, o.consumer, f"{o.producer} {o.reason}".rstrip()) for o in found.offsets
        ),
        passes=_passes(fast, capture),
        code=compiled.emitted.source,
        code_phases=dict(compiled.emitted.phases),
        profile=measured.view() if measured is not None else None,
        device=measured.device if measured is not None else "",
        facts=(("plan", found.plan), ("compiled in", f"{found.seconds:.1f} s")),
        explanation=tuple((name, tuple(lines)) for name, lines in sections(found)),
    )
