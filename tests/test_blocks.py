"""runtime/blocks.py: recorded blocks of levels serve any length. Recordings are played by hand here; those of
CUDA are tested in test_cuda.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import Toy, assert_same, features, made
from zoo.others import ZOO

import rmtcompile
from rmtcompile.compiler.results import value_of
from rmtcompile.runtime import recorded
from rmtcompile.runtime.blocks import LONGEST, blocks_of, steady_lengths
from rmtcompile.runtime.engine import Engine
from rmtcompile.runtime.execute import Executor
from rmtcompile.runtime.recorded import RecordedBlocks
from rmtcompile.schedule import Grid

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


def blocks_for(
    fast: Any, x: torch.Tensor, player: Player | None = None, has_ends: bool = True
) -> tuple[Executor, RecordedBlocks]:
    """Blocks of the program that has run."""
    executor = fast._last[0].executor
    compiled = executor.compiled
    engine = Engine(executor.program, "eager", keeps_buffers=True)
    leaves = executor.held()
    blocks = RecordedBlocks(
        executor.program,
        compiled.emitted.borders,
        compiled.namespace,
        engine,
        player or Player(),
        leaves,
        executor.stacks.current,
        has_ends,
    )
    inputs = executor.resized(blocks.example_segments, [x])
    blocks.begin(dict(zip(compiled.input_names, inputs, strict=True)))
    blocks.record_all()
    return executor, blocks


RECORDED = (
    "infini_attention", "gru_time_major", "skewed", "stacked_memories", "rolled_memories", "in_place",
    "compressed_older", "plain_function",
)  # fmt: skip
"""Models of each kind: values that are the same for all segments or not, every skew, taps that blocks
hand on, state that starts with a value, lists over segments."""


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_blocks_give_what_runs_give(name: str) -> None:
    entry = ZOO[name]
    fast = rmtcompile.optimize(entry.build())
    fast(*entry.inputs(2, 4))
    assert not fast.compiled.emitted.borders.obstacle
    executor, blocks = blocks_for(fast, entry.inputs(2, 4)[0])
    before = blocks.device.recorded  # type: ignore[attr-defined]
    shortest = min(fast.compiled.rolled.proved_on)
    for segments in (shortest, shortest + 1, executor.program.n_layers + 2, 12, 37):
        (x,) = entry.inputs(2, segments)
        outputs = blocks.run(segments, dict(zip(fast.compiled.input_names, [x], strict=True)))
        assert outputs is not None
        expected = value_of(fast.compiled.result, executor.run(segments, [x]), segments)
        assert_same(expected, value_of(fast.compiled.result, outputs, segments))
    assert blocks.device.recorded == before  # type: ignore[attr-defined]


LONG = 6
"""Positions of a segment of these models."""


class Taught(Toy):
    """A Toy whose segments also read what went into the one before, and how long they are; all layers read
    the places of a segment's positions."""

    def forward(self, x: Tensor) -> Tensor:
        states = [x.new_zeros(x.shape[0], x.shape[2])] * len(self.layers)
        before, out = x.new_zeros(x.shape[0], x.shape[2]), []
        for h in x.split(LONG, 1):
            h, before = h + before[:, None], h.mean(1)
            places = torch.arange(h.shape[1], dtype=h.dtype)[:, None] / 10
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h + places, states[l])
            out.append(torch.softmax(h, 1) * h.shape[1])
        return torch.cat(out, 1)


