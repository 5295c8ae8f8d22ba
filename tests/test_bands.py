"""passes/bands.py and runtime/bands/: programs cut by layers, each band on a device of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_blocks import Player
from test_end_to_end import CELL, armt, ids
from torch import Tensor, nn
from toys import SEGMENT, AttributeState, Toy, assert_equal_runs, assert_same, features, made
from zoo.others import ZOO

import rmtcompile
from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.bands import Division
from rmtcompile.passes.bands import cut, even
from rmtcompile.runtime.bands import copies
from rmtcompile.runtime.bands.copies import Copies, Way
from rmtcompile.runtime.bands.execute import BandedExecutor
from rmtcompile.runtime.bands.traffic import sent_on
from rmtcompile.schedule import Grid


def banded(model: Any, count: int, **options: Any) -> Any:
    return rmtcompile.optimize(copy.deepcopy(model), devices=["cpu"] * count, **options)


# ---- the cut -----------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 8))
def test_even_bands_hold_all_layers(n_layers: int, count: int) -> None:
    count = min(count, n_layers)
    bands = even(n_layers, count)
    assert [layer for band in bands for layer in band] == list(range(n_layers))
    assert {len(band) for band in bands} <= {n_layers // count, -(-n_layers // count)}


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 8), st.integers(0, 3), st.integers(1, 4))
def test_bands_of_a_grid_run_each_cell_once(
    n_layers: int, skew: int, segments: int, first: int, count: int
) -> None:
    segments += first
    whole = Grid(n_layers, segments, skew, 0, first)
    parts = [Grid(n_layers, segments, skew, 0, first, band) for band in even(n_layers, min(count, n_layers))]
    for t in whole.levels:
        alive = [cell for part in reversed(parts) if t in part.levels for cell in part.cells(t)]
        assert tuple(alive) == whole.cells(t)
        assert [part.entering(t) for part in parts if part.entering(t) is not None] == [
            s for s in [whole.entering(t)] if s is not None
        ]
        assert [part.leaving(t) for part in parts if part.leaving(t) is not None] == [
            s for s in [whole.leaving(t)] if s is not None
        ]
    for part in parts:
        assert sum(map(len, part.phases)) == part.n_levels
        assert all(len(part.cells(t)) == len(part.cells(t + skew)) for t in list(part.phases.steady)[:-skew])
    assert all(a.levels.start <= b.levels.start for a, b in pairwise(parts))


def test_what_crosses_is_what_the_next_layer_reads() -> None:
    fast = rmtcompile.optimize(made(lambda: Toy(4))).prepare(features(4))
    program, readers = fast.compiled.program, fast.compiled.emitted.readers
    low, high = cut(program, readers, Division((range(2), range(2, 4)))).bands
    assert {(sent.layer, sent.place, sent.target) for sent in low.sends if not sent.is_tap} == {(1, 2, 1)}
    assert not high.sends
    assert [group.layers for band in (low, high) for group in band.program.groups] == [(0, 1), (2, 3)]
    for band in (low, high):
        assert all(set(lane.layers) <= set(band.layers) for lane in band.program.lanes)


def test_what_cannot_be_cut_is_refused_by_the_dependence_in_the_way() -> None:
    entry = ZOO["classic_rmt"]
    with pytest.raises(UnsupportedError) as caught, pytest.warns(rmtcompile.SequentialScheduleWarning):
        banded(entry.build(), 2)(*entry.inputs(1, 3))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("the layers cannot be cut into bands that work at the same time")
    assert lines[1].startswith("  offset (1, -3): prologue(s)") and "memories.py:" in lines[1]


def test_more_bands_than_layers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="3 layers cannot be cut into 4 bands"):
        banded(made(Toy), 4)(features(3))


class Dropping(Toy):
    """Drops what all segments read alike."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.nn.functional.dropout(x.new_ones(x.shape[0], SEGMENT, x.shape[2]), 0.5, True)
        return torch.cat([h * mask for h in super().forward(x).split(SEGMENT, 1)], 1)


def test_random_numbers_that_all_bands_read_are_refused() -> None:
    with pytest.raises(UnsupportedError) as caught:
        banded(made(Dropping), 2)(features(3))
    assert "each band would draw its own" in str(caught.value) and "test_bands.py:" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": []}, "devices must be"),
        ({"devices": "cpu"}, "devices must be"),
        ({"devices": ["nowhere"]}, "which is no device"),
        ({"devices": ["cuda:99"]}, "there is no device cuda:99"),
        ({"devices": ["meta"]}, "CPU or CUDA"),
        ({"devices": ["cpu"], "plan": "sequential"}, "one cell after the other"),
        ({"devices": ["cpu"], "recompute": 3}, "not computed again by blocks"),
    ],
)
def test_odd_devices_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rmtcompile.optimize(made(Toy), **options)


# ---- running -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@torch.no_grad()
def test_as_the_model_for_any_number_of_segments(count: int) -> None:
    model = made(lambda: Toy(4))
    assert_equal_runs(model, banded(model, count), [features(s) for s in (4, 1, 2, 3, 5, 9)])


