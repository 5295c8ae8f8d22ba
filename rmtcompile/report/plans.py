"""What the runtime measured to choose a plan, and where it cuts: the one place where reports ask it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from rmtcompile.runtime.bands.execute import BandedExecutor
from rmtcompile.runtime.execute import Executor


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an executor says about its plans.

    Attributes:
        seconds: of one call by each plan, by name; empty if it measured none.
        chosen: the plan that runs this number of segments; "" if there was no choice.
        compile_seconds: time in which the backend compiled the cell functions; None if it is not known.
        workspace_seconds: of one recorded call "with" and "without" cuBLAS's workspace; empty if it measured
            none.
        recorded: how runs are recorded as CUDA graphs, in words; empty where they are not.
        bands: how the layers are cut into bands; empty where they are not.
    """

    seconds: Mapping[str, float]
    chosen: str = ""
    compile_seconds: float | None = None
    workspace_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    recorded: str = ""
    bands: tuple[str, ...] = ()


def measured_plans(executor: Executor, segments: int) -> Measured:
    """What the executor of a program has measured."""
    costs = executor.costs
    return Measured(
        costs.seconds(segments) if costs is not None else {},
        costs.plan if costs is not None else "",
        executor.compile_seconds,
        executor.replays.workspace_seconds(segments),
        executor.recorded,
        tuple(executor.bands),
    )


def bands_of(executor: Executor) -> tuple[range, ...]:
    """The layers of each band; none where the program is not cut."""
    if not isinstance(executor, BandedExecutor):
        return ()
    return tuple(band.layers for band in executor.cut.bands)
