"""Compared: how many segments of an input are run beside the model, and which differences are rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.ir.layouts import in_layout
from rmtcompile.ir.segmentation import Segmentation

CHECKED = 8
"""Segments of the comparison: what it costs is that many of the model's own, run one by one."""

LONGER = 2
"""Segments captured at most, beyond the usual, where a comparison has failed."""


def length_to_check(compiled: Compiled, count: int, checked: int) -> int | None:
    """How many segments to compare before `count` segments run; None where that is known to be right.

    Args:
        compiled: the program.
        count: segments of the call.
        checked: the most segments compared so far.
    """
    proved = compiled.proved_on[-1]
    wanted, known = min(count, max(CHECKED, proved + 2)), max(checked, proved)
    return wanted if compiled.rolled.fixed is None and wanted > known else None


ENOUGH = 16
"""Segments that are enough for every comparison."""


def of_segments(args: Any, kwargs: Any, segmentation: Segmentation, count: int) -> tuple[Any, Any]:
    """The arguments with `count` segments, the given ones cut, or repeated; as copies."""
    return _with(args, kwargs, lambda tensors: segmentation.resized(tensors, count))


def of_rest(args: Any, kwargs: Any, segmentation: Segmentation, count: int, rest: int) -> tuple[Any, Any]:
    """The same with `rest` elements in the last segment."""
    return _with(args, kwargs, lambda tensors: segmentation.with_rest(tensors, count, rest))


def _with(
    args: Any, kwargs: Any, change: Callable[[list[torch.Tensor]], list[torch.Tensor]]
) -> tuple[Any, Any]:
    """The arguments with other tensors, none of which is the caller's."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    positions = [i for i, value in enumerate(flat) if isinstance(value, torch.Tensor)]
    given = [flat[i].detach() for i in positions]
    for position, old, new in zip(positions, given, change(given), strict=True):
        flat[position] = in_layout(new.clone(), old) if new is old else new
    again: tuple[Any, Any] = pytree.tree_unflatten(flat, spec)
    return again


GROSS = 0.5
"""Relative difference that is more than rounding in 16 bits: a recurrence may amplify rounding from segment
to segment, an ARMT of random weights in bfloat16 to 7e-2 after eight."""


SLIGHT = 1e-2
"""The same in float32, for differences that longer captures do not explain: the ARMT of 32 layers with random
weights amplifies rounding to 2e-4 after eight segments."""


def rounding(compiled: Compiled) -> float:
    """The relative difference that may be rounding, whatever the type of the results: above 0 where the
    forward computes in 16 bits anywhere."""
    return GROSS if compiled.longest.types & _LOW else 0.0


def unexplained(compiled: Compiled) -> float:
    """The relative difference that is taken for rounding once longer captures have given the same rules: any
    where the forward computes in 16 bits, `SLIGHT` where it does in float32."""
    types = compiled.longest.types
    return math.inf if types & _LOW else SLIGHT if torch.float32 in types else 0.0


_LOW = {torch.float16, torch.bfloat16}


