"""passes/reroll: rules read from k segments give k + 1, and what follows no rule is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, features, made

from rmtcompile.compiler.stages import Log
from rmtcompile.compiler.unrolling import unrolled_forward
from rmtcompile.errors import RerollError
from rmtcompile.ir.segmentation import Axis, Segmentation
from rmtcompile.options import Options
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, INIT, PROLOGUE, Region
from rmtcompile.passes.grid.reroll import Classes, Rolled, Unrolled, reroll


@torch.no_grad()
def unrolled(build: Callable[[], nn.Module], segments: int) -> Unrolled:
    where = Segmentation((Axis(0, 1, SEGMENT),))
    return unrolled_forward(made(build), (features(2),), {}, where, segments, Options(), Log(None))[1]


@functools.cache
def rules(build: Callable[[], nn.Module], segments: int = 3) -> Rolled:
    return reroll(unrolled(build, segments), unrolled(build, segments + 1))


class Cell(nn.Module):
    """A layer that leaves its state behind, so that no segment does less than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.read = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, m: Tensor, first: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        x = first(x)
        x = x + torch.tanh(self.mix(x) + self.read(m)[:, None])
        return x, torch.sigmoid(self.read(m) + x.mean(1))


class Kept(nn.Module):
    """Three such layers; the methods say what is special about a segment."""

    back, up = 1, 0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Cell() for _ in range(3))

    def source(self, s: int, l: int) -> tuple[int, int]:
        return s - self.back, l - self.up

    def enter(self, h: Tensor, s: int, count: int) -> Tensor:
        return h

    def within(self, h: Tensor, s: int) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        zero = x.new_zeros(x.shape[0], WIDTH)
        pieces, out = x.split(SEGMENT, 1), []
        written: dict[tuple[int, int], Tensor] = {}
        for s, h in enumerate(pieces):
            h = self.enter(h, s, len(pieces))
            for l, layer in enumerate(self.layers):
                within = functools.partial(self.within, s=s)
                h, written[s, l] = layer(h, written.get(self.source(s, l), zero), within)
            out.append(h)
        for l, layer in enumerate(self.layers):
            layer.states = [written[s, l] for s in range(len(pieces) - self.back, len(pieces))]
        return torch.cat(out, 1)


def test_a_carry_comes_from_the_segment_before() -> None:
    rolled = rules(Kept)
    ways = set()
    for l in range(3):
        for rule in rolled.rules[(CELL, l)].values():
            for live_in in rule.sources:
                if getattr(live_in.steady, "kind", "") == CELL:
                    ways.add((live_in.steady.segment, live_in.steady.layer - l))
                    assert live_in.steady.relative
    assert ways == {(1, 0), (0, -1)}


def test_the_first_segment_reads_what_was_there_before() -> None:
    early = [x.early for x in rules(Kept).rules[(CELL, 1)][0].sources if x.early]
    assert len(early) == 1 and set(early[0]) == {0}
    assert early[0][0].kind in (INIT, PROLOGUE)


def test_no_special_segments() -> None:
    rolled = rules(Kept)
    assert all(rolled.classes[(CELL, l)] == Classes(0, 0) for l in range(3))
    assert rolled.minimum == 1 and rolled.proved_on == (3, 4)


class FirstDiffers(Kept):
    """Later segments do one operation more."""

    def within(self, h: Tensor, s: int) -> Tensor:
        return h.sin() if s else h


def test_the_first_segment_may_differ() -> None:
    rolled = rules(FirstDiffers)
    assert rolled.classes[(CELL, 1)] == Classes(1, 0)
    assert set(rolled.rules[(CELL, 1)]) == {0, 1}
    assert len(rolled.rule(CELL, 1, 0, 9).body.nodes) < len(rolled.rule(CELL, 1, 5, 9).body.nodes)


class Positions(Kept):
    """Integers that grow with the segment and with the number of segments."""

    def enter(self, h: Tensor, s: int, count: int) -> Tensor:
        h = h + torch.arange(s * SEGMENT, (s + 1) * SEGMENT, dtype=h.dtype)[:, None] / 100
        return h + torch.full((1,), count - s, dtype=h.dtype)


def test_integers_are_affine() -> None:
    ints = {str(i) for rule in rules(Positions).rules[(PROLOGUE, -1)].values() for i in rule.ints}
    assert {"3 * s", "3 * s + 3"} <= ints
    assert any("S" in text for text in ints)


class Squares(Kept):
    def enter(self, h: Tensor, s: int, count: int) -> Tensor:
        return h + torch.full((1,), s * s, dtype=h.dtype)


def test_integers_that_are_not_affine_are_refused() -> None:
    with pytest.raises(RerollError) as caught:
        rules(Squares)
    lines = str(caught.value).splitlines()
    assert lines[0] == "an integer in prologue does not grow evenly with the segment"
    assert "  segment 1 of 3: 1" in lines and "  segment 2 of 3: 4" in lines
    assert lines[-1].startswith("  help: ")


