"""alpha = 0: all segments of a layer at once, with weights that they share; emit/rows.py, runtime/rows.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, Layer, Toy, assert_equal_runs, assert_same, features, made
from zoo.memories import TransformerXL
from zoo.others import ZOO

import rmtcompile
from rmtcompile.ir.program import Feed, Lane
from rmtcompile.passes.grid import wavefront
from rmtcompile.runtime.rows import RowLane, RowRun, RowStore, RowWindow


class TwoKinds(nn.Module):
    """Layers that read what layers below gave one and two segments before, in turn with layers that know no
    segment."""

    def __init__(self, n_layers: int = 4, d: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(d) if i % 2 else nn.Linear(d, d) for i in range(n_layers))

    def forward(self, x: Tensor) -> Tensor:
        zero = x.new_zeros(x.shape[0], x.shape[2])
        given: dict[tuple[int, int], Tensor] = {}
        out = []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            for l, layer in enumerate(self.layers):
                if isinstance(layer, Layer):
                    older = given.get((s - 2, l - 1), zero)
                    h, _ = layer(h + older[:, None], given.get((s - 1, l - 1), zero))
                else:
                    h = torch.tanh(layer(h))
                given[s, l] = h[:, -1]
            out.append(h)
        return torch.cat(out, 1)


class Total(nn.Module):
    """Gives one sum over all segments, so that nothing has to be kept of any."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Toy(3).layers

    def forward(self, x: Tensor) -> Tensor:
        below = [x.new_zeros(x.shape[0], x.shape[2])] * (len(self.layers) + 1)
        total = x.new_zeros(x.shape[0], x.shape[2])
        for h in x.split(SEGMENT, 1):
            given = list(below)
            for l, layer in enumerate(self.layers):
                h, given[l + 1] = layer(h, below[l])
            below, total = given, total + h.sum(1)
        return total


