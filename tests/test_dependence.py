"""passes/grid/dependence.py: offsets between cells, each with the place that shows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_reroll import Kept, rules
from toys import Toy

from rmtcompile.errors import DependenceError
from rmtcompile.ir.program import Source
from rmtcompile.passes.grid.dependence import dependences
from rmtcompile.passes.grid.partition import CELL
from rmtcompile.passes.grid.reroll import LiveIn
from rmtcompile.passes.grid.wavefront import skew


class Above(Kept):
    up = 1


class Below(Kept):
    up = -1


class Bottom(Kept):
    up = -2


class Older(Kept):
    back = 2


BUILDERS = {(1, 0): Kept, (1, 1): Above, (1, -1): Below, (1, -2): Bottom, (2, 0): Older}


@pytest.mark.parametrize(("back", "up"), BUILDERS)
def test_offsets(back: int, up: int) -> None:
    found = dependences(rules(BUILDERS[back, up], 4))
    inside = {offset for offset in found if abs(offset[1]) < 3}
    assert inside == {(0, 1), (back, up)}


@pytest.mark.parametrize(("offset", "alpha"), [((1, 0), 1), ((1, 1), 0), ((1, -1), 2), ((1, -2), 3)])
def test_the_skew_follows(offset: tuple[int, int], alpha: int) -> None:
    assert skew(dependences(rules(BUILDERS[offset], 4)), 3) == alpha


class NoCarry(Kept):
    def source(self, s: int, l: int) -> tuple[int, int]:
        return -1, l


def test_no_carry_gives_no_edge_between_segments() -> None:
    assert set(dependences(rules(NoCarry))) == {(0, 1)}


def test_the_last_segment_hides_no_edge() -> None:
    assert set(dependences(rules(Toy))) == {(0, 1), (1, 0)}


def test_witnesses_name_both_ends() -> None:
    for offset, found in dependences(rules(Kept)).items():
        assert found.offset == offset
        assert found.consumer.startswith("cell (s, ")
        assert found.producer.startswith("cell (s - 1, " if offset[0] else "cell (s, ")
        assert "toys.py:" in found.consumer or "test_reroll.py:" in found.consumer
        assert "toys.py:" in found.producer or "test_reroll.py:" in found.producer


def test_order_of_layers_is_checked() -> None:
    """Rules in which layer 0 reads layer 2 of its own segment have no order."""
    rolled = rules(Kept)
    rule = rolled.rules[(CELL, 0)][0]
    wrong = LiveIn({}, Source(CELL, relative=True, layer=2, node=0, nodes=((0, 0),)))
    sources = (wrong, *rule.sources[1:])
    broken = replace(rolled, rules={**rolled.rules, (CELL, 0): {0: replace(rule, sources=sources)}})
    with pytest.raises(DependenceError) as caught:
        dependences(broken)
    lines = str(caught.value).splitlines()
    assert lines[0] == "a layer needs a later layer of the same segment"
    assert "offset (0, -2)" in lines[1]
    assert lines[-1] == "  help: name the layers with layers='path.to.container'"
