"""Integers that a model keeps from call to call and goes on from: programs for any of them."""

from __future__ import annotations

import copy
import functools
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters
from toys import assert_same, features, made

import rmtcompile
from rmtcompile.dispatch.size_vectors import Counted, counted
from rmtcompile.errors import IgnoredWarning
from rmtcompile.frontend import asking, counting
from rmtcompile.frontend.asking import watching

SEGMENT = 3


class Going(nn.Module):
    """Goes on from where the last call has stopped: positions, and states of its layers.

    Args:
        kind: how it reads its position.
    """

    def __init__(self, kind: str, n_layers: int = 3, size: int = 4) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(n_layers))
        self.register_buffer("table", torch.linspace(0, 1, 1000 * size).reshape(1000, size))
        self.states = [torch.zeros(2, size, dtype=torch.float64) for _ in range(n_layers)]
        self.position, self.segments = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for h in x.split(SEGMENT, 1):
            h = h + self.at(h.shape[1])
            self.position += h.shape[1]
            self.segments += 1
            for l, layer in enumerate(self.layers):
                h = torch.tanh(layer(h) + self.states[l][:, None])
                self.states[l] = 0.5 * self.states[l] + h.mean(1)
            out.append(h)
        return torch.cat(out, 1)

    def at(self, n: int) -> Tensor:
        """What is added at the next n positions."""
        if self.kind == "slice":
            return self.table[self.position : self.position + n]
        if self.kind == "stepped":
            return self.table[self.position : self.position + 2 * n : 2]
        if self.kind == "numbered":
            return self.table[self.segments]
        if self.kind == "added":
            return torch.sin(self.position + 2 * self.segments * self.table[:n])
        positions = torch.arange(self.position, self.position + n, device=self.table.device)
        return torch.sin(positions.double() / 10)[:, None]


KINDS = ("slice", "stepped", "arange", "numbered", "added")


class Ring(Going):
    """Writes one of four places after the other, and reads the one before."""

    def at(self, n: int) -> Tensor:
        return self.table[self.segments % 4]


class Halves(Going):
    """Makes a float of its number, and asks it."""

    def at(self, n: int) -> Tensor:
        return self.table[0 if self.segments + 0.5 > 9 else self.segments]


class Warming(Going):
    """Does something else from the ninth segment on."""

    def at(self, n: int) -> Tensor:
        return self.table[self.position] if self.segments < 9 else self.table[0]


class Limited(Going):
    """Its table has an end."""

    def at(self, n: int) -> Tensor:
        return self.table[min(self.position, 40)]


class Ranged(Going):
    """Its numbers come out of a range."""

    def at(self, n: int) -> Tensor:
        return torch.stack([self.table[i if i < 40 else 0] for i in range(self.position, self.position + n)])


class Listed(Going):
    """Looks a number up."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.scales = [1.0] * 7 + [2.0] * 43

    def at(self, n: int) -> Tensor:
        return self.table[0] * self.scales[self.segments]


class Beginning(Going):
    """Does something else at its first position."""

    def at(self, n: int) -> Tensor:
        return self.table[n : 2 * n] if self.position == 0 else self.table[self.position :][:n]


class Noted(Going):
    """Leaves its position in another attribute, too, and gives it."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.last = 0

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        self.last = 2 * self.position + 1
        return y, self.position


def pair(kind: str, **options: Any) -> tuple[Any, Any]:
    """A model and an optimized one that is equal."""
    model = made(lambda: Going(kind))
    return model, rmtcompile.optimize(copy.deepcopy(model), **options)