MODELS: dict[str, Callable[[], nn.Module]] = {
    "up": lambda: Toy(3, back=1, up=1),
    "older": lambda: Toy(4, back=2, up=2),
    "two_kinds": TwoKinds,
    "one_layer": lambda: Toy(1, back=1, up=1),
    "total": Total,
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most as many segments at once as there are layers."""
    monkeypatch.setattr(wavefront, "BLOCK", 1)


@pytest.mark.parametrize("name", MODELS)
def test_equal_for_any_number_of_segments(name: str) -> None:
    model = made(MODELS[name])
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(segments) for segments in (4, 1, 2, 3, 9)])
    assert (fast.captures, fast.schedule.alpha) == (1, 0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("small_blocks")
def test_equal_block_by_block(name: str) -> None:
    model = made(MODELS[name])
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(segments) for segments in (3, 7, 12)])
    schedule = fast.schedule
    schedule.verify()
    assert schedule.width == schedule.block == schedule.n_layers
    assert f"{schedule.n_layers} * (s // {schedule.block})" in str(schedule)


@torch.no_grad()
def test_transformer_xl_runs_a_level_a_layer() -> None:
    entry = ZOO["transformer_xl"]
    model = entry.build()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    fast = rmtcompile.optimize(model)
    (x,) = entry.inputs(2, 6)
    expected = model(x)
    assert_same(expected, fast(x))
    code = fast.code
    assert fast.schedule.widths == (6,) * 4
    assert len(set(fast.schedule.layer_kinds)) == 1, "the top layer's unread state is no kind of its own"
    assert str(fast.schedule).splitlines()[0].endswith("level = l")
    assert "for l in range(4):" in code and "bmm" not in code
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before, "a weight was stacked"
    assert not fast._last[0].executor.stacks.stacks
    fast(entry.inputs(2, 11)[0])
    assert fast.code == code and fast.captures == 1


def test_one_layer_without_carry_is_one_call() -> None:
    fast = rmtcompile.optimize(made(MODELS["one_layer"]))
    assert_equal_runs(fast.model, fast, [features(5)])
    assert (fast.schedule.n_levels, fast.schedule.width) == (1, 5)


@torch.no_grad()
def test_a_short_last_segment_is_a_call_of_its_own() -> None:
    model = made(lambda: TransformerXL(n_layers=3))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for length in (15, 4, 3, 23):
        ids = torch.arange(2 * length).reshape(2, length) % 11
        assert_same(model(ids), fast(ids))
    assert "last" in fast.code


def test_gradients_reach_the_parameters() -> None:
    for name in ("transformer_xl", "no_carry"):
        entry = ZOO[name]
        model = entry.build()
        twin = copy.deepcopy(model)
        (x,) = entry.inputs(2, 5)
        for run in (model, rmtcompile.optimize(twin)):
            run(x).square().sum().backward()
        assert_same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()], 1e-9)


@pytest.mark.usefixtures("small_blocks")
def test_gradients_pass_from_block_to_block() -> None:
    model = made(MODELS["up"])
    twin = copy.deepcopy(model)
    for run in (model, rmtcompile.optimize(twin)):
        run(features(8)).square().sum().backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()], 1e-9)


def test_weights_changed_since_are_seen() -> None:
    model = made(MODELS["up"])
    fast = rmtcompile.optimize(model)
    assert_equal_runs(model, fast, [features(4)])
    with torch.no_grad():
        model.layers[1].mix.weight.mul_(2)
    model.layers[2].mix.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64))
    assert_equal_runs(model, fast, [features(4)])
    assert fast.captures == 1


def test_sequential_is_still_sequential() -> None:
    model = made(MODELS["up"])
    fast = rmtcompile.optimize(copy.deepcopy(model), plan="sequential")
    assert_equal_runs(model, fast, [features(4)])
    assert fast.schedule.width == 1


def test_compiled_forms_are_few() -> None:
    """One segment, a full block, the first length, and one form for every other."""
    compiled: list[int] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(1)
        return module.forward

    model = made(MODELS["up"])
    fast = rmtcompile.optimize(copy.deepcopy(model), backend=backend)
    assert_equal_runs(model, fast, [features(4), features(5)])
    count = len(compiled)
    assert_equal_runs(model, fast, [features(segments) for segments in (4, 6, 7, 11)])
    assert 0 < count == len(compiled)


@torch.no_grad()
def test_it_can_be_looked_at(tmp_path: Any) -> None:
    fast = rmtcompile.optimize(made(MODELS["two_kinds"]))
    fast(features(5))
    profile = fast.profile(features(5))
    assert len(profile.level_us) == 4
    text = str(fast.explain())
    assert "level of cell (s, l) = l" in text
    fast.dump(tmp_path / "dump")
    fast.view(tmp_path / "view.html")
    assert "not stacked" in "".join(p.read_text() for p in (tmp_path / "dump").glob("*.txt"))


LANE = Lane("x", (0, 1), None, (2,), torch.float64, "cpu", (), (Feed("g", "out", (1, 1), (0,)),))


def ran(store: RowStore, segments: range) -> Tensor:
    values = torch.arange(len(segments) * 2.0).reshape(-1, 2).double()
    store.put(RowWindow("g", 0, tuple(segments), (0,) * len(segments)), {"out": values, "unread": values})
    return values


def test_a_lane_is_a_slice_of_what_the_layer_below_gave() -> None:
    store = RowStore([LANE])
    values = ran(store, range(4))
    read = RowLane(LANE, store).read(1, (1, 2, 3))
    assert torch.equal(read, values[:3]) and read.data_ptr() == values.data_ptr()


def test_a_lane_takes_first_values_from_outside() -> None:
    store = RowStore([LANE])
    values = ran(store, range(3))
    lane = RowLane(LANE, store)
    lane.fill(0, torch.full((1,), 7.0).double())
    first = torch.full((1, 2), 7.0).double()
    assert torch.equal(lane.read(1, (0, 1, 2)), torch.cat([first, values[:2]]))


def test_between_blocks_only_what_is_read_again_stays() -> None:
    store = RowStore([LANE])
    ran(store, range(4))
    store.forget(0, range(4))
    assert len(store.rows["g", "out", 0]) == 4, "layer 1 has not run"
    store.forget(1, range(4))
    ((segment, (kept, row)),) = store.rows["g", "out", 0].items()
    assert (segment, row, kept.untyped_storage().nbytes()) == (3, 0, 16)
    assert store.rows.keys() == {("g", "out", 0)}


@pytest.mark.usefixtures("small_blocks")
@torch.no_grad()
def test_memory_does_not_grow_with_the_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    def forget(store: RowStore, layer: int, block: range, original: Any = RowStore.forget) -> None:
        original(store, layer, block)
        storages = {v.untyped_storage() for rows in store.rows.values() for v, _ in rows.values()}
        held.append(sum(storage.nbytes() for storage in storages))

    monkeypatch.setattr(RowStore, "forget", forget)
    runs: list[RowRun] = []
    monkeypatch.setattr(RowRun, "begin", lambda run, block: runs.append(run) or setattr(run, "block", block))
    model = made(MODELS["total"])
    fast = rmtcompile.optimize(copy.deepcopy(model))
    peaks = []
    for segments in (6, 24):
        held.clear()
        assert_equal_runs(model, fast, [features(segments)])
        peaks.append(max(held))
        assert max(len(tap.values) for tap in runs[-1].taps.values()) <= 6
    assert peaks[0] == peaks[1]


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 200))
def test_never_more_levels_than_the_diagonals(n_layers: int, n_segments: int) -> None:
    block = wavefront.block_size(n_layers)
    rows = wavefront.wavefront({(0, 1), (1, 1)}, n_layers, n_segments, block=block)
    assert rows.alpha == 0
    assert rows.n_levels == -(-n_segments // block) * n_layers <= n_segments + n_layers - 1
    assert rows.width == min(n_segments, block)
    assert type(rows).from_json(rows.to_json()) == rows


def test_blocks_need_alpha_zero() -> None:
    with pytest.raises(ValueError, match="alpha = 0"):
        wavefront.wavefront({(0, 1)}, 3, 4, alpha=1, block=2)
