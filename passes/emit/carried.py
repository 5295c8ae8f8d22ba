"""Carried: what a run leaves to the run that goes on after its last segment.

    segments  0 1 2 | 3 4 5        cells (3, l) read what cells (2, l) have given: carried, one segment back
                    ^ border       prologue(3) reads what epilogue(2) has given: carried, one segment back

A value is carried if its reader may lie in a later segment than the value itself. That is decided by the
rules alone, so the same values are carried whatever the schedule, and whatever stands in the lanes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from rmtcompile.ir.program import Lane, Program, Source
from rmtcompile.passes.emit.calls import Calls
from rmtcompile.passes.emit.counted import sources_of
from rmtcompile.passes.emit.obstacles import obstacle
from rmtcompile.passes.emit.regions import Regions
from rmtcompile.passes.emit.text import target_name
from rmtcompile.passes.grid.if_conversion import class_name
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, PROLOGUE

GRID = (PROLOGUE, CELL, EPILOGUE)


@dataclass(frozen=True)
class CarriedCell:
    """A cell's result that later segments read.

    Attributes:
        name: says layer and value; the same in every program of one forward.
        layer: of the cell.
        outputs: (group, output) that hold it; which one depends on the cell's class.
        back: how many segments later it is read at most.
    """

    name: str
    layer: int
    outputs: tuple[tuple[str, str], ...]
    back: int


@dataclass(frozen=True)
class CarriedTap:
    """A value kept outside the cells that later segments read.

    Attributes:
        tap: its name in the program.
        back: how many segments later it is read at most.
        at: segments whose value every later one reads.
    """

    name: str
    tap: str
    back: int
    at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Refill:
    """What a place of a lane holds for the first segments after a border.

    Attributes:
        since: the first segment whose cell gives the value: those before are of classes that do not.
        reach: for how many of these segments no cell after the border fills the place.
        name, back: the carried value, and how many segments before its reader it was made.
    """

    lane: str
    layer: int
    reach: int
    name: str
    back: int
    since: int


@dataclass(frozen=True)
class Carried:
    """What goes over a border between segments: results of cells, and values that are read outside of cells.

    Attributes:
        obstacle: why no run can go on where another one has stopped; empty if it can.
        tail: how many segments before the end of an input differ from all others in what they leave; a border
            lies before those.
    """

    obstacle: str = ""
    cells: tuple[CarriedCell, ...] = ()
    taps: tuple[CarriedTap, ...] = ()
    refills: tuple[Refill, ...] = ()
    tail: int = 0

    @property
    def kept(self) -> tuple[CarriedCell | CarriedTap, ...]:
        """All carried values."""
        return (*self.cells, *self.taps)


def carried(program: Program, regions: Regions, enter: Calls, leave: Calls) -> Carried:
    """Find what a program carries from segment to segment."""
    cells: dict[str, CarriedCell] = {}
    refills = []
    for lane in program.lanes:
        for layer in lane.layers:
            for reach, cell in _origins(program, lane, layer):
                known = cells.get(cell.name, cell)
                outputs = tuple(dict.fromkeys((*known.outputs, *cell.outputs)))
                back = max(known.back, cell.back)
                cells[cell.name] = CarriedCell(cell.name, cell.layer, outputs, back)
                head = program.rolled.classes[(CELL, cell.layer)].head
                refills.append(Refill(lane.name, layer, reach, cell.name, cell.back, head))
    taps = _taps(program, regions, enter, leave)
    found = tuple(cells.values()), taps, tuple(dict.fromkeys(refills))
    return Carried(obstacle(regions, enter, leave), *found, _tail(program, taps))


# ---- cells -------------------------------------------------------------------------------------------------


def _origins(program: Program, lane: Lane, layer: int) -> Iterator[tuple[int, CarriedCell]]:
    """Of a lane's place: for how many segments after a border it was filled before, and by which cells."""
    lanes = {lane.name: lane for lane in program.lanes}
    for feed in lane.feeds:
        ds, dl = feed.offset
        if ds == 0 or layer - dl not in feed.layers:
            continue
        if feed.group:
            yield ds, _cell(program, feed.group, feed.source, layer - dl, ds)
            continue
        for cell in _makers(program, lanes, lanes[feed.source], layer - dl, ds):
            yield ds, cell


def _makers(
    program: Program, lanes: dict[str, Lane], lane: Lane, layer: int, back: int
) -> Iterator[CarriedCell]:
    """The cells whose results stand in a lane's place, past all lanes that hand them on."""
    for feed in lane.feeds:
        ds, dl = feed.offset
        if layer - dl not in feed.layers:
            continue
        if feed.group:
            yield _cell(program, feed.group, feed.source, layer - dl, back + ds)
        else:
            yield from _makers(program, lanes, lanes[feed.source], layer - dl, back + ds)


def _cell(program: Program, group: str, output: str, layer: int, back: int) -> CarriedCell:
    found = next(g for g in program.groups if g.name == group)
    nodes = dict(found.values[found.outputs.index(output)])
    return CarriedCell(_name(program, CELL, layer, nodes), layer, ((group, output),), back)


def _name(program: Program, kind: str, layer: int, nodes: dict[int, int]) -> str:
    """Layer, place among the operations of most segments, and what the operation is."""
    steady = program.rolled.classes[(kind, layer)].head
    number = steady if steady in nodes else min(nodes)
    node = program.rolled.rules[(kind, layer)][number].body.nodes[nodes[number]]
    where = f"{kind} {layer}" if kind == CELL else kind
    which = "" if number == steady else f" of {class_name(number)}"
    return f"{where}: {target_name(node.target)} {nodes[number]}{which}"


# ---- taps --------------------------------------------------------------------------------------------------


def _taps(program: Program, regions: Regions, enter: Calls, leave: Calls) -> tuple[CarriedTap, ...]:
    back: dict[str, int] = defaultdict(int)
    at: dict[str, set[int]] = defaultdict(set)
    for source in _reads(program, enter, leave):
        if source.kind in GRID:
            kept = regions.tap_name(source)
            if source.relative:
                back[kept] = max(back[kept], source.segment)
            else:
                at[kept].add(source.segment)
    found = []
    for tap in program.taps:
        if back[tap.name] or at[tap.name]:
            name = _name(program, tap.value.kind, tap.value.layer, dict(tap.value.nodes))
            found.append(CarriedTap(name, tap.name, back[tap.name], tuple(sorted(at[tap.name]))))
    return tuple(found)


def _reads(program: Program, enter: Calls, leave: Calls) -> Iterator[Source]:
    """What segments and the caller read; the first segments, which read something else, are read as they are:
    by the number of the segment."""
    for group in program.groups:
        for port in group.ports:
            yield from port.sources
    for lane in program.lanes:
        for entry in lane.entries:
            yield from entry.sources
    for calls in (enter, leave):
        for case in calls.cases:
            for live_in in case.rule.sources:
                yield from (source for source in sources_of(live_in) if isinstance(source, Source))
    yield from (source for source in program.rolled.outputs if isinstance(source, Source))


def _tail(program: Program, taps: tuple[CarriedTap, ...]) -> int:
    kinds = {PROLOGUE, CELL} | {
        EPILOGUE for tap in taps for known in program.taps
        if known.name == tap.tap and known.value.kind == EPILOGUE and tap.back
    }  # fmt: skip
    tails = [classes.tail for (kind, _), classes in program.rolled.classes.items() if kind in kinds]
    return max(tails, default=0)


NOTHING = Carried()

__all__ = ["NOTHING", "Carried", "CarriedCell", "CarriedTap", "Refill", "carried"]
