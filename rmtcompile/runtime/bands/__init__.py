"""Programs cut into bands of layers, each on a device of its own; and what runs a program, cut or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.ir.segmentation import Segmentation
from rmtcompile.runtime.bands.execute import BandedExecutor
from rmtcompile.runtime.execute import Executor
from rmtcompile.runtime.rows import RowExecutor


def executor_for(
    compiled: Compiled,
    segmentation: Segmentation,
    backend: str | Callable[..., Any],
    cuda_graphs: str | bool,
    like: Executor | None = None,
    recompute: str | int = "auto",
    devices: Sequence[torch.device] = (),
    group: Any = None,
    counts: Sequence[int] = (),
) -> Executor:
    """What runs a compiled program.

    Args:
        devices: of bands of layers, in order; none: the program is not cut.
        group: the processes that run a band each, instead.
        counts: how many layers each device has, where that is given.

    For the other arguments see `Executor`.
    """
    given = compiled, segmentation, backend, cuda_graphs, like, recompute
    if group is not None:
        from rmtcompile.runtime.bands.ranks import RankExecutor

        return RankExecutor(*given, group)
    if devices:
        return BandedExecutor(*given, devices, counts=counts)
    return Executor(*given) if compiled.program.alpha else RowExecutor(*given)


__all__ = ["executor_for"]
