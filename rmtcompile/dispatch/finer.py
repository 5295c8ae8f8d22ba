"""Finer: a grid of parts of segments, where the model walks each segment in equal parts, layer by layer.

    for seg in x.split(4, 1):                    the model's segments: 12 cells each, one after the other
        for t in range(4):                 =>    its tokens: 3 cells each, and token t + 1 enters the first
            z = seg[:, t]                        layer while token t is in the second
            for l, layer in enumerate(layers):
                z, h[l] = layer(z, h[l])

Such a model calls each layer several times in a segment. What it does once for a segment, embedding and head
say, is taken apart (`strip_mine`), and the same passes find rules for the parts. They serve texts that are
read in one call; what is read in parts, or in a queue with others, has the model's own segments for borders.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.dispatch.calls import Call
from rmtcompile.dispatch.entries import Entry, is_current, is_loaded
from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.segmentation import Segmentation
from rmtcompile.schedule import Grid

if TYPE_CHECKING:
    from rmtcompile.dispatch.lengths import Lengthening
    from rmtcompile.dispatch.programs import Programs

_LONG = 64
"""Segments for which levels are counted: of many, what a segment more costs decides."""


def finer(
    programs: Programs, lengths: Lengthening, entry: Entry, call: Call, args: Any, kwargs: Any
) -> Entry | None:
    """The program on a finer grid, where there is one, it has fewer levels, and its rules hold; or None.

    Args:
        lengths: sees to it that rules hold for the number of segments.
        entry: the program on the model's segments.
    """
    if entry.parts is None:
        entry.parts = _parts_of(programs, entry)
    parts = entry.parts
    call = replace(call, segmentation=call.segmentation.cut(parts))
    if parts == 1 or not call.by_itself or not _fits(call.segmentation):
        return None
    try:
        if entry.finer is None or not is_current(entry.finer.compiled):
            entry.finer = _made(programs, entry, call, args, kwargs)
        return lengths.entry(entry.finer, call, args, kwargs)
    except (_NotFinerError, UnsupportedError):
        entry.parts, entry.finer = 1, None
        return None


def made_or_finer(programs: Programs, call: Call, args: Any, kwargs: Any) -> Entry:
    """The program of a call on the model's segments, or on parts of them where there are no rules for these:
    a short last segment has fewer of them, say.

    Raises:
        UnsupportedError: there are none for either.
    """
    try:
        return programs.made(call, args, kwargs)
    except UnsupportedError as error:
        fine = call.segmentation.cut(max(error.parts, 1))
        is_possible = call.by_itself and not programs.options.has_bands and _fits(fine)
        if fine.parts == 1 or not is_possible:
            raise
        try:
            return programs.made(replace(call, segmentation=fine), args, kwargs)
        except UnsupportedError:
            raise error from None


class _NotFinerError(Exception):
    """There are no fewer levels."""


def _made(programs: Programs, entry: Entry, call: Call, args: Any, kwargs: Any) -> Entry:
    """The program on the finer grid: saved, where that on the model's segments is, or captured.

    Raises:
        UnsupportedError: there are no rules on that grid.
    """
    found = programs.saved(call, args, kwargs) if is_loaded(entry.compiled) else None
    if found is None and is_loaded(entry.compiled):
        raise _NotFinerError
    found = found or programs.made(call, args, kwargs)
    before, after = _levels(entry.compiled), _levels(found.compiled)
    if after >= before:
        raise _NotFinerError
    programs.told.finer(call.segmentation.parts, before / _LONG, after / _LONG)
    return found


def _parts_of(programs: Programs, entry: Entry) -> int:
    """How often a segment calls each of the layers, if equally often; 1 where nothing is to be won."""
    options = programs.options
    is_plain = entry.compiled.fixed is None and entry.segmentation.parts == 1
    if not is_plain or options.plan == "sequential" or options.has_bands:
        return 1
    called = Counter(entry.compiled.layer_paths)
    times = set(called.values())
    return times.pop() if len(times) == 1 and len(called) > 1 else 1


def _fits(segmentation: Segmentation) -> bool:
    """Whether whole segments are so many parts of one length."""
    return segmentation.period == 1 and not any(a.length % segmentation.parts for a in segmentation.axes)


def _levels(compiled: Compiled) -> int:
    program = compiled.program
    return Grid(program.n_layers, compiled.steps(_LONG), program.alpha, program.block).n_levels


__all__ = ["finer", "made_or_finer"]
