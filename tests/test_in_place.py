"""in_place.py: results are stored where the next level reads them, unless a cell is in the way."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_lane_allocation import program
from test_reroll import FirstDiffers, Kept
from toys import Toy, assert_same, features, made

import rmtcompile
from rmtcompile.ir.program import Feed, Lane, Program
from rmtcompile.passes.cell.in_place import in_place


def placements(build: Any) -> dict[tuple[tuple[int, int], ...], set[str]]:
    found: dict[Any, set[str]] = {}
    for lane in (lane for lane in in_place(program(build)).lanes if lane.feeds):
        found.setdefault(tuple(sorted({feed.offset for feed in lane.feeds})), set()).add(lane.placement)
    return found


def test_it_fires() -> None:
    """Carries are overwritten; hidden states go to the other buffer."""
    assert placements(Kept) == {((0, 1),): {"double"}, ((1, 0),): {"in_place"}}


def test_skewed() -> None:
    """With levels 2s + l, a carry to the layer below arrives one level later, like the hidden state."""
    assert placements(lambda: Toy(3, up=-1)) == {((0, 1),): {"double"}, ((1, -1),): {"double"}}


def lane(*feeds: Feed, name: str = "a") -> Lane:
    return Lane(name, (0, 1, 2), None, (2,), torch.float64, torch.device("cpu"), (), feeds)


def placed(alpha: int, *lanes: Lane) -> list[str]:
    found = in_place(Program(3, alpha, frozenset(), (), lanes, (), None))
    return [lane.placement for lane in found.lanes]


@pytest.mark.parametrize(
    ("alpha", "offset", "placement"),
    [
        (1, (1, 0), "in_place"),
        (1, (0, 1), "double"),
        (2, (1, 0), "in_place"),
        (2, (0, 1), "double"),
        (2, (1, -1), "double"),
        (3, (1, -1), "copy"),  # arrives two levels later
        (2, (0, 2), "copy"),
    ],
)
def test_legality(alpha: int, offset: tuple[int, int], placement: str) -> None:
    assert placed(alpha, lane(Feed("g", "out0", offset, (0, 1, 2)))) == [placement]


def test_lanes_without_a_producer_are_left_alone() -> None:
    only_entries = Program(3, 1, frozenset(), (), (lane(),), (), None)
    assert in_place(only_entries) is only_entries


def test_lanes_that_move_from_lane_to_lane_are_copied() -> None:
    a = lane(Feed("g", "out0", (1, 0), (0, 1, 2)))
    b = lane(Feed("", "a", (1, 0), (0, 1, 2)), name="b")
    assert placed(1, a, b) == ["copy", "copy"]


def test_two_buffers_have_a_place_for_what_leaves_the_top() -> None:
    (hidden,) = [lane for lane in in_place(program(Kept)).lanes if lane.placement == "double"]
    assert hidden.spare == (max(hidden.layers) + 1,) and hidden.places == (*hidden.layers, *hidden.spare)


@pytest.mark.parametrize("build", [Kept, FirstDiffers, Toy, lambda: Toy(3, up=-1), lambda: Toy(4, up=1)])
@torch.no_grad()
def test_same_bits(build: Any) -> None:
    model = made(build)
    inputs = [features(segments, batch=2) for segments in (1, 2, 3, 5, 9)]
    results = []
    for off in (frozenset[str](), frozenset({"in_place"})):
        fast = rmtcompile.optimize(copy.deepcopy(model))
        fast._programs.options = replace(fast.options, passes_off=off)
        results.append([fast(x) for x in inputs])
    assert_same(results[0], [model(x) for x in inputs])
    for a, b in zip(*(torch.utils._pytree.tree_leaves(result) for result in results), strict=True):
        assert torch.equal(a, b)
