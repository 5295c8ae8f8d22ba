"""rmtcompile/compiler/results.py: results are rebuilt for any number of segments, also where they grow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from toys import SEGMENT, Layer, assert_same, features, made

import rmtcompile
from rmtcompile.binding.captured import Out
from rmtcompile.compiler.results import Aligner, Family, outs_of, value_of
from rmtcompile.errors import RerollError


def rule_of(small: Any, large: Any, counts: tuple[int, int] = (2, 3)) -> tuple[Any, Aligner]:
    """The rule of two results; every `Out` is numbered in order."""

    def numbered(value: Any) -> tuple[list[Any], Any]:
        leaves, spec = pytree.tree_flatten(value)
        tensors = iter(range(len(leaves)))
        return [Out(next(tensors)) if leaf == "out" else leaf for leaf in leaves], spec

    aligner = Aligner(counts)
    return aligner.align(numbered(small), numbered(large), "the result"), aligner


@pytest.mark.parametrize("value", ["out", ("out", 1), {"a": "out", "b": [None, "out"]}, [("out",), "out"]])
def test_equal_structures(value: Any) -> None:
    rule, aligner = rule_of(value, value)
    outputs = tuple(range(100, 110))
    expected = pytree.tree_map(lambda leaf: leaf, value)
    got = value_of(rule, outputs, 7)
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)
    assert len(outs_of(rule)) == len(aligner.pairs) == str(value).count("out")


def test_numbered_keys_grow() -> None:
    rule, aligner = rule_of(
        {"logits_0": "out", "logits_1": "out", "last": "out"},
        {"logits_0": "out", "logits_1": "out", "logits_2": "out", "last": "out"},
    )
    assert aligner.pairs[0] == ((0, 1), (0, 1, 2), True)
    got = value_of(rule, ((10, 11, 12, 13), 99), 4)
    assert got == {"logits_0": 10, "logits_1": 11, "logits_2": 12, "logits_3": 13, "last": 99}
    assert list(got)[-1] == "last"


def test_lists_grow() -> None:
    rule, _ = rule_of(["out", "out"], ["out", "out", "out"])
    assert value_of(rule, ([5, 6, 7, 8],), 4) == [5, 6, 7, 8]
    assert rule.children == (Family(Out(0)),)


def test_structures_grow() -> None:
    """A dict a segment, with the segment's number in it."""
    segment = lambda s: {"h": "out", "pair": ("out", None), "n": 3 * s, "kind": "x"}  # noqa: E731
    rule, aligner = rule_of([segment(s) for s in range(2)], [segment(s) for s in range(3)])
    assert aligner.pairs == [((0, 2), (0, 2, 4), True), ((1, 3), (1, 3, 5), True)]
    got = value_of(rule, ([10, 11, 12, 13], [20, 21, 22, 23]), 4)
    assert got == [{"h": 10 + s, "pair": (20 + s, None), "n": 3 * s, "kind": "x"} for s in range(4)]


def test_entries_in_turn_grow() -> None:
    rule, _ = rule_of(["out", 1] * 2, ["out", 1] * 3)
    assert value_of(rule, ([5, 6, 7, 8],), 4) == [5, 1, 6, 1, 7, 1, 8, 1]
    keys = lambda n: {f"{k}_{s}": "out" for s in range(n) for k in ("x", "y")}  # noqa: E731
    rule, _ = rule_of(keys(2), keys(3))
    got = value_of(rule, ([5, 6, 7], [15, 16, 17]), 3)
    assert list(got.items()) == [("x_0", 5), ("y_0", 15), ("x_1", 6), ("y_1", 16), ("x_2", 7), ("y_2", 17)]


def test_counts_grow() -> None:
    rule, _ = rule_of(("out", 4), ("out", 6))
    assert value_of(rule, ("x",), 5) == ("x", 10)




@pytest.mark.parametrize(
    ("small", "large"),
    [
        ("out", ("out",)),
        (("out", "a"), ("out", "b")),
        (("out", 0.5), ("out", 0.25)),
        (("out", True), ("out", 1)),
        ({"a": "out"}, {"b": "out"}),
        (["out", "out"], ["out", "out", "out", "out"]),
        ({"a": "out"}, {"a": "out", "extra": "out"}),
        ({"x_0": "out"}, {"x_0": "out", "x_1": "out", "x_2": "out"}),
        (["out", None], ["out", None, "out"]),
        ([0, 1], [0, 1, 4]),
    ],
)
def test_what_follows_no_rule_is_refused(small: Any, large: Any) -> None:
    with pytest.raises(RerollError) as caught:
        rule_of(small, large)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the result changes its structure with the number of segments"
    assert lines[1].startswith("  2 segments: ") and lines[2].startswith("  3 segments: ")
    assert lines[3] == "  help: return one tensor for all segments, or one a segment under numbered keys"


class Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        memory = [x.new_zeros(x.shape[0], 4) for _ in self.layers]
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, memory[l] = layer(h, memory[l])
            out.append(h)
        return self.result(out, memory)

    def result(self, out: list[Tensor], memory: list[Tensor]) -> Any:
        raise NotImplementedError


class Numbered(Returns):
    def result(self, out: list[Tensor], memory: list[Tensor]) -> Any:
        return {**{f"y_{s}": y for s, y in enumerate(out)}, "memories": tuple(memory), "count": len(out)}


class Listed(Returns):
    def result(self, out: list[Tensor], memory: list[Tensor]) -> Any:
        return out, None, "text", memory[-1]


class LastOnly(Returns):
    def result(self, out: list[Tensor], memory: list[Tensor]) -> Any:
        return out[-1][:, -1]


class FirstOnly(Returns):
    def result(self, out: list[Tensor], memory: list[Tensor]) -> Any:
        return out[0], out[-1]


class Entering(nn.Module):
    """Returns what enters each layer: to the first one nothing was added in the first segment."""

    def __init__(self, n_memory: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.start = nn.Parameter(torch.randn(1, 2, 4))
        self.n_memory = n_memory

    def forward(self, x: Tensor) -> Any:
        memory: list[Tensor | None] = [None] * 3
        seen: list[list[Tensor]] = [[], [], []]
        for h in x.split(SEGMENT, 1):
            h = torch.cat([h, self.start.expand(h.shape[0], -1, -1)], 1)
            for l, layer in enumerate(self.layers):
                before = memory[l]
                h = h if before is None else h + before[:, None]
                seen[l].append(h[:, : self.n_memory])
                h, memory[l] = layer(h, h.new_zeros(h.shape[0], 4) if before is None else before)
        return [torch.cat(pieces, 1) for pieces in seen]


@pytest.mark.parametrize("build", [Numbered, Listed, LastOnly, FirstOnly, Entering, lambda: Entering(-2)])
@torch.no_grad()
def test_whole_models(build: Any) -> None:
    model = made(build)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for segments in (3, 5, 2):
        assert_same(model(features(segments)), fast(features(segments)))


class HiddenStates(nn.Module):
    """Returns what each layer gives for all positions, as `output_hidden_states=True` does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = [x.new_zeros(x.shape[0], x.shape[2]) for _ in self.layers]
        hidden: list[list[Tensor]] = [[] for _ in self.layers]
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h, states[l])
                hidden[l].append(h)
        return tuple(torch.cat(parts, 1) for parts in hidden)


@pytest.mark.parametrize("plan", ["auto", "sequential"])
def test_what_each_layer_gives_with_a_rest(plan: str) -> None:
    """Results join whole segments and the rest; cells of the rest read what cells of the rest give."""
    model = made(HiddenStates)
    fast = rmtcompile.optimize(copy.deepcopy(model), plan=plan)
    with torch.no_grad():
        for segments in (3, 5, 2, 1):
            x = features(segments)[:, :-1]
            assert_same(model(x), fast(x))


class Begins(Layer):
    """A layer that lets through what comes before it has a state."""

    def forward(self, x: Tensor, m: Tensor | None) -> tuple[Tensor, Tensor]:
        return (x, torch.tanh(self.mix(x[:, 0]))) if m is None else super().forward(x, m)


class FirstIsInput(nn.Module):
    """The first segment passes all layers as it came: its result is its input."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers, self.how = nn.ModuleList(Begins() for _ in range(3)), how

    def forward(self, x: Tensor) -> Any:
        states: list[Any] = [None] * 3
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h, states[l])
            out.append(h)
        if self.how == "a parameter":
            return [self.layers[0].mix.weight, *out[1:]]
        if self.how == "pairs":
            return [(h, h.mean()) for h in out]
        return {f"segment_{s}": h for s, h in enumerate(out)} if self.how == "keys" else out


@pytest.mark.parametrize("how", ["list", "pairs", "keys", "a parameter"])
@torch.no_grad()
def test_lists_whose_first_member_is_an_input(how: str) -> None:
    model = made(lambda: FirstIsInput(how))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for segments in (5, 2, 3, 8):
        x = features(segments)
        assert_same(model(x), fast(x))
    assert fast.schedule.level_rule == "s + l"
