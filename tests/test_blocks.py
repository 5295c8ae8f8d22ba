"""runtime/blocks.py: recorded blocks of levels serve any length. Recordings are played by hand here; those of
CUDA are tested in test_cuda.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import assert_same
from zoo.others import ZOO

import rmtcompile
from rmtcompile.results import value_of
from rmtcompile.runtime.blocks import LONGEST, Blocks, blocks_of, steady_lengths
from rmtcompile.runtime.engine import Engine
from rmtcompile.runtime.execute import Executor
from rmtcompile.schedule import Grid
from rmtcompile.verify import tensors_of

pytestmark = pytest.mark.filterwarnings("ignore::rmtcompile.SequentialScheduleWarning")


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 60), st.integers(0, 3), st.integers(0, 2))
def test_blocks_cut_a_run_in_order(n_layers: int, skew: int, segments: int, head: int, tail: int) -> None:
    grid = Grid(n_layers, segments, min(skew, n_layers), 0)
    blocks = blocks_of(grid, head, tail)
    assert [t for block in blocks for t in block.levels] == list(range(grid.n_levels))
    for block in blocks:
        entered = [s for t in range(block.levels.start) if (s := grid.entering(t)) is not None]
        assert block.base == len(entered) or block.levels.start >= grid.skew * segments
    ordinary = set(range(head, segments - tail))
    for block in blocks:
        if block.key[0] == "steady":
            alive = {s for t in block.levels for s, _ in grid.cells(t)}
            assert alive <= ordinary
            assert len(block.levels) == block.key[1] * grid.skew <= max(LONGEST, grid.skew)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 3), st.integers(0, 2))
def test_blocks_of_one_name_do_the_same(n_layers: int, skew: int, head: int, tail: int) -> None:
    """Which cells run, by segments counted from the base, is the same for all lengths."""
    seen: dict[Any, Any] = {}
    for segments in range(1, 50):
        grid = Grid(n_layers, segments, min(skew, n_layers), 0)
        for block in blocks_of(grid, head, tail):
            cells = [[(s - block.base, layer) for s, layer in grid.cells(t)] for t in block.levels]
            from_end = segments - block.base if block.key[0] in ("tail", "whole") else None
            assert seen.setdefault(block.key, (cells, from_end)) == (cells, from_end)
    assert {length for kind, length in seen if kind == "steady"} <= set(steady_lengths(min(skew, n_layers)))


@dataclass
class Played:
    """A recording that is made again at each replay."""

    body: Callable[[], list[torch.Tensor]]
    values: list[torch.Tensor]

    def replay(self) -> None:
        for place, value in zip(self.values, self.body(), strict=True):
            place.copy_(value)


class Player:
    """Records by calling; values get memory of their own, as they have on a device."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, body: Callable[[], list[torch.Tensor]]) -> tuple[Any, list[torch.Tensor]]:
        self.recorded += 1
        values = [x.clone() for x in body()]
        return Played(body, values), values


def blocks_for(fast: Any, x: torch.Tensor) -> tuple[Executor, Blocks]:
    """Blocks of the program that has run."""
    executor = fast._last[0].executor
    compiled = executor.compiled
    engine = Engine(executor.program, "eager", keeps_buffers=True)
    leaves = executor._leaves()
    blocks = Blocks(
        executor.program,
        compiled.emitted.borders,
        compiled.namespace,
        engine,
        Player(),
        leaves,
        executor.stacks.current,
    )
    inputs = executor._resized(blocks.example_segments, [x])
    blocks.begin(dict(zip(compiled.input_names, inputs, strict=True)))
    blocks.record_all()
    return executor, blocks


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if not entry.refused])
@torch.no_grad()
def test_blocks_give_what_the_model_gives(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin)
    try:
        fast(*entry.inputs(2, 4))
    except rmtcompile.UnsupportedError:
        pytest.skip("refused")
    program = fast.compiled.program
    if not program.alpha or fast.compiled.rolled.fixed is not None:
        pytest.skip("no levels")
    if fast.compiled.emitted.borders.obstacle:
        pytest.skip(fast.compiled.emitted.borders.obstacle)
    executor, blocks = blocks_for(fast, entry.inputs(2, 4)[0])
    made = blocks.device.recorded  # type: ignore[attr-defined]
    for segments in (1, 3, program.n_layers + 1, 12, 37):
        (x,) = entry.inputs(2, segments)
        if segments < min(fast.compiled.rolled.proved_on):
            continue
        inputs = dict(zip(fast.compiled.input_names, tensors_of((x,), {}), strict=True))
        outputs = blocks.run(segments, inputs)
        if outputs is None:
            assert not fast.compiled.emitted.borders.setup_is_fixed
            continue
        expected = value_of(fast.compiled.result, executor.run(segments, [x]), segments)
        assert_same(expected, value_of(fast.compiled.result, outputs, segments))
    assert blocks.device.recorded == made  # type: ignore[attr-defined]
