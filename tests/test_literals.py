"""rmtcompile/frontend/literals.py: tensors that the forward writes out in its code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from toys import SEGMENT, Toy, assert_equal_runs, features, made

import rmtcompile
from rmtcompile.frontend.capture import capture
from rmtcompile.frontend.literals import literals, merge_literals

SHARED = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)


class Literal(Toy):
    """Makes `torch.tensor([...])` for each layer and segment, and writes into it."""

    def literal(self, h: Tensor) -> Tensor:
        value = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=h.dtype)
        value += h.mean()
        return value

    def forward(self, x: Tensor) -> Tensor:
        memory = [x.new_zeros(x.shape[0], x.shape[2]) for _ in self.layers]
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, memory[l] = layer(h + self.literal(h), memory[l])
            out.append(h)
        return torch.cat(out, 1)


class Two(Literal):
    """Another literal in the first layer's first segment, an empty one, and a constant that is no literal."""

    def literal(self, h: Tensor) -> Tensor:
        empty = torch.tensor([], dtype=h.dtype)
        return torch.cat((empty, super().literal(h))) + SHARED


class Indexed(Toy):
    """Writes its states at a literal index; nobody reads what the last segment has written."""

    def forward(self, x: Tensor) -> Tensor:
        states = x.new_zeros(len(self.layers), x.shape[0], x.shape[2])
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, new = layer(h, states[l])
                states = states.index_copy(0, torch.tensor([l]), new[None])
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.filterwarnings("ignore::rmtcompile.SequentialScheduleWarning")
@torch.no_grad()
def test_literals_that_the_last_segment_does_not_need() -> None:
    model = made(lambda: Indexed(4))  # more than ten, so that the order of names is not that of segments
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for segments in (2, 3, 5):
        assert_equal_runs(model, fast, (features(segments),))


@torch.no_grad()
def test_a_literal_in_every_cell() -> None:
    for build in (Literal, Two):
        model = made(build)
        fast = rmtcompile.optimize(copy.deepcopy(model))
        assert_equal_runs(model, fast, [features(segments) for segments in (4, 4, 1, 7)])
        assert fast.captures == 1


@torch.no_grad()
def test_what_is_written_into_a_literal_is_not_kept() -> None:
    model = made(Literal)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    x = features(3)
    first = fast(x)
    assert torch.equal(first, fast(x)) and not fast.compiled.written


@torch.no_grad()
def test_equal_literals_become_one() -> None:
    captured = capture(made(Two), (features(2),), {})
    found = literals(captured)
    assert len(found) == 2 * 2 * 3  # two literals in each of the 2 x 3 cells
    merge_literals(captured, found)
    names = {leaf.name for leaf in captured.leaves.values() if leaf.is_constant}
    assert sum(name.startswith("constant_") for name in names) == 2
    assert len(names) == 3  # and SHARED, which code outside could write


@torch.no_grad()
def test_names_follow_contents() -> None:
    names = []
    for segments in (2, 3):
        captured = capture(made(Two), (features(segments),), {})
        merge_literals(captured, literals(captured))
        names.append({leaf.name for leaf in captured.leaves.values() if leaf.name.startswith("constant_")})
    assert names[0] == names[1]


@torch.no_grad()
def test_nothing_to_do() -> None:
    captured = capture(made(Toy), (features(2),), {})
    before = dict(captured.leaves)
    assert literals(captured) == frozenset()
    merge_literals(captured, frozenset())
    assert captured.leaves == before
