"""schedule/grid.py: one definition of levels, which schedules print and runs follow."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmtcompile.ir.program import Group, Program
from rmtcompile.runtime.run import Run
from rmtcompile.schedule import Grid, Schedule

layers = st.integers(1, 7)
segments = st.integers(1, 11)


@st.composite
def grids(draw: st.DrawFn, smallest: int = 0) -> Grid:
    n_layers = draw(layers)
    skew = draw(st.integers(smallest, n_layers))
    block = draw(st.integers(0, 5)) if skew == 0 else 0
    n_segments = draw(segments)
    return Grid(n_layers, n_segments, skew, block, draw(st.integers(0, n_segments - 1)))


@given(grids())
def test_each_cell_has_one_level(grid: Grid) -> None:
    found = [(cell, t) for t in grid.levels for cell in grid.cells(t)]
    assert sorted(cell for cell, _ in found) == [
        (s, layer) for s in range(grid.first, grid.n_segments) for layer in range(grid.n_layers)
    ]
    assert all(grid.level_of(cell) == t for cell, t in found)
    assert all(grid.cells(t) for t in grid.levels)


@given(grids(smallest=1))
def test_levels_are_affine_and_segments_enter_and_leave_once(grid: Grid) -> None:
    order = list(range(grid.first, grid.n_segments))
    assert all(grid.level_of((s, 0)) == grid.skew * s for s in order)
    assert [s for t in grid.levels if (s := grid.entering(t)) is not None] == order
    assert [s for t in grid.levels if (s := grid.leaving(t)) is not None] == order
    for s in order:
        assert grid.entering(grid.level_of((s, 0))) == s
        assert grid.leaving(grid.level_of((s, grid.n_layers - 1))) == s


@given(grids())
def test_phases_cover_the_levels(grid: Grid) -> None:
    up, steady, down = grid.phases
    assert [*up, *steady, *down] == list(grid.levels)
    alive = {t: {layer for _, layer in grid.cells(t)} for t in grid.levels}
    for t in steady:
        assert t + grid.period not in steady or alive[t] == alive[t + grid.period]


@pytest.mark.parametrize(
    ("grid", "phases"),
    [
        (Grid(4, 8, 1), (range(3), range(3, 8), range(8, 11))),
        (Grid(4, 8, 2), (range(2), range(2, 16), range(16, 18))),
        (Grid(8, 3, 1), (range(3), range(3, 3), range(3, 10))),
        (Grid(3, 4, 3), (range(0), range(12), range(12, 12))),
    ],
    ids=str,
)
def test_phases_by_hand(grid: Grid, phases: tuple[range, ...]) -> None:
    assert grid.phases == phases


def program(grid: Grid) -> Program:
    """A program of one group without lanes."""
    rolled = SimpleNamespace(
        classes={("cell", layer): SimpleNamespace(of=lambda *_: 0) for layer in range(grid.n_layers)}
    )
    graph: Any = None
    group = Group("layers", tuple(range(grid.n_layers)), (0,), graph, (), ())
    return Program(grid.n_layers, grid.skew, frozenset({(0, 1)}), (group,), (), (), rolled, grid.block)


@given(grids(smallest=1))
def test_what_is_printed_is_what_runs(grid: Grid) -> None:
    grid = replace(grid, first=0)
    schedule = Schedule(grid.n_layers, grid.n_segments, grid.skew, frozenset({(0, 1)}), block=grid.block)
    engine: Any = None
    run = Run(program(grid), grid.n_segments, {}, {}, {}, engine, functional=False)
    assert schedule.grid == run.grid == grid
    assert tuple(schedule.phases) == (run.ramp_up, run.steady, run.ramp_down)
    for t, cells in enumerate(schedule.levels):
        ran = [
            cell for w in run.windows(t) for cell in zip(w.segments, w.layers, strict=True)
        ]
        assert sorted(ran) == sorted(cells)
        assert list(schedule.windows[t].layers) == [layer for _, layer in ran]
