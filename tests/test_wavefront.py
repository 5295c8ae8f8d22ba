"""passes/grid/wavefront.py: skews, what blocks, and properties of every legal schedule."""

from __future__ import annotations

import time

import networkx as nx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rmtcompile.errors import DependenceError, InternalError
from rmtcompile.passes.grid.wavefront import wavefront
from rmtcompile.schedule import Offset, blocking, blocking_reason, longest_path_levels, skew

ARMT: frozenset[Offset] = frozenset({(0, 1), (1, 0)})

legal_offsets = st.frozensets(
    st.one_of(
        st.tuples(st.just(0), st.integers(1, 3)),
        st.tuples(st.integers(1, 3), st.integers(-4, 4)),
    ),
    max_size=5,
)
sizes = st.tuples(st.integers(1, 7), st.integers(1, 9))


@pytest.mark.parametrize(
    ("offsets", "n_layers", "alpha"),
    [
        ({(0, 1), (1, 0)}, 16, 1),
        ({(0, 1), (1, 1)}, 16, 0),
        ({(0, 1), (1, -1)}, 16, 2),
        ({(0, 1), (1, -3)}, 16, 4),
        ({(0, 1), (1, -15)}, 16, 16),
        ({(0, 1), (2, 0)}, 16, 1),
        ({(0, 1), (2, -2)}, 16, 2),
        ({(0, 1), (3, -2), (0, 2)}, 16, 1),
        ({(0, 1)}, 16, 0),
        (set(), 16, 0),
        ({(1, -20)}, 16, 0),  # reaches outside the grid: joins no two cells
    ],
)
def test_skew_is_the_smallest_legal_one(offsets: set[Offset], n_layers: int, alpha: int) -> None:
    assert skew(offsets, n_layers) == alpha
    wavefront(offsets, n_layers, 20)
    if alpha:
        with pytest.raises(InternalError, match="reads cell"):
            wavefront(offsets, n_layers, 20, alpha=alpha - 1)


def test_armt_levels_are_the_diagonals() -> None:
    schedule = wavefront(ARMT, 3, 4)
    assert schedule.levels == (
        ((0, 0),),
        ((0, 1), (1, 0)),
        ((0, 2), (1, 1), (2, 0)),
        ((1, 2), (2, 1), (3, 0)),
        ((2, 2), (3, 1)),
        ((3, 2),),
    )
    assert (schedule.width, schedule.n_levels, schedule.critical_path) == (3, 6, 6)
    assert schedule.is_optimal


def test_whole_layers_at_once_where_segments_only_feed_higher_layers() -> None:
    schedule = wavefront({(0, 1), (1, 1)}, 3, 5)
    assert schedule.widths == (5, 5, 5)


def test_an_affine_level_can_be_longer_than_the_path_and_says_so() -> None:
    schedule = wavefront({(0, 1), (2, 0)}, 4, 6)
    assert schedule.n_levels == 9
    assert schedule.critical_path == 6
    assert not schedule.is_optimal


@pytest.mark.parametrize("offset", [(0, 0), (0, -1), (-1, 0), (-2, 5)])
def test_backward_dependences_are_refused(offset: Offset) -> None:
    with pytest.raises(DependenceError) as refusal:
        skew({(0, 1), offset}, 8)
    lines = str(refusal.value).splitlines()
    assert lines[0] == "a cell depends on a cell that runs after it, so no order of cells is legal"
    assert lines[1].startswith(f"  offset ({offset[0]},{offset[1]}): ")
    assert lines[-1].startswith("  help: ")


def test_a_cycle_is_named_as_one() -> None:
    with pytest.raises(DependenceError, match=r"offset \(0,1\) feeds layer 0 to layer 1: a cycle"):
        wavefront({(0, 1), (0, -2)}, 8, 2)


