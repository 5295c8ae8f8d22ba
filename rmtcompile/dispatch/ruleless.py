"""Ruleless: what runs a forward whose segments follow no rule one by one.

    writes at every second segment        two segments taken as one
    another rule at each prime number     a program for this number of segments alone

Such a program is a capture of the text as it is, its cells on the levels that their dependences allow. It is
made for texts that are read in one call, where it is not too large, and is compared with the model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rmtcompile.binding.guard import call_key
from rmtcompile.dispatch.calls import Call, TooFewSegments
from rmtcompile.dispatch.compared import rounding
from rmtcompile.dispatch.entries import Entry
from rmtcompile.errors import BoundedError, RerollError, UnsupportedError

if TYPE_CHECKING:
    from rmtcompile.dispatch.programs import Programs

NODES, SEGMENTS = 3_000, 48
"""The most of either of a program for one number of segments: each segment may be of a class of its own."""


def periodic(
    programs: Programs, call: Call, error: RerollError, args: Any, kwargs: Any
) -> tuple[Call, Entry]:
    """The call and its program with several segments taken as one.

    Raises:
        RerollError: there are no rules for these either.
    """
    key = call_key(args, kwargs)
    programs.segmentations[key] = call.segmentation.times(error.period)
    try:
        again = replace(programs.located(args, kwargs), by_itself=call.by_itself)
        return again, programs.of_rules(again, args, kwargs)
    except TooFewSegments:
        raise
    except UnsupportedError as other:
        programs.segmentations[key] = call.segmentation
        evidence = [*error.evidence, f"{error.period} segments at a time: {other.what}", *other.evidence]
        failed = RerollError(error.what, evidence, error.remedy)
        failed.nodes = error.nodes
        raise failed from other


def alone(programs: Programs, call: Call, error: RerollError, args: Any, kwargs: Any) -> Entry:
    """The program for this number of segments alone.

    Args:
        error: why there are no rules.

    Raises:
        RerollError: the same, where such a program would be too large, or is wrong.
    """
    is_small = 0 < error.nodes * call.count <= NODES and call.count <= SEGMENTS
    if not (call.by_itself and is_small) or isinstance(error, BoundedError):
        raise error
    try:
        entry = programs.made(call, args, kwargs, only=call.count)
    except UnsupportedError:
        raise error from None
    with entry.executor.uncompiled(), torch.no_grad():
        tolerance = rounding(entry.compiled)
        if programs.difference(entry, call.count, args, kwargs, tolerance=tolerance) is not None:
            raise error
    entry.unruled = error
    programs.told.alone(call.count, error)
    return entry


__all__ = ["alone", "periodic"]
