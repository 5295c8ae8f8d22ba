"""Rehearsal: rests of all sizes are run once, when there are rules for rests.

Libraries choose the kernel of a product by its number of rows, and CUDA loads a kernel when it is first used:
up to 60 ms of the host for a text that ends after a new number of positions (`benchmarks/NOTES.md`). Sixteen
short runs meet most of these kernels in the call that has captured and compiled for a minute, so that later
calls do not.
"""

from __future__ import annotations

import logging
from typing import Any

from rmtcompile.binding.arguments import tensors_of
from rmtcompile.dispatch.compared import of_rest
from rmtcompile.dispatch.entries import Entry
from rmtcompile.dispatch.families import Families
from rmtcompile.dispatch.verify import STOPS
from rmtcompile.runtime.contexts import plain_tensors, same_numbers

_LOGGER = logging.getLogger("rmtcompile")

REHEARSED = 16
"""Rests that are run, evenly spread over a segment."""


def is_due(entry: Entry) -> bool:
    """Whether an entry runs rules for rests, compiled and on one CUDA device, that were not rehearsed yet,
    and whose last segments are launched."""
    executor = entry.executor
    return (
        entry.trial is not None
        and not entry.trial.rules.is_rehearsed
        and len(entry.trial.rules.remainders) == 1
        and executor.device.type == "cuda"
        and executor.engine.is_compiled
        and not executor.bands
        and not executor.replays.is_padded
    )


def rehearse(families: Families, entry: Entry, args: Any, kwargs: Any) -> list[int]:
    """Run the rules of an entry for rests all over a segment, on the arguments at hand; nothing is recorded,
    and no random numbers are used up.

    Returns:
        The rests that were run.
    """
    assert entry.trial is not None
    entry.trial.rules.is_rehearsed = True
    segmentation, count = entry.segmentation, entry.compiled.rolled.proved_on[0]
    lengths = {axis.length for axis in segmentation.axes}
    if len(lengths) != 1:
        return []
    (length,) = lengths
    (name,) = entry.trial.rules.remainders
    pieces = segmentation.pieces(entry.trial.at[name])
    spread = sorted({length * i // REHEARSED for i in range(1, REHEARSED)} - {0, 1})
    done = []
    for rest in spread:
        if segmentation.pieces(rest) != pieces:
            continue
        there = of_rest(args, kwargs, segmentation, count, rest)
        other = families.of_same_rules(entry, *there)
        if other is None:
            continue
        try:
            with plain_tensors(), same_numbers(other.executor.device):
                other.executor.launch(count, tensors_of(*there))
        except STOPS as error:  # a call of that rest finds out, and is captured where it has to be
            _LOGGER.info("rmtcompile: a rest of %d is not rehearsed: %s", rest, error)
            continue
        done.append(rest)
    return done
