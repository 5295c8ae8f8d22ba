"""Time of backward by level: which part of it belongs to the operations of which level of the forward.

    forward     level 0  level 1  ...  level n        autograd numbers its nodes as they are made
    backward    level n  ...  level 1  level 0        torch's profiler says which node takes how long

Backward runs level by level in the opposite order; a level that is computed again counts with its backward.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.report.kinds import are_cuda, recording, timed
from rmtcompile.runtime.base import Level, OnLevel

_NODE = "autograd::engine::evaluate_function"

_RUNS = 3
"""Runs under the profiler, of which the median counts."""


def backward_us(
    program: Callable[[OnLevel], Any],
    leaves: Sequence[torch.Tensor],
    devices: Sequence[torch.device],
    repeats: int,
    by_level: bool = True,
) -> tuple[tuple[float, ...], float]:
    """Microseconds of each level's part of backward, and of all of it; nothing where no gradients are
    recorded. The gradient of each result is one.

    Args:
        program: runs the forward, level by level; gives its results.
        leaves: of which gradients are wanted; none are left in them.
        devices: on which backward runs.
        by_level: whether the nodes of levels are the caller's; without it levels have no parts.
    """
    starts: list[tuple[int, int]] = []

    def numbered(run: Any, level: int, step: Level) -> None:
        starts.append((torch.autograd._get_sequence_nr(), level))
        step(run, level)

    wholes = []
    for _ in range(repeats):
        backward = _backward(program(lambda run, level, step: step(run, level)), leaves)
        if backward is None:
            return (), 0.0
        wholes.append(timed(backward, *devices))
    parts = []
    for _ in range(_RUNS if by_level else 0):
        starts.clear()
        backward = _backward(program(numbered), leaves)
        assert backward is not None
        parts.append(_by_level(backward, starts, torch.autograd._get_sequence_nr(), devices))
    total = statistics.median(wholes)
    return tuple(total * statistics.median(shares) for shares in zip(*parts, strict=True)), total


def _by_level(
    backward: Callable[[], Any],
    starts: Sequence[tuple[int, int]],
    end: int,
    devices: Sequence[torch.device],
) -> list[float]:
    """Each level's share of backward.

    Args:
        starts: the number of the first node of each level, and the level, in the order in which they ran;
            with bands a level has several. `end` follows the nodes of the last one.
    """
    from torch.autograd import DeviceType

    cuda = are_cuda(devices)
    with recording(*devices) as recorded:
        backward()
    firsts, levels = zip(*starts, strict=True)
    whole, taken = 0.0, [0.0] * (1 + max(levels))
    for event in recorded.events() or ():
        if not event.name.startswith(_NODE) or _is_within(event) or event.device_type != DeviceType.CPU:
            continue
        us = float(event.device_time_total if cuda else event.cpu_time_total)
        whole += us
        at = bisect_right(firsts, event.sequence_nr) - 1
        if at >= 0 and event.sequence_nr < end:
            taken[levels[at]] += us
    return [us / whole if whole else 0.0 for us in taken]


def _backward(results: Any, leaves: Sequence[torch.Tensor]) -> Callable[[], Any] | None:
    """What computes the gradients; None where there are none."""
    found = [x for x in pytree.tree_leaves(results) if isinstance(x, torch.Tensor) and x.requires_grad]
    wanting = [leaf for leaf in leaves if leaf.requires_grad]
    if not found or not wanting:
        return None
    ones = [torch.ones_like(x) for x in found]
    return lambda: torch.autograd.grad(found, wanting, ones, allow_unused=True)


def _is_within(event: Any) -> bool:
    """Whether a node runs inside of another one, as those of a level that is computed again do."""
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(_NODE):
            return True
        parent = parent.cpu_parent
    return False