def test_classic_rmt_is_blocked_by_the_edge_from_top_to_bottom() -> None:
    offsets = {(0, 1), (1, -7)}
    assert blocking(offsets, 8) == ((1, -7),)
    assert "the top layer 7 of a segment feeds layer 0 of the next one" in blocking_reason(offsets, 8)
    assert wavefront(offsets, 8, 5).width == 1


@pytest.mark.parametrize(
    ("offsets", "n_layers"), [(ARMT, 8), ({(0, 1), (1, -6)}, 8), ({(0, 1), (1, 0)}, 1), (set(), 4)]
)
def test_nothing_blocks_where_levels_can_be_wider(offsets: set[Offset], n_layers: int) -> None:
    assert blocking(offsets, n_layers) == ()
    assert blocking_reason(offsets, n_layers) == ""


def test_a_larger_skew_is_the_sequential_order() -> None:
    schedule = wavefront(ARMT, 4, 3, alpha=4)
    assert schedule.width == 1
    assert [cells[0] for cells in schedule.levels] == [(s, layer) for s in range(3) for layer in range(4)]
    assert not schedule.is_optimal


@given(legal_offsets, sizes)
def test_each_cell_runs_once_after_all_it_depends_on(
    offsets: frozenset[Offset], size: tuple[int, int]
) -> None:
    n_layers, n_segments = size
    schedule = wavefront(offsets, n_layers, n_segments)
    cells = [cell for level in schedule.levels for cell in level]
    assert sorted(cells) == [(s, layer) for s in range(n_segments) for layer in range(n_layers)]
    level = {cell: t for t, cells in enumerate(schedule.levels) for cell in cells}
    for s, layer in cells:
        for ds, dl in offsets:
            before = (s - ds, layer - dl)
            assert level.get(before, -1) < level[s, layer]
        assert schedule.level_of((s, layer)) == level[s, layer]


@given(legal_offsets, sizes)
def test_levels_and_critical_path_agree_with_networkx(
    offsets: frozenset[Offset], size: tuple[int, int]
) -> None:
    schedule = wavefront(offsets, *size)
    graph = schedule.to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    assert schedule.critical_path == nx.dag_longest_path_length(graph, default_weight=1) + 1
    assert schedule.critical_path <= schedule.n_levels
    for t, generation in enumerate(nx.topological_generations(graph)):
        for cell in generation:
            assert longest_path_levels(offsets, *size)[cell] == t


@given(legal_offsets, sizes)
def test_an_optimal_schedule_has_as_many_levels_as_the_longest_path(
    offsets: frozenset[Offset], size: tuple[int, int]
) -> None:
    schedule = wavefront(offsets | {(0, 1)}, *size)
    assume(schedule.is_optimal)
    longest = longest_path_levels(schedule.offsets, *size)
    assert schedule.n_levels == max(longest.values()) + 1
    assert all(longest[cell] <= t for t, cells in enumerate(schedule.levels) for cell in cells)


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 3))
def test_one_carry_and_a_stack_of_layers_is_always_optimal(
    n_layers: int, n_segments: int, depth: int
) -> None:
    schedule = wavefront({(0, 1), (1, -min(depth, n_layers - 1))}, n_layers, n_segments)
    assert schedule.is_optimal
    assert schedule.width == min(n_segments, -(-n_layers // schedule.alpha))


@given(st.lists(st.sampled_from([(0, 1), (1, 0), (1, -1), (2, 1), (1, 3)]), min_size=1), st.randoms())
def test_the_order_of_offsets_is_irrelevant(offsets: list[Offset], random: object) -> None:
    shuffled = list(offsets)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert wavefront(offsets, 4, 5) == wavefront(shuffled + offsets, 4, 5)


def test_a_big_grid_is_scheduled_fast() -> None:
    start = time.perf_counter()
    assert wavefront(ARMT, 32, 128).critical_path == 159
    assert time.perf_counter() - start < 0.5
    assert wavefront(ARMT, 64, 1024).is_optimal
    assert time.perf_counter() - start < 5