@torch.no_grad()
def test_armt_with_a_ragged_end_and_other_batch_sizes() -> None:
    model = armt("llama", torch.float64, n_layers=4)
    fast = banded(model, 3)
    for batch, length in (
        (2, 4 * CELL),
        (2, 9 * CELL),
        (2, 4 * CELL - 3),
        (2, 5 * CELL - 1),
        (2, 2),
        (3, 2 * CELL),
    ):
        x = torch.randint(0, 32, (batch, length))
        assert_same(model(x), fast(x))


@pytest.mark.parametrize(("name", "count"), [("skewed", 2), ("hybrid", 4), ("no_carry", 2)])
@torch.no_grad()
def test_other_recurrences(name: str, count: int) -> None:
    """Values that go down, several kinds of layers, no carry at all."""
    entry = ZOO[name]
    model = entry.build()
    assert_equal_runs(model, banded(model, count), [entry.inputs(2, s)[0] for s in (3, 1, 6)])


@torch.no_grad()
def test_state_that_the_model_keeps() -> None:
    model = made(AttributeState)
    fast = banded(model, 2)
    for segments in (4, 2, 5):
        assert_same(model(features(segments)), fast(features(segments)))
        for mine, other in zip(model.layers, fast.layers, strict=True):
            assert (mine.first, mine.count) == (other.first, other.count)
            assert_same(mine.memory, other.memory)


@torch.no_grad()
def test_a_text_in_parts() -> None:
    model, x = made(lambda: Toy(4)), features(7)
    fast = banded(model, 3)
    state, got = None, x[:, :0]
    for a, b in ((0, 6), (6, 14), (14, 21)):
        pending = state.pending_tokens if state is not None else 0
        out, state = fast.run(x[:, a:b], state=state)
        got = torch.cat([got[:, : a - pending], out], 1)
    assert_same(model(x), got)
    assert_same(rmtcompile.optimize(model).run(x)[1].values, state.values)


@pytest.mark.parametrize("recompute", ["none", "level"])
@pytest.mark.parametrize("count", [2, 3])
def test_gradients(count: int, recompute: str) -> None:
    model = made(lambda: Toy(4))
    fast, x = banded(model, count, recompute=recompute), features(5)
    for run in (model, fast):
        run(x).square().sum().backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in fast.parameters()], 1e-9)


def test_what_is_said_of_bands(tmp_path: Path) -> None:
    fast = banded(made(lambda: Toy(4)), 2)
    with torch.no_grad():
        fast(features(4))
    text = str(fast.explain())
    assert "4 layers in 2 bands" in text and "0  layers 0..1 on cpu; to 1: " in text
    with pytest.raises(rmtcompile.RMTCompileError, match="bands have modules of their own"):
        fast.use(fast.dump(tmp_path)[-1])


@torch.no_grad()
def test_verify_compares_bands_with_the_model() -> None:
    fast = banded(made(lambda: Toy(4)), 3, verify=True)
    fast(features(5))
    assert fast.captures == 1


# ---- copies ------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every band is on a device that is not the model's, as far as copies are concerned."""
    monkeypatch.setattr(copies, "is_elsewhere", lambda value, home, device: True)
    monkeypatch.setattr(copies, "_to", lambda value, device: value.clone())


WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "in place": lambda p: p.mul_(2),
    "uncounted": lambda p: p.data.mul_(2),
    "replaced": lambda p: setattr(p, "data", p.data * 2),
}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_written_weights_are_copied_again(write: str) -> None:
    model = made(lambda: Toy(4))
    fast, x = banded(model, 2), features(5)
    assert_same(model(x), fast(x))
    kept = fast._last[0].executor.members[1].copies._copies
    before = {name: copied.value.data_ptr() for name, copied in kept.items()}
    assert before
    fast(x)
    assert before == {name: copied.value.data_ptr() for name, copied in kept.items()}
    for twin in (model, fast):
        WRITES[write](twin.layers[3].mix.weight)
    assert_same(model(x), fast(x))


def test_copies_are_made_once() -> None:
    here, there = torch.device("cpu"), torch.device("meta")
    kept, value = Copies(Way(here, there)), torch.ones(3, 2)
    first = kept.of("w", value, [value])
    assert first.device.type == "meta" and kept.of("w", value, [value]) is first
    assert Copies(Way(here, here)).of("w", value, [value]) is value


@pytest.mark.usefixtures("elsewhere")
def test_gradients_through_copies() -> None:
    model = made(lambda: Toy(4))
    fast, x = banded(model, 2), features(5)
    for run in (model, fast):
        run(x).square().sum().backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in fast.parameters()], 1e-9)


# ---- devices -----------------------------------------------------------------------------------------------