def assert_goes_on(model: Any, fast: Any, lengths: Any) -> None:
    """A call of each length gives the same, and leaves the same."""
    for tokens in lengths:
        x = features(-(-tokens // SEGMENT))[:, :tokens]
        assert_same(model(x), fast(x))
        assert (model.position, model.segments) == (fast.model.position, fast.model.segments)
    assert_same(model.states, fast.model.states)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_two_captures_serve_all_positions(kind: str) -> None:
    """Of any number of segments, and from the start again, or from anywhere."""
    model, fast = pair(kind)
    assert_goes_on(model, fast, (12, 12))
    captures = fast.captures
    assert_goes_on(model, fast, (12, 9, 30, 12, 6))
    for one in (model, fast.model):
        one.position, one.segments = 0, 0
    assert_goes_on(model, fast, (15, 12))
    for one in (model, fast.model):
        one.position, one.segments = 3 * 50, 50
    assert_goes_on(model, fast, (12, 12, 45))
    assert fast.captures == captures


class Helped(Going):
    """Looks a number up through a property."""

    @property
    def now(self) -> int:
        return self.segments

    def at(self, n: int) -> Tensor:
        return self.table[0] * STEPS[self.now]


class Sized(Going):
    """Asks how large a table is that grows with its position."""

    def at(self, n: int) -> Tensor:
        seen = self.table[: self.position + 1]
        return seen[-2:].mean(0) if seen.shape[0] > 20 else seen[0]


class Typed(Going):
    """Asks for the very type, which a watched integer has not."""

    def at(self, n: int) -> Tensor:
        return self.table[self.position] * (1 if type(self.position) is int else 2)


class Ending(Going):
    """Its table has an end, at which its rows become fewer."""

    def at(self, n: int) -> Tensor:
        rows = self.table[:40][self.position : self.position + n]
        return rows if rows.shape[0] == n else self.table[0]


STEPS = [1.0] * 7 + [2.0] * 43
MORE = (Ring, Halves, Warming, Limited, Ranged, Listed, Beginning, Helped, Sized, Typed, Ending)


@pytest.mark.parametrize("build", MORE)
@pytest.mark.filterwarnings("ignore::rmtcompile.RecaptureWarning")
@torch.no_grad()
def test_more_than_sums(build: type[Going]) -> None:
    """What a forward does may depend on the integer: each one is captured, as it always was."""
    model = made(lambda: build("slice"))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_goes_on(model, fast, (3, 3, 3, 3, 3, 6, 3, 9, 12, 12, 12, 3))


class Minding(Going):
    """Takes nothing but an `int`."""

    def at(self, n: int) -> Tensor:
        return self.table[int.__add__(self.position, 0)]


@pytest.mark.filterwarnings("ignore::rmtcompile.RecaptureWarning")
@torch.no_grad()
def test_who_minds_to_be_watched_is_not_watched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[Any] = []

    class Noted(asking.Asking):
        def __init__(self) -> None:
            super().__init__()
            watched.append(self)

    monkeypatch.setattr(asking, "Asking", Noted)
    model = made(lambda: Minding("slice"))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_goes_on(model, fast, (12, 12, 12, 9, 12))
    assert len(watched) == 1


@torch.no_grad()
def test_integers_left_elsewhere() -> None:
    model = made(lambda: Noted("slice"))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_goes_on(model, fast, (12, 12, 12))
    captures = fast.captures
    assert_goes_on(model, fast, (12, 9, 12))
    assert model.last == fast.model.last
    assert type(fast.model.last) is type(fast.model.position) is type(fast(features(4))[1]) is int
    assert fast.captures == captures


@torch.no_grad()
def test_rests() -> None:
    """Positions and numbers of segments, no longer tied, and rests: no capture once all were seen."""
    model, fast = pair("slice")
    assert_goes_on(model, fast, (13, 14, 13, 14, 14, 13, 13, 14))
    captures = fast.captures
    assert_goes_on(model, fast, (14, 13, 16, 8, 13))
    assert fast.captures == captures


@torch.no_grad()
def test_numbers_that_do_not_follow_are_captured() -> None:
    """Positions that are none of so many segments."""
    model, fast = pair("slice")
    assert_goes_on(model, fast, (12, 12, 12))
    captures = fast.captures
    for one in (model, fast.model):
        one.position = 100
    assert_goes_on(model, fast, (12,))
    assert fast.captures == captures + 1


@torch.no_grad()
def test_another_batch() -> None:
    model, fast = pair("arange")
    assert_goes_on(model, fast, (12, 12, 12))
    for one in (model, fast.model):
        one.states = [state.repeat(2, 1) for state in one.states]
    for tokens in (12, 12, 12):
        x = features(tokens // SEGMENT, batch=4)
        assert_same(model(x), fast(x))
    captures = fast.captures
    x = features(5, batch=4)
    assert_same(model(x), fast(x))
    assert fast.captures == captures


@pytest.mark.filterwarnings("ignore")
def test_gradients() -> None:
    model, fast = pair("slice")
    for _ in range(4):
        grads = []
        for one, call in ((model, model), (fast.model, fast)):
            one.states[:] = [state.detach() for state in one.states]
            one.zero_grad()
            call(features(4)).square().sum().backward()
            grads.append([parameter.grad for parameter in one.parameters()])
        assert_same(*grads, 1e-9)
    assert fast.captures == 2


@torch.no_grad()
def test_the_program_says_what_it_counts() -> None:
    model, fast = pair("slice")
    assert_goes_on(model, fast, (12, 12, 12))
    assert "K" in fast.code and "K = " in fast.code


@torch.no_grad()
def test_compiled_cells_are_shared() -> None:
    model, fast = pair("arange", backend="inductor")
    assert_goes_on(model, fast, (12, 12, 12))
    graphs = counters["stats"]["unique_graphs"]
    assert_goes_on(model, fast, (12, 15, 12))
    assert counters["stats"]["unique_graphs"] == graphs


@torch.no_grad()
def test_saving_says_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, fast = pair("slice")
    assert_goes_on(model, fast, (12, 12, 12, 12))
    with caplog.at_level(logging.WARNING, "rmtcompile"):
        fast.save(tmp_path)
    assert "Going.position" in caplog.text
    again = made(lambda: Going("slice"))
    other = copy.deepcopy(again)
    loaded = rmtcompile.load(tmp_path, other)
    assert_goes_on(again, loaded, (12, 12))
    assert not loaded.captures
    with pytest.warns(IgnoredWarning, match="position was int"):
        assert_goes_on(again, loaded, (12,))


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_on_cuda(kind: str) -> None:
    model = made(lambda: Going(kind)).cuda()
    model.states = [state.cuda() for state in model.states]
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for tokens in (12, 12, 15, 12, 45, 12):
        x = features(tokens // SEGMENT).cuda()
        assert_same(model(x), fast(x))
    assert_same(model.states, fast.model.states)
    assert fast.captures == 2


PARTS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2)), min_size=3, max_size=7)
"""(whole segments, rest) of each call."""


@settings(max_examples=10)
@given(PARTS, st.sampled_from(KINDS))
def test_any_way_to_go_on(parts: list[tuple[int, int]], kind: str) -> None:
    model, fast = pair(kind)
    with torch.no_grad():
        assert_goes_on(model, fast, [segments * SEGMENT + rest for segments, rest in parts])


# ---- what is made of an integer ----------------------------------------------------------------------------


def made_of(use: Any) -> tuple[Any, bool]:
    """What a function makes of a module whose integers are watched, and whether it makes sums only."""
    module = nn.Module()
    module.a, module.b = 12, 5
    for name in ("a", "b"):
        counting.note(module, name)
    counts = counting.Counts()
    with watching(counts, [module]):
        value = use(module)
    assert type(module.a) is type(module.b) is int
    return counting.plain(value), (id(module), "a") in counts.sums


TABLE = list(range(20))
HALVES = [0.0, 0.5]
PLACES = torch.arange(20)


def reused(i: int) -> int:
    found = TABLE[i]
    for i in range(2):
        found += 0 * i
    return found


def asked(module: Any) -> int:
    position = module.a + 1
    assert position > 0.5
    return position


SUMS = (
    (lambda m: m.a + 3, 15), (lambda m: 3 + m.a, 15), (lambda m: m.a - 3, 9), (lambda m: 3 - m.a, -9),
    (lambda m: +m.a, 12), (lambda m: -m.a, -12), (lambda m: m.a * 2, 24), (lambda m: 2 * m.a, 24),
    (lambda m: m.a + m.b, 17), (lambda m: sum([m.a, m.b, 1]), 18), (lambda m: len(TABLE) + m.a, 32),
    (lambda m: int(m.a * torch.ones(()) + m.a - m.a), 12),
    (lambda m: torch.arange(m.a, m.a + 2).shape[0], 2), (lambda m: PLACES[m.a : m.a + 2].shape[0], 2),
    (lambda m: PLACES.shape[0] + m.a, 32), (lambda m: PLACES[0] + m.a, 12),
    (lambda m: -len(TABLE) + m.a, -8), (lambda m: PLACES[5:][m.a : m.a + 2].shape[0], 2),
    (lambda m: PLACES.roll(m.a).shape[0], 20), (lambda m: copy.deepcopy([m.a])[0] + copy.copy(m.a), 24),
    (lambda m: m.a - m.a, 0), (lambda m: [m.a, 1][0], 12), (lambda m: torch.full((2,), m.a).shape[0], 2),
    (lambda m: {"p": m.a}["p"] + 1, 13), (lambda m: m.a is None, False),
    (lambda m: isinstance(m.a, int) and not isinstance(m.a, float), True),
    (lambda m: (lambda x: x)(m.a), 12), (lambda m: PLACES.new_zeros(()) + m.a, 12),
    (lambda m: torch.relu(PLACES[0]) + m.a, 12),
)  # fmt: skip
OTHERS = (
    (lambda m: m.a % 5, 2), (lambda m: m.a // 5, 2), (lambda m: m.a * m.b, 60), (lambda m: m.a + 0.5, 12.5),
    (lambda m: 0.5 * m.a, 6.0), (lambda m: (m.a + m.b) > 3, True), (lambda m: -m.a > 3, False),
    (lambda m: min(m.a, 3), 3), (lambda m: m.a == 12, True), (lambda m: bool(+m.a), True),
    (lambda m: int(m.a), 12), (lambda m: [0] * m.a, [0] * 12), (lambda m: {12: "x"}[m.a], "x"),
    (lambda m: f"{m.a}", "12"), (lambda m: str(m.a), "12"), (lambda m: len(range(m.a)), 12),
    (lambda m: float(m.a - 1), 11.0), (lambda m: divmod(m.a, 5), (2, 2)), (lambda m: m.a.bit_length(), 4),
    (lambda m: m.a & 4, 4), (lambda m: 2**m.a, 4096), (lambda m: m.a < 20.5, True),
    (lambda m: 0.5 + m.a, 12.5), (lambda m: math.gcd(m.a, 8), 4), (lambda m: "abcdefghijklmn"[m.a], "m"),
    (lambda m: TABLE[m.a - 1], 11), (lambda m: next(i for i, _ in enumerate("a", m.a)), 12),
    (lambda m: 3 * m.a + 1 > 1.5, True), (lambda m: TABLE[asked(m)], 13), (lambda m: float("1") + m.a, 13.0),
    (lambda m: HALVES[1] * m.a, 6.0), (lambda m: len(PLACES.split(1)[m.a]), 1),
    (lambda m: TABLE[(m.a, 0)[0]], 12), (lambda m: m.a / 2, 6.0),
    (lambda m: next(map(TABLE.__getitem__, [m.a])), 12), (lambda m: TABLE[m.a], 12),
    (lambda m: sorted([12.5, m.a])[0], 12), (lambda m: (lambda: m.a)() < 12.5, True),
    (lambda m: m.a in (1, 12), True), (lambda m: PLACES[: m.a].shape[0], 12),
    (lambda m: len(torch.arange(m.a)), 12), (lambda m: reused(m.a), 12),
    (lambda m: torch.zeros(2, m.a).numel(), 24), (lambda m: np.arange(20)[m.a], 12),
    (lambda m: np.int64(m.a), 12), (lambda m: PLACES.expand(m.a, 20).stride(0), 0),
    (lambda m: torch.zeros((m.a,)).sum().item(), 0.0), (lambda m: pickle.loads(pickle.dumps(m.a)), 12),
    (lambda m: functools.reduce(min, [m.a, 99]), 12), (lambda m: torch.Size((m.a, 1))[0] > 3, True),
    (lambda m: m.a is not None and m.a != 3, True), (lambda m: PLACES[m.a - 12 : 12].shape[0], 12),
    (lambda m: torch.nn.functional.pad(PLACES, (m.a, 0)).shape[0], 32),
)  # fmt: skip


@pytest.mark.parametrize(("use", "value"), SUMS)
def test_sums_leave_an_integer_free(use: Any, value: Any) -> None:
    assert made_of(use) == (value, True)


@pytest.mark.parametrize(("use", "value"), OTHERS)
def test_all_else_does_not(use: Any, value: Any) -> None:
    assert made_of(use) == (value, False)


def test_what_one_capture_has_seen_holds_for_later_ones() -> None:
    module = nn.Module()
    module.a = 1
    counting.note(module, "a")
    uses: list[tuple[Any, bool]] = [(lambda: module.a + 1, True), (lambda: module.a > 1, False)]
    for use, is_free in [*uses, (lambda: module.a, False)]:
        counts = counting.Counts()
        with watching(counts, [module]):
            use()
        assert bool(counts.sums) is is_free


# ---- vectors -----------------------------------------------------------------------------------------------

LENGTHS = (None, SEGMENT)


def test_integers_that_move_together_are_tied() -> None:
    ((corners, found),) = counted([(2, 0, 0, 0)], (2, 0, 12, 4), LENGTHS)
    assert corners == [(2, 0, 12, 4), (2, 0, 0, 0)]
    assert found == Counted({"K": (3,)}, frozenset({"K"}), {2: ("K", 3, 0)})


def test_equal_integers_are_one() -> None:
    ((_, found),) = counted([(2, 0, 8, 8)], (2, 0, 12, 12), LENGTHS)
    assert found == Counted({"K": (2, 3)}, frozenset({"K"}), {})


def test_integers_that_move_apart_need_a_vector_each() -> None:
    known = [(2, 1, 0, 0), (2, 1, 13, 5)]
    assert not list(counted(known[1:], (2, 1, 20, 9), LENGTHS))
    ((corners, found),) = counted(known, (2, 1, 20, 9), LENGTHS)
    assert set(corners) == {*known, (2, 1, 20, 9)}
    assert found.counts == {"K", "K1"} and not found.ties


def test_sizes_and_integers_at_once() -> None:
    known = [(2, 1, 0), (2, 2, 13), (3, 1, 27)]
    found = {len(corners): one for corners, one in counted(known, (2, 1, 40), LENGTHS)}
    assert found[2].columns == {"K": (2,)}
    assert found[3].columns == {"R": (1,), "K": (2,)} and found[3].counts == {"K"}


def test_nothing_moves() -> None:
    assert not list(counted([(3, 1, 7)], (2, 1, 7), LENGTHS))