@pytest.mark.parametrize("build", [Toy, Taught, lambda: Toy(3, up=-1), lambda: Toy(2, back=2)])
@torch.no_grad()
def test_blocks_serve_texts_that_end_within_a_segment(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of one rest, and the last levels of another one launched on their storage."""
    monkeypatch.setattr(toys, "SEGMENT", LONG)
    model = made(build)
    fast = rmtcompile.optimize(model)
    text = features(LONG * 14)

    def input_of(segments: int, rest: int) -> Tensor:
        return text[:, : segments * LONG + rest]

    for rest in (3, 2):
        fast(input_of(8, rest))
    owner, blocks = blocks_for(fast, input_of(8, 2), has_ends=False)
    assert not owner.compiled.emitted.borders.obstacle
    assert owner.compiled.emitted.borders.sizes == frozenset() and owner.compiled.sizes == {"R": 2}
    assert {kind for kind, _ in blocks._recordings} == {"head", "steady"}
    before = blocks.device.recorded  # type: ignore[attr-defined]
    for rest in (5, 4, 1):
        fast(input_of(8, rest))
        executor = fast._last[0].executor
        assert executor.compiled.emitted is owner.compiled.emitted
        engine = Engine(executor.program, "eager", keeps_buffers=False)
        engine.share_buffers(blocks.engine)  # type: ignore[arg-type]
        compiled = executor.compiled
        ending = recorded.Ending(executor.program, compiled.namespace, engine, compiled.sizes)
        shortest = blocks.example_segments
        for segments in (1, shortest, shortest + 1, 19, 27):
            x = input_of(segments, rest)
            outputs = blocks.run(segments + 1, {fast.compiled.input_names[0]: x}, ending)
            assert (outputs is None) == (segments == 1)  # no level of such a run is any other run's
            if outputs is not None:
                assert_same(model(x), value_of(fast.compiled.result, outputs, segments + 1))
    assert blocks.device.recorded == before  # type: ignore[attr-defined]


class Whole(nn.Module):
    """Each segment reads a sum over what all segments before it have left: levels are no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        states, out = [torch.zeros_like(x[:, 0]) for _ in self.layers], []
        for s, h in enumerate(x.split(3, 1)):
            h = h * (s + 1)
            for l, layer in enumerate(self.layers):
                h = torch.tanh(layer(h) + states[l][:, None])
                states[l] = h.mean(1)
            out.append(h)
        return torch.cat(out, 1)


@torch.no_grad()
def test_what_is_in_the_way_is_said() -> None:
    fast = rmtcompile.optimize(made(Whole))
    fast(features(4))
    assert "depends on s or S" in fast.compiled.emitted.borders.obstacle


@torch.no_grad()
def test_a_block_that_is_recorded_at_the_second_try_leaves_all_that_it_makes() -> None:
    entry = ZOO["infini_attention"]
    fast = rmtcompile.optimize(entry.build())
    fast(*entry.inputs(2, 4))
    level, fails = fast.compiled.namespace["level"], []

    class Second(Player):
        """The first try stops in its second level, as where something is compiled there."""

        def record(self, body: Any) -> Any:
            calls: list[int] = []

            def stopping(run: Any, t: int) -> None:
                calls.append(t)
                if len(calls) > 1:
                    raise RuntimeError("operation not permitted when stream is capturing")
                level(run, t)

            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(fast.compiled.namespace, "level", stopping)
                try:
                    body()
                except RuntimeError as error:
                    fails.append(error)
            return super().record(body)

    executor, blocks = blocks_for(fast, entry.inputs(2, 4)[0], Second())
    assert len(fails) > 3
    (x,) = entry.inputs(2, 20)
    outputs = blocks.run(20, dict(zip(fast.compiled.input_names, [x], strict=True)))
    assert outputs is not None
    assert_same(executor.run(20, [x]), outputs)


@torch.no_grad()
def test_places_are_not_made_while_a_block_is_recorded() -> None:
    """Or their first contents would be a part of the recording."""
    entry = ZOO["infini_attention"]
    fast = rmtcompile.optimize(entry.build())
    fast(*entry.inputs(2, 4))
    rooms: list[Any] = []

    class Strict(Player):
        def record(self, body: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(recorded, "room_for", lambda x: rooms.append(x) or x)
                return super().record(body)

    blocks_for(fast, entry.inputs(2, 4)[0], Strict())
    assert not rooms
