"""Relocated: segments are looked for again where there is no program on those that were found.

    the model cuts its inputs in another way by now      what is found now
    layers cut off the ends of short segments            as long as the calls of the layers say
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rmtcompile.binding.guard import call_key
from rmtcompile.dispatch.calls import Call
from rmtcompile.dispatch.entries import Entry
from rmtcompile.errors import PartitionError, UnsupportedError
from rmtcompile.frontend.probe import recounted

if TYPE_CHECKING:
    from rmtcompile.dispatch.programs import Programs


def relocated(
    programs: Programs, call: Call, error: UnsupportedError, args: Any, kwargs: Any
) -> tuple[Call, Entry]:
    """The call on other segments, and its program.

    Args:
        error: why there is none on those that were found.

    Raises:
        UnsupportedError: there are no others, or no program on them.
    """
    key = call_key(args, kwargs)
    known = programs.segmentations.pop(key, call.segmentation)
    if programs.segmentation(args, kwargs) != known:
        return _ruled(programs, call, args, kwargs)
    is_counted = isinstance(error, PartitionError) and known.period == 1
    found = recounted(programs.model, args, kwargs, known) if is_counted else None
    if found is None or programs.options.segment_size is not None:
        raise error
    programs.segmentations[key] = found
    try:
        return _ruled(programs, call, args, kwargs)
    except UnsupportedError:
        programs.segmentations[key] = known
        raise error from None


def _ruled(programs: Programs, call: Call, args: Any, kwargs: Any) -> tuple[Call, Entry]:
    again = replace(programs.located(args, kwargs), first=call.first, by_itself=call.by_itself)
    return again, programs.of_rules(again, args, kwargs)


__all__ = ["relocated"]