CARDS = [
    pytest.param(
        homes, devices,
        marks=pytest.mark.skipif(
            torch.cuda.device_count() < len(set(devices)), reason=f"needs {len(set(devices))} CUDA devices"
        ),
    )
    for homes, devices in (
        ("cuda:0", ["cuda:0", "cuda:0"]), ("cuda:0", ["cuda:0", "cuda:1"]), ("cpu", ["cuda:0", "cuda:1"]),
        ("cuda:1", ["cuda:0", "cuda:1", "cuda:0"]), ("cuda:0", ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
    )
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("home", "devices"), CARDS)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@torch.no_grad()
def test_cards(home: str, devices: list[str], backend: str) -> None:
    """Launched, recorded, replayed; a ragged end; written weights.

    Llama's norms are in float32; Inductor and a CPU sum them in another order, and 33 segments amplify that.
    """
    tolerance = 1e-4 if backend == "inductor" or home == "cpu" else None
    model = armt("llama", torch.float64, n_layers=4).to(home)
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin, devices=devices, backend=backend)
    for segments in (5, 9, 5, 33, 9, 2, 2):
        x = ids(segments).to(home)
        assert_same(model(x), fast(x), tolerance)
    assert fast._last[0].executor.replays._bands, fast._last[0].executor.recorded
    for write in WRITES.values():
        for one in (model, twin):
            write(one.memory_cell.layers[3].W_mv.weight)
        for segments in (9, 9):
            x = ids(segments).to(home)
            assert_same(model(x), fast(x), tolerance)
    x = ids(6).to(home)[:, :-3]
    assert_same(model(x), fast(x), tolerance)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("home", "devices"), CARDS)
def test_gradients_on_cards(home: str, devices: list[str]) -> None:
    model = made(lambda: Toy(4)).to(home)
    fast = rmtcompile.optimize(copy.deepcopy(model), devices=devices, backend="eager")
    for run in (model, fast):
        run(features(5).to(home)).square().sum().backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in fast.parameters()], 1e-9)


@pytest.mark.parametrize("name", ["skewed", "hybrid", "skip_connections", "compressed_older"])
@torch.no_grad()
def test_traffic_is_known_beforehand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ZOO[name]
    fast = banded(entry.build(), 3)
    fast(*entry.inputs(2, 6))
    executor = fast._last[0].executor
    seen: list[Any] = []
    send = BandedExecutor.send

    def noting(self: Any, member: Any, run: Any, runs: Any) -> None:
        got = sorted(((m.sent, m.segment) for m in run.outgoing), key=str)
        assert got == sorted(sent_on(member.band, run.grid, run._now), key=str)
        seen.extend(got)
        send(self, member, run, runs)

    monkeypatch.setattr(BandedExecutor, "send", noting)
    for segments in (6, 2, 9):
        executor.run(segments, list(entry.inputs(2, segments)))
    assert seen


# ---- recordings, played by hand ----------------------------------------------------------------------------


def recorded(model: Any, count: int, x: Tensor) -> tuple[Any, list[Player]]:
    """A program in bands that has recorded its levels."""
    fast = banded(model, count)
    fast(x)
    executor = fast._last[0].executor
    players: list[Player] = []

    def device_for(_: torch.device) -> Player:
        players.append(Player())
        return players[-1]

    executor._use_graphs, executor._engine = True, None
    executor.replays.device_for = device_for
    executor.record([x])
    assert executor.replays._bands, str(executor.replays)
    return fast, players


RECORDED = (
    ("plain_function", 2), ("infini_attention", 3), ("skewed", 2), ("rolled_memories", 4), ("in_place", 2),
    ("compressed_older", 3), ("skip_connections", 5), ("hybrid", 2),
)  # fmt: skip


@pytest.mark.parametrize(("name", "count"), RECORDED)
@torch.no_grad()
def test_recorded_levels_serve_any_length(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ZOO[name]
    model = entry.build()
    fast, players = recorded(model, count, entry.inputs(2, 4)[0])
    executor = fast._last[0].executor
    before = [player.recorded for player in players]
    for band in executor.replays._bands.values():  # kinds of a long run, repeated and one by one
        for segments in (2 * band.example_segments + 6, 2 * band.example_segments + 9):
            grids = band.grids(segments)
            levels = grids[band.band.index].levels
            one_by_one = tuple(band._kind(grids, grids[band.band.index], level) for level in levels)
            assert band._all_kinds(segments) == one_by_one
    monkeypatch.setattr(executor, "launch", None)  # everything is replayed
    shortest = min(executor.compiled.rolled.proved_on)
    for segments in (shortest, shortest + 1, executor.program.n_layers + 2, 12, 37, 12):
        (x,) = entry.inputs(2, segments)
        assert_same(model(x), fast(x))
    assert [player.recorded for player in players] == before


@pytest.mark.usefixtures("elsewhere")
@torch.no_grad()
def test_recordings_see_written_weights() -> None:
    model, x = made(lambda: Toy(4)), features(6)
    fast, players = recorded(model, 2, x)
    for write in WRITES.values():
        for twin in (model, fast):
            write(twin.layers[3].mix.weight)
        for _ in range(2):
            assert_same(model(x), fast(x))
    assert len(players) >= 2


@torch.no_grad()
def test_recordings_with_state_that_the_model_keeps() -> None:
    model = made(AttributeState)
    fast, _ = recorded(model, 2, features(4))
    model(features(4))
    for segments in (4, 5, 9):
        assert_same(model(features(segments)), fast(features(segments)))
        assert_same(model.layers[2].memory, fast.layers[2].memory)