class Alternates(Kept):
    """Every other segment does something else."""

    def within(self, h: Tensor, s: int) -> Tensor:
        return h.sin() if s % 2 else h.cos()


def test_segments_without_a_rule_are_refused() -> None:
    with pytest.raises(RerollError) as caught:
        rules(Alternates)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the segments of layer 0 do not follow one rule"
    assert any("sin" in line and "test_reroll.py:" in line for line in lines)
    assert any("cos" in line and "test_reroll.py:" in line for line in lines)


def test_captures_of_other_lengths_are_refused() -> None:
    small = unrolled(Kept, 2)
    with pytest.raises(RerollError, match="one more segment changes the layers that run"):
        reroll(small, small)
    with pytest.raises(RerollError, match="one more segment changes the layers that run"):
        reroll(small, replace(unrolled(Kept, 3), n_layers=2))


def test_several_segments_more() -> None:
    small = unrolled(Kept, 3)
    assert reroll(small, unrolled(Kept, 6)).is_like(reroll(small, unrolled(Kept, 4)))


def test_a_broken_prediction_is_refused() -> None:
    """One operation of the larger capture is another one: the proof fails."""
    small, large = unrolled(Kept, 2), unrolled(Kept, 3)
    region = Region(CELL, 1, 1)
    body = large.bodies[region]
    rows = (("other", *body.key[0][1:]), *body.key[1:])
    broken: dict[Region, Any] = {**large.bodies, region: replace(body, key=rows)}
    with pytest.raises(RerollError, match="layer 1"):
        reroll(small, replace(large, bodies=broken))


class Neighbour(Kept):
    """Segment 2 reads the states of the layer above."""

    def source(self, s: int, l: int) -> tuple[int, int]:
        return s - 1, min(l + 1, 2) if s == 2 else l


WEAK = pytest.mark.xfail(strict=True, reason="a rule seen in one segment alone is taken for proved")


def test_an_edge_of_one_segment_is_no_rule() -> None:
    with pytest.raises(RerollError):
        rules(Neighbour, 2)


def test_an_edge_of_one_segment_may_be_special() -> None:
    early = [x.early for x in rules(Neighbour, 4).rules[(CELL, 0)][0].sources if x.early]
    assert len(early) == 1 and 2 in early[0]


class LastDiffers(Kept):
    """All segments read the states of the layer above but for the last, which reads its own layer's."""

    def enter(self, h: Tensor, s: int, count: int) -> Tensor:
        self.last = count - 1
        return h

    def source(self, s: int, l: int) -> tuple[int, int]:
        return s - 1, l if s == self.last else min(l + 1, 2)


@pytest.mark.parametrize("segments", [4, 5])
def test_an_edge_that_is_special_in_one_capture_alone_is_no_rule(segments: int) -> None:
    """The last segment of the smaller capture is not the last of the larger one."""
    with pytest.raises(RerollError, match="reads from another place with one more segment") as caught:
        rules(LastDiffers, segments)
    said = str(caught.value)
    assert "Source(" not in said and "fallback='sequential'" in said
    assert all(f"layer {layer} of segment {segments - 2}   " in said for layer in (1, 2))
    assert "test_reroll.py" in said, "the user's lines"


@pytest.mark.parametrize("segments", [pytest.param(2, marks=WEAK), 3])
def test_two_points_are_no_line(segments: int) -> None:
    with pytest.raises(RerollError):
        rules(Squares, segments)


@given(st.integers(0, 3), st.integers(0, 2), st.integers(1, 9))
def test_classes_number_the_ends(head: int, tail: int, count: int) -> None:
    classes = Classes(head, tail)
    if count < head + tail:
        return
    numbers = [classes.of(s, count) for s in range(count)]
    assert numbers[:head] == list(range(min(head, count)))
    assert numbers[count - tail :] == list(range(-tail, 0))
    assert set(numbers[head : count - tail]) <= {head}


def test_outputs() -> None:
    """The result comes from the epilogue, and what is left behind from the last cells."""
    where = [getattr(source, "kind", "") for source in rules(Kept).outputs]
    assert where.count(EPILOGUE) == 1 and where.count(CELL) == 3


def test_classes_that_another_region_finds_before() -> None:
    first_and_rest, rest = Classes(1, 1), Classes(0, 1)
    assert first_and_rest.met(-1, 0, first_and_rest, 1) == {-1}
    assert first_and_rest.met(1, 0, first_and_rest, 1) == {1}
    assert first_and_rest.met(-1, 1, first_and_rest, 1) == {0, 1}
    assert first_and_rest.met(-1, 1, first_and_rest, 3) == {1}
    assert rest.met(0, 0, first_and_rest, 1) == {0, 1}
    assert first_and_rest.met(1, 2, rest, 1) == {0}
