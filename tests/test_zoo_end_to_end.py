"""Other people's recurrences through the whole compiler: equal numbers, the offsets stated, refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from toys import assert_same
from zoo.others import ZOO, ZooEntry

import rmtcompile
from rmtcompile.errors import CaptureError, RerollError, UnsupportedError
from rmtcompile.schedule import Offset

pytestmark = pytest.mark.filterwarnings("ignore::rmtcompile.SequentialScheduleWarning")

SEGMENTS = (3, 1, 6)

THROUGH: dict[str, frozenset[Offset]] = {
    "compressed_older": frozenset({(0, 1), (1, 0)}),
    "skip_connections": frozenset({(0, 1), (1, 0)}),
}
"""Where a value passes on its way through glue of a cell between the two that the entry names."""

LIMITS: dict[str, str] = {}
"""What the compiler refuses although a compiler could do it: the reason, by name."""


def supported() -> list[Any]:
    found = []
    for name in (name for name, entry in ZOO.items() if not entry.refused):
        reason = LIMITS.get(name)
        marks = [pytest.mark.xfail(strict=True, reason=reason, raises=UnsupportedError)] if reason else []
        found.append(pytest.param(name, marks=marks))
    return found


def twins(entry: ZooEntry) -> tuple[Any, Any]:
    model = entry.build()
    return model, copy.deepcopy(model) if isinstance(model, nn.Module) else model


def first(entry: ZooEntry, fast: Any) -> frozenset[Offset]:
    return frozenset(offset for offset in fast.compiled.program.offsets if abs(offset[1]) < entry.n_layers)


@pytest.mark.parametrize("name", supported())
@torch.no_grad()
def test_equal_for_any_number_of_segments(name: str) -> None:
    entry = ZOO[name]
    model, twin = twins(entry)
    fast = rmtcompile.optimize(twin)
    for segments in SEGMENTS:
        (x,) = entry.inputs(2, segments)
        assert_same(model(x), fast(x))
        if isinstance(model, nn.Module):
            assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))
    schedule = fast.schedule
    schedule.verify()
    assert schedule.n_layers == entry.n_layers
    assert first(entry, fast) == THROUGH.get(name, entry.offsets)
    assert (schedule.width > 1) == entry.parallel
    if entry.skew is not None and name not in THROUGH:
        assert schedule.alpha == entry.skew
        widest = math.ceil(entry.n_layers / schedule.alpha) if schedule.alpha else schedule.n_segments
        assert schedule.width == min(schedule.n_segments, widest)


@pytest.mark.parametrize("name", ["named_outputs"])
@torch.no_grad()
def test_last_segment_may_be_shorter(name: str) -> None:
    entry = ZOO[name]
    model, twin = twins(entry)
    fast = rmtcompile.optimize(twin)
    for length in (4 * entry.segment - 1, entry.segment - 1):
        x = entry.inputs(2, 4)[0][:, :length]
        assert_same(model(x), fast(x))


@torch.no_grad()
def test_the_skew_is_printed() -> None:
    fast = rmtcompile.optimize(ZOO["skewed"].build()).prepare(*ZOO["skewed"].inputs(1, 4))
    assert "(1,-2)" in str(fast.schedule).replace(" ", "")
    assert "3 * s + l" in fast.code


@pytest.mark.parametrize("name", ["parallel_rmt", "gru_residual", "named_outputs"])
def test_gradients(name: str) -> None:
    entry = ZOO[name]
    model, twin = twins(entry)
    fast = rmtcompile.optimize(twin)
    (x,) = entry.inputs(2, 5)
    for run in (model, fast):
        sum(t.square().sum() for t in torch.utils._pytree.tree_leaves(run(x))).backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()], 1e-9)


@torch.no_grad()
def test_stacked_lstm_cells_against_the_fused_lstm() -> None:
    entry = ZOO["lstm_layer_major"]
    model = entry.build()
    lstm = nn.LSTM(8, 8, entry.n_layers, batch_first=True).double()
    for l, cell in enumerate(model.cells):
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(lstm, f"{kind}_l{l}").copy_(getattr(cell, kind))
    (x,) = entry.inputs(2, 9)
    assert_same(model.out(lstm(x)[0]), rmtcompile.optimize(model)(x))


@torch.no_grad()
def test_stacked_gru_cells_against_the_fused_gru() -> None:
    entry = ZOO["gru_time_major"]
    model = entry.build()
    gru = nn.GRU(8, 8, entry.n_layers, batch_first=True).double()
    for l, cell in enumerate(model.cells):
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(gru, f"{kind}_l{l}").copy_(getattr(cell, kind))
    (x,) = entry.inputs(2, 9)
    assert_same(model.out(gru(x)[0]), rmtcompile.optimize(model)(x))


@torch.no_grad()
def test_a_branch_on_values_is_refused() -> None:
    entry = ZOO["data_dependent"]
    with pytest.raises(CaptureError) as caught:
        rmtcompile.optimize(entry.build())(*entry.inputs(1, 3))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("the forward depends on the values of a tensor")
    assert "traps.py:" in lines[1] and "if x.sum() > 0:" in lines[1]
    assert "help: decide it from shapes or Python values" in lines[2]


@torch.no_grad()
def test_a_constant_of_the_segment_follows_no_rule() -> None:
    entry = ZOO["running_mean"]
    model = entry.build()
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for segments in (3, 8):
        assert_same(model(*entry.inputs(1, segments)), fast(*entry.inputs(1, segments)))
    with pytest.raises(RerollError) as caught:
        fast.run(*entry.inputs(1, 3))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("a constant in layer 0 changes from segment to segment: ")
    assert "mul" in lines[1] and "memories.py:" in lines[1] and "memories.py:" in lines[2]
    assert lines[3].startswith("  help: make a table before the segments and index it")


class Mean(nn.Module):
    """A mean over all segments so far, with its weights from a table or from a counter."""

    def __init__(self, table: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.table = table

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = x.split(2, 1)
        memory = [x.new_zeros(x.shape[0], 4) for _ in self.layers]
        table, count = 1 / torch.arange(1, len(pieces) + 1, dtype=x.dtype), x.new_zeros(())
        out = []
        for s, h in enumerate(pieces):
            count = count + 1
            for l, layer in enumerate(self.layers):
                h = torch.tanh(layer(h + memory[l][:, None]))
                weight = table[s] if self.table else 1 / count
                memory[l] = memory[l] + (h.mean(1) - memory[l]) * weight
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize("table", [True, False])
@torch.no_grad()
def test_what_helps_against_constants(table: bool) -> None:
    model = Mean(table).double()
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for segments in (6, 2, 11):
        x = torch.randn(2, 2 * segments, 4, dtype=torch.float64)
        assert_same(model(x), fast(x))
    assert (fast.captures, fast.schedule.width) == (1, 3)


@torch.no_grad()
def test_no_parallelism_is_said() -> None:
    entry = ZOO["classic_rmt"]
    model = entry.build()
    with pytest.warns(rmtcompile.SequentialScheduleWarning) as caught:
        result = rmtcompile.optimize(copy.deepcopy(model))(*entry.inputs(1, 3))
    message = str(caught[0].message)
    assert "no two cells can run together" in message
    assert "offset (1, -3)" in message
    assert "memories.py:" in message
    assert_same(model(*entry.inputs(1, 3)), result)
    with pytest.raises(UnsupportedError, match="plan='auto'"):
        rmtcompile.optimize(model, plan="diagonal")(*entry.inputs(1, 3))
