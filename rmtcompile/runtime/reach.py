"""Reach: how far integers that a model keeps from call to call may lead into a tensor.

    table[K : K + 3]      of 1,000 rows     K <= 997: three rows; beyond that fewer, and a slice says nothing

What a forward does with so many rows was captured, and nothing else: a call beyond is captured by itself.
"""

from __future__ import annotations

import torch


class OutOfReachError(RuntimeError):
    """A program does not hold for the integers of a call."""


def within(x: torch.Tensor, dim: int, start: int, end: int, step: int = 1) -> torch.Tensor:
    """A slice of a dim, from `start` to `end`.

    Raises:
        OutOfReachError: there are not so many elements.
    """
    if not 0 <= start <= end <= x.shape[dim]:
        raise OutOfReachError(f"{start} : {end} of {x.shape[dim]}")
    sliced: torch.Tensor = torch.ops.aten.slice.Tensor(x, dim, start, end, step)
    return sliced


__all__ = ["OutOfReachError", "within"]
