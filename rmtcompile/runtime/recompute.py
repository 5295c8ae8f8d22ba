"""Recomputation: backward runs levels again instead of keeping what their operations have made.

    forward     level t: its lanes are kept, what its cells compute is not
    backward    level t again from these lanes, then its gradients

A training run then holds what crosses the borders of levels, and one level's own values. With blocks of k
levels it holds the borders of blocks, and of the levels of one block: memory that grows like S / k + k. Each
level is run twice, and three times in blocks of several.

Source: "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174; `torch.utils.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint

from rmtcompile.runtime.base import BaseRun, Level
from rmtcompile.runtime.contexts import own_modes


class Recompute:
    """Runs the levels of one run by blocks that backward computes again; a run's `on_level`.

    Args:
        levels: of one block.
        draws: whether levels draw random numbers, which are drawn again.
    """

    def __init__(self, levels: int, draws: bool) -> None:
        self._most, self._draws = levels, draws
        self._waiting: list[int] = []

    def __call__(self, run: BaseRun, level: int, step: Level) -> None:
        """Run a level, or wait for more of its block."""
        self._waiting.append(level)
        if len(self._waiting) == self._most or run.is_last(level):
            levels, self._waiting = tuple(self._waiting), []
            again(run, levels, step, self._draws)


def again(run: BaseRun, levels: Sequence[int], step: Level, draws: bool) -> None:
    """Run levels so that backward runs them again, those of a block one by one."""
    before = run.copied()
    first = [run]  # not held by what backward holds, which the run's own values lead to

    def body(*_: torch.Tensor) -> None:
        mine = first.pop() if first else before.copied()
        with own_modes():  # backward has the caller's
            for level in levels:
                if len(levels) == 1:
                    step(mine, level)
                else:
                    again(mine, (level,), step, draws)

    # Of its arguments it takes the devices whose random numbers are drawn again.
    devices = {x.device for x in run.inputs.values()} if draws else ()
    places = (torch.empty(0, device=device) for device in devices)
    checkpoint(body, *places, use_reentrant=False, preserve_rng_state=draws)


__all__ = ["Recompute"]
