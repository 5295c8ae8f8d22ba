"""Readers: who reads the values that are kept outside the cells (taps).

    prologue(s) gives e  ->  cells of layer 0 (an entry of a lane); of other layers, where each reads it
    cell (s, 2) gives h  ->  epilogue(s), the caller

Where the layers of a program are cut into bands, these are the values that have to be sent on besides those
of lanes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from rmtcompile.ir.program import Each, Program, Source
from rmtcompile.passes.emit.calls import Calls
from rmtcompile.passes.emit.counted import sources_of
from rmtcompile.passes.emit.regions import Regions
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, PROLOGUE

GRID = (PROLOGUE, CELL, EPILOGUE)

CALLER = "caller"
"""Reads what the forward returns and leaves behind."""

Reader = int | str
"""A layer, "prologue", "epilogue" or "caller"."""


def readers(
    program: Program, regions: Regions, enter: Calls, leave: Calls
) -> Mapping[str, frozenset[Reader]]:
    """Who reads each tap."""
    found: dict[str, set[Reader]] = defaultdict(set)

    def note(source: Source | Each, *by: Reader) -> None:
        if source.kind in GRID:
            found[regions.tap_name(source)].update(by)

    for group in program.groups:
        for port in group.ports:
            for source in port.sources:
                note(source, *group.layers)
    for lane in program.lanes:
        for entry in lane.entries:
            for source in entry.sources:
                note(source, entry.layer)
    for calls in (enter, leave):
        for case in calls.cases:
            for live_in in case.rule.sources:
                for one in sources_of(live_in):
                    note(one, calls.kind)
    for output in program.rolled.outputs:
        note(output, CALLER)
    return {name: frozenset(by) for name, by in found.items()}


__all__ = ["CALLER", "Reader", "readers"]
