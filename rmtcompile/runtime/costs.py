"""What levels cost: one cell alone against a full wavefront, measured on the device, to choose a plan.

A level of n cells is taken to cost a + b n seconds, from its costs at one cell and at full width. A run of
the wavefront plan then takes levels * a + cells * b, the sequential plan cells * (a + b): the wavefront pays
as long as a cell in company is cheaper than a cell alone, whatever the number of segments.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rmtcompile.ir.program import Program
from rmtcompile.ir.streams import capture_stream
from rmtcompile.runtime.base import Level, OnLevel
from rmtcompile.runtime.contexts import plain_tensors, same_numbers
from rmtcompile.schedule import Grid

if TYPE_CHECKING:
    from rmtcompile.runtime.execute import Executor

LONG = 0.2
"""Seconds after which calls on a CPU are not timed once more."""


@dataclass(frozen=True)
class Costs:
    """Measured seconds of one level.

    Attributes:
        alone: of a level of one cell.
        full: of a level of `width` cells.
        width: cells of a full level.
        n_layers, alpha: of the wavefront plan.
    """

    alone: float
    full: float
    width: int
    n_layers: int
    alpha: int

    @property
    def wavefront_pays(self) -> bool:
        """Whether a cell of a full level costs no more than a cell alone."""
        return self.full <= self.width * self.alone

    @property
    def plan(self) -> str:
        """The cheaper plan."""
        return "diagonal" if self.wavefront_pays else "sequential"

    def seconds(self, segments: int) -> dict[str, float]:
        """Of the cells of a whole run, by plan."""
        per_cell = (self.full - self.alone) / max(1, self.width - 1)
        levels, cells = Grid(self.n_layers, segments, self.alpha).n_levels, segments * self.n_layers
        return {
            "diagonal": levels * (self.alone - per_cell) + cells * per_cell,
            "sequential": cells * self.alone,
        }


def costs_of(executor: Executor, inputs: list[torch.Tensor]) -> Costs | None:
    """Costs of an executor's levels; None where it has no choice of plans. A training step does not ask: what
    it has compiled records gradients, and to compile all else for this took a minute of the first step of the
    1B shape."""
    program, rolled, engine = executor.program, executor.compiled.rolled, executor.engine
    is_plain = rolled.fixed is None and not rolled.grows  # or a level twice grows them twice
    can_choose = program.alpha > 0 and not engine.is_sequential and is_plain
    if not can_choose or not engine.is_compiled or executor.records_gradients(inputs):
        return None
    enough = program.n_layers + 1
    with plain_tensors(), same_numbers(executor.device):
        inputs = executor.resized(enough, inputs)
        return measured(
            program,
            executor.compiled.namespace["level"],
            lambda on_level: executor.launch(enough, inputs, on_level=on_level),
        )


def measured(
    program: Program, level: Level, run_all: Callable[[OnLevel], Any]
) -> Costs | None:
    """Costs of the levels of a run on CUDA; None if the run has no level wider than one cell.

    Args:
        program: what is run.
        level: the emitted function that runs the cells of a level.
        run_all: runs all levels, wide ones among them; its results are spoiled.
    """
    found: dict[int, float] = {}
    device = next(lane.device for lane in program.lanes)

    def timed(run: Any, t: int, step: Level) -> None:
        width = sum(len(window.layers) for window in run.windows(t))
        step(run, t)
        if width and width not in found and (t == 0 or t == run.steady.start):
            found[width] = seconds(lambda: level(run, t), device)
            level(run, t)  # lanes with two buffers have changed roles an odd number of times again

    run_all(timed)
    if len(found) < 2 or 1 not in found:
        return None
    widest = max(found)
    return Costs(found[1], found[widest], widest, program.n_layers, program.alpha)


def seconds(body: Callable[[], Any], device: torch.device, repeat: int = 7) -> float:
    """How long `body` takes: on CUDA, where it has run before, the median of its replays as a CUDA graph;
    elsewhere of calls behind a first one, or that one where it is long."""
    is_cuda = device.type == "cuda"
    return statistics.median(_replays(body, device, repeat) if is_cuda else _calls(body, repeat))


def _replays(body: Callable[[], Any], device: torch.device, repeat: int) -> list[float]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=capture_stream(device), capture_error_mode="thread_local"):
        body()
    times = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return times


def _calls(body: Callable[[], Any], repeat: int) -> list[float]:
    times: list[float] = []
    while len(times) <= repeat and sum(times) < LONG:
        started = time.perf_counter()
        body()
        times.append(time.perf_counter() - started)
    return times[1:] or times
