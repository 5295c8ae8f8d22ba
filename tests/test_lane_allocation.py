"""passes/grid/lane_allocation/: every value that crosses cells has a way that arrives in time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dependence import BUILDERS, NoCarry
from test_reroll import FirstDiffers, Kept, rules
from toys import Toy

from rmtcompile.errors import DependenceError
from rmtcompile.ir.program import Program
from rmtcompile.passes.grid.dependence import dependences
from rmtcompile.passes.grid.lane_allocation import allocate_lanes, hops
from rmtcompile.passes.grid.lane_allocation.drafts import GroupDraft
from rmtcompile.passes.grid.wavefront import skew


def program(build: Any, segments: int = 3) -> Program:
    rolled = rules(build, segments)
    found = dependences(rolled)
    return allocate_lanes(rolled, frozenset(found), max(1, skew(found, rolled.n_layers)))


def assert_in_time(found: Program) -> None:
    """A place holds what was written last: a way takes a level at least, and ends before the next write."""
    for lane in found.lanes:
        for feed in lane.feeds:
            ds, dl = feed.offset
            assert 1 <= found.alpha * ds + dl <= found.alpha


@pytest.mark.parametrize("offset", BUILDERS)
def test_ways_arrive_in_time(offset: tuple[int, int]) -> None:
    found = program(BUILDERS[offset], 4)
    assert_in_time(found)
    assert any(lane.carries for lane in found.lanes)


def test_one_kind_of_layer_is_one_group() -> None:
    found = program(Kept)
    (group,) = found.groups
    assert (group.name, group.layers) == ("layers", (0, 1, 2))
    roles = {port.role for port in group.ports}
    assert roles == {"lane", "weight"}


def test_weights_are_stacked_by_layer() -> None:
    (group,) = program(Kept).groups
    weights = [port.source for port in group.ports if port.role == "weight"]
    assert {parts[0] for weight in weights for parts in weight.leaves} >= {
        "layers.0.mix.weight",
        "layers.2.mix.bias",
    }
    assert all(weight.n_layers == 3 for weight in weights)


def test_the_state_has_a_first_value() -> None:
    carries = [lane for lane in program(Kept).lanes if lane.carries]
    assert len(carries) == 1
    (state,) = carries
    assert state.shape == (2, 4) and state.layers == (0, 1, 2)
    assert [entry.layer for entry in state.entries] == [0, 1, 2]
    assert all(dict(entry.early).keys() == {0} and entry.steady is None for entry in state.entries)


def test_the_input_enters_at_the_bottom() -> None:
    (hidden,) = [lane for lane in program(Kept).lanes if not lane.carries and lane.feeds]
    assert [(entry.layer, entry.early) for entry in hidden.entries] == [(0, ())]
    assert {feed.offset for feed in hidden.feeds} == {(0, 1)}


def test_classes_share_a_group() -> None:
    (group,) = program(FirstDiffers).groups
    assert sorted(group.classes) == [0, 1]
    assert [port.source for port in group.ports if port.role == "mask"] == [(0,)]


def test_outputs_of_several_classes_keep_their_names() -> None:
    """An output that is asked for class by class, and then for both, is one; no other one is lost for it."""

    class Merged:
        classes = (0, 1)

    draft = GroupDraft("kind0", (0,), Merged())  # type: ignore[arg-type]
    first, second = draft.output({0: 5}), draft.output({1: 7})
    assert first != second
    both = draft.output({0: 5, 1: 7})
    assert draft.output({0: 5, 1: 7}) == both and draft.output({0: 5}) == both
    assert {first, second, both} <= set(draft.outputs.values())
    assert len(set(draft.outputs.values())) == len(draft.outputs)


def test_no_state_no_carry() -> None:
    assert not any(lane.carries for lane in program(NoCarry).lanes)


def test_older_states_wait_in_a_chain() -> None:
    found = program(BUILDERS[2, 0], 4)
    carries = [lane for lane in found.lanes if lane.carries]
    assert len(carries) == 2
    assert {feed.offset for lane in carries for feed in lane.feeds} == {(1, 0)}


def test_deterministic() -> None:
    assert str(program(Toy).lanes) == str(program(Toy).lanes)


@settings(max_examples=300)
@given(st.integers(1, 5), st.integers(0, 5), st.integers(-12, 8))
def test_hops_add_up_and_arrive_in_time(alpha: int, ds: int, dl: int) -> None:
    """Every offset legal at alpha is cut into the fewest legal hops, none of which leaves the grid."""
    levels = alpha * ds + dl
    if levels < 1:
        with pytest.raises(DependenceError, match=r"cannot reach its reader on levels"):
            hops((ds, dl), alpha)
        return
    found = hops((ds, dl), alpha)
    assert (sum(a for a, _ in found), sum(b for _, b in found)) == (ds, dl)
    assert all(1 <= alpha * a + b <= alpha for a, b in found)
    assert len(found) == -(-levels // alpha)
    segment = layer = 0
    for a, b in found:
        segment, layer = segment + a, layer + b
        assert 0 <= segment <= ds and min(0, dl) <= layer <= max(0, dl)


def test_a_step_down_takes_one_hop() -> None:
    assert hops((2, -1), 1) == [(2, -1)]
    assert hops((3, -1), 1) == [(1, 0), (2, -1)]


def test_nothing_waits_where_all_segments_run_at_once() -> None:
    assert hops((3, 2), 0) == [(3, 2)]


def test_a_way_that_comes_too_late_is_refused() -> None:
    with pytest.raises(DependenceError, match=r"\(1, -1\) cannot reach its reader on levels 1\*s \+ l"):
        hops((1, -1), 1)
