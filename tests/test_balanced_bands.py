"""runtime/bands/balance.py, and `balanced` in passes/bands.py: layers are divided by what they cost."""

from __future__ import annotations

import copy
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ranks import pytestmark as needs_gloo
from test_ranks import ranks
from toys import SEGMENT, Toy, Uneven, assert_equal_runs, assert_same, features, made

import rmtcompile
from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.bands import LayerCosts
from rmtcompile.passes.bands import balanced, even
from rmtcompile.runtime.bands import balance

D = 16
NARROW, WIDE = 128, 30 * 128


def banded(model: Any, count: int, **options: Any) -> Any:
    return rmtcompile.optimize(copy.deepcopy(model), devices=["cpu"] * count, **options)


def sizes(fast: Any) -> list[int]:
    return [len(band.layers) for band in fast._last[0].executor.cut.bands]


def text(fast: Any) -> str:
    return "\n".join(fast._last[0].executor.bands)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was timed, by its work instead of a clock: seconds, one an entry."""
    found: list[float] = []
    region = balance.Region.on

    def seconds(run: Any, device: torch.device) -> float:
        run()
        found.append(float(flops.pop()))
        return found[-1]

    def on(self: balance.Region, home: torch.device, device: torch.device) -> Any:
        if device.type != "meta":
            flops.append(1000 + self.work(home)[0])
        return region(self, home, device)

    flops: list[int] = []
    monkeypatch.setattr(balance.Region, "on", on)
    monkeypatch.setattr(balance, "seconds", seconds)
    return found


# ---- the division ------------------------------------------------------------------------------------------


def largest(costs: list[float], borders: tuple[int, ...], prologue: float, epilogue: float) -> float:
    bands = [sum(costs[a:b]) for a, b in pairwise((0, *borders, len(costs)))]
    bands[0] += prologue
    bands[-1] += epilogue
    return max(bands)


COSTS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(COSTS, st.integers(1, 8), st.integers(0, 20), st.integers(0, 20))
def test_the_largest_band_is_the_smallest_that_there_is(
    costs: list[float], count: int, prologue: float, epilogue: float
) -> None:
    count = min(count, len(costs))
    bands = balanced(costs, count, prologue, epilogue)
    assert [layer for band in bands for layer in band] == list(range(len(costs))) and all(map(len, bands))
    every = combinations(range(1, len(costs)), count - 1)
    best = min(largest(costs, borders, prologue, epilogue) for borders in every)
    assert largest(costs, tuple(band.start for band in bands[1:]), prologue, epilogue) == best


@given(st.integers(1, 40), st.integers(1, 8), st.floats(1e-7, 10))
def test_equal_layers_are_divided_by_number(n_layers: int, count: int, cost: float) -> None:
    count = min(count, n_layers)
    assert balanced([cost] * n_layers, count) == even(n_layers, count)


def test_slack_prefers_equal_numbers() -> None:
    costs = [1.0] * 5 + [1.01, 1.0, 1.0]
    assert balanced([*costs, 1.0], 2) == (range(5), range(5, 9))
    assert balanced([*costs, 1.0], 2, slack=0.02) == even(9, 2) == (range(4), range(4, 9))


# ---- what is measured --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_layers_of_another_kind_weigh_more(count: int) -> None:
    """Measured: two layers with feed-forward networks thirty times as wide are not in one band with many."""
    model = made(lambda: Uneven([NARROW] * 6 + [WIDE] * 2, d=64))
    fast = banded(model, count)
    assert_equal_runs(model, fast, [features(s, d=64) for s in (4, 1, 2, 9)])
    assert sizes(fast) != [len(band) for band in even(8, count)] and sizes(fast)[-1] < 8 // count
    assert_same(model(x := features(5, d=64)[:, :-1]), fast(x))
    for run in (model, fast):
        run(features(5, d=64)).square().sum().backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in fast.parameters()], 1e-9)


@torch.no_grad()
def test_borders_follow_the_costs_of_kinds(timed: list[float]) -> None:
    model = made(lambda: Uneven([NARROW] * 2 + [WIDE] + [NARROW] * 5))
    fast = banded(model, 3)
    assert_same(model(features(4, d=D)), fast(features(4, d=D)))
    assert sizes(fast) == [2, 1, 5] and len(timed) == 3  # two kinds of layers, and what comes after them
    assert "8 layers in 3 bands, balanced by measured cost" in text(fast)
    assert "1  layers 2 on cpu: " in text(fast) and " % of the cost; to 2: " in text(fast)
    assert "a segment takes, measured: kind0 " in text(fast) and " us a layer, prologue 0 us" in text(fast)
    assert text(fast).splitlines()[0] in str(fast.explain())


@torch.no_grad()
def test_a_head_a_segment_moves_the_last_border(timed: list[float]) -> None:
    costs = {}
    for head in (0, 4 * NARROW, 24 * NARROW):
        model = made(lambda head=head: Uneven([NARROW] * 6, head))
        fast = banded(model, 2)
        assert_same(model(features(4, d=D)), fast(features(4, d=D)))
        costs[head] = sizes(fast)
    assert costs == {0: [3, 3], 4 * NARROW: [4, 2], 24 * NARROW: [5, 1]}
    assert len(timed) == 4  # a layer and a head, twice


class Looked(Uneven):
    """Looks its tokens up."""

    def __init__(self) -> None:
        super().__init__([NARROW] * 5)
        self.table = torch.nn.Embedding(1000, D)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(self.table(ids))


@pytest.mark.parametrize("build", [lambda: Toy(5, d=D), Looked])
@torch.no_grad()
def test_nothing_is_measured_of_layers_of_one_kind(build: Any, timed: list[float]) -> None:
    model = made(build)
    fast = banded(model, 2)
    x = torch.arange(8 * SEGMENT).reshape(2, -1) if build is Looked else features(4, d=D)
    assert_same(model(x), fast(x))
    assert sizes(fast) == [2, 3] and not timed
    assert "5 layers in 2 bands, divided by their number" in text(fast)


@torch.no_grad()
def test_programs_of_other_sizes_are_divided_as_the_first_one(timed: list[float]) -> None:
    model = made(lambda: Uneven([NARROW] * 5 + [WIDE]))
    fast = banded(model, 2)
    executors = []
    for batch in range(1, 6):
        x = features(4, batch, d=D)
        assert_same(model(x), fast(x))
        executors.append(fast._last[0].executor)
        is_measured = [executor._like is None for executor in executors]
        assert 0 < len(timed) <= 3 * sum(is_measured)  # rules keep the division
    assert len({id(executor) for executor in executors}) == 5 and is_measured[-2:] == [False, False]
    assert {executor.cut.division.layers for executor in executors} == {(range(5), range(5, 6))}


@torch.no_grad()
def test_measuring_leaves_no_trace() -> None:
    model = made(lambda: Uneven([NARROW, NARROW, WIDE]))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    fast = rmtcompile.optimize(model, devices=["cpu", "cpu"])
    fast(features(4, d=D))
    assert fast._last[0].executor.cut.division.costs is not None
    assert torch.equal(state, torch.get_rng_state())
    assert_same(before, dict(model.state_dict()))


@torch.no_grad()
def test_what_cannot_be_measured_is_divided_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(run: Any, device: torch.device) -> float:
        raise RuntimeError("no such values\nin this place")

    monkeypatch.setattr(balance, "seconds", seconds)
    model = made(lambda: Uneven([NARROW] * 5 + [WIDE]))
    fast = banded(model, 2)
    assert_same(model(features(4, d=D)), fast(features(4, d=D)))
    assert sizes(fast) == [3, 3]
    assert "by their number: a cell by itself does not run (RuntimeError: no such values)" in text(fast)


@pytest.mark.parametrize(
    "like",
    [
        torch.ones(3, 4, dtype=torch.float64).T, torch.ones(4, dtype=torch.bfloat16).expand(3, 4),
        torch.ones(2, 3, dtype=torch.long), torch.ones((), dtype=torch.bool), torch.ones(0, 3),
        torch.ones(2, 6, dtype=torch.complex64)[:, ::2],
    ],
)  # fmt: skip
def test_made_up_values(like: torch.Tensor) -> None:
    value = balance._made_up(like, like.device)
    assert (value.shape, value.stride(), value.dtype) == (like.shape, like.stride(), like.dtype)
    assert value.isfinite().all() and value.numel() == like.numel()


def test_shares_of_bands() -> None:
    costs = LayerCosts({"a": 1.0, "b": 3.0}, ("a", "", "b"), prologue=1.0, epilogue=5.0)
    assert costs.layers == (1.0, 0.0, 3.0)
    assert [costs.share(range(2)), costs.share(range(2, 3)), costs.share(range(3))] == [0.2, 0.8, 1.0]


# ---- as was asked ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_layers_by_device(timed: list[float]) -> None:
    model = made(lambda: Uneven([NARROW] * 5 + [WIDE]))
    fast = rmtcompile.optimize(copy.deepcopy(model), devices={"cpu": 2, "cpu:0": 4})
    assert_same(model(features(4, d=D)), fast(features(4, d=D)))
    assert sizes(fast) == [2, 4] and not timed and "divided as was asked" in text(fast)


def test_other_numbers_of_layers_are_refused() -> None:
    fast = rmtcompile.optimize(made(Toy), devices={"cpu": 1, "cpu:0": 4})
    with pytest.raises(UnsupportedError, match="devices share out 5 layers, and there are 3"):
        fast(features(4))


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ({}, "layers by device"),
        ({"nowhere": 2}, "which is no device"),
        ({"cpu": 0}, "a positive number of layers"),
        ({"cpu": 2, "cpu:0": True}, "a positive number of layers"),
        ({"cpu": 2.5}, "a positive number of layers"),
    ],
)
def test_odd_numbers_of_layers_are_refused(devices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rmtcompile.optimize(made(Toy), devices=devices)


# ---- several processes -------------------------------------------------------------------------------------


@needs_gloo
def test_ranks_divide_alike(tmp_path: Path) -> None:
    said = ranks(2, "balanced other_programs", tmp_path)
    assert said[0]["balanced"] == said[1]["balanced"]
    layers, costs = said[0]["balanced"]
    assert layers[0] > layers[1] and max(costs[:6]) < min(costs[6:])
    for one in said:
        kind, message = one["other_programs"]
        assert kind == "UnsupportedError" and "rank 1 is about to divide layers" in message
