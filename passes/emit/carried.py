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

from torch import fx

from rmtcompile.ir.program import Affine, Each, Lane, Program, Source
from rmtcompile.passes.emit.bodies import is_view
from rmtcompile.passes.emit.calls import Calls, Case
from rmtcompile.passes.emit.counted import inner, is_row_wise, mixed, sources_of
from rmtcompile.passes.emit.regions import Regions
from rmtcompile.passes.emit.text import target_name
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, INIT, PROLOGUE

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
        reach: for how many of these segments no cell after the border fills the place.
        name, back: the carried value, and how many segments before its reader it was made.
    """

    lane: str
    layer: int
    reach: int
    name: str
    back: int


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
                refills.append(Refill(lane.name, layer, reach, cell.name, cell.back))
    taps = _taps(program, regions, enter, leave)
    obstacle = _obstacle(program, regions, enter, leave)
    found = tuple(cells.values()), taps, tuple(dict.fromkeys(refills))
    return Carried(obstacle, *found, _tail(program, taps))


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
    return f"{where}: {target_name(node.target)} {nodes[number]}"


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


# ---- obstacles ---------------------------------------------------------------------------------------------


def _obstacle(program: Program, regions: Regions, enter: Calls, leave: Calls) -> str:
    """Why a part of an input cannot be read by itself."""
    reasons = [_init_obstacle(program, regions)]
    for group in program.groups:
        read = (source for port in group.ports for source in port.sources)
        whole = (source for source in read if _is_inner(program, regions, source))
        reasons += [f"each cell reads all segments of {source.name or 'an input'}" for source in whole]
    for calls in (enter, leave):
        reasons += [_case_obstacle(program, regions, calls, case) for case in calls.cases]
    return next(filter(None, reasons), "")


def _is_inner(program: Program, regions: Regions, source: Source | Each) -> bool:
    return isinstance(source, Source) and (
        (source.kind == "input" and source.name in program.segmented)
        or (source.kind == INIT and source.node in regions.inner_init)
    )


def _init_obstacle(program: Program, regions: Regions) -> str:
    rule = program.rolled.rules[(INIT, -1)][0]
    found = inner(rule, program.segmented)
    needed = _needed(rule.body.nodes, [rule.body.nodes[i] for i in regions.init_nodes])
    for node in rule.body.nodes:
        if node in found and node in needed and not is_row_wise(node):
            return f"{_said(node)} needs the whole input"
    node = mixed(rule.body.nodes, rule, found & needed)
    return f"{_said(node)} joins the whole input with what depends on its length" if node else ""


def _needed(nodes: tuple[fx.Node, ...], results: list[fx.Node]) -> set[fx.Node]:
    inside, found = set(nodes), set(results)
    for node in reversed(nodes):
        if node in found:
            found |= inside.intersection(node.all_input_nodes)
    return found


def _case_obstacle(program: Program, regions: Regions, calls: Calls, case: Case) -> str:
    rule, is_last = case.rule, case.test.startswith("s == S")
    found = inner(rule, program.segmented, regions.inner_init)
    ints = rule.integers()
    for node in case.parts.before:
        if node in found and not is_own_part(node, ints[node]):
            return f"{_said(node)} reads more of the input than its own segment"
    for value, live_in in zip(rule.body.live_ins, rule.sources, strict=True):
        whole = [x for x in (value if isinstance(value, tuple) else (value,)) if x in case.parts.inputs]
        if whole and any(_is_inner(program, regions, source) for source in sources_of(live_in)):
            return f"the {calls.kind} reads the whole input"
        if isinstance(live_in.steady, Each) and not is_last:
            return f"the {calls.kind} of each segment reads all segments before it"
    met = mixed(case.parts.after, rule, found)
    return f"{_said(met)} joins all segments with what depends on their number" if met is not None else ""


def is_own_part(node: fx.Node, ints: tuple[Affine, ...]) -> bool:
    """Whether a view of an input reads nothing outside of its reader's segment."""
    if any(a.by_count for a in ints) and not is_view(node):
        return False
    moving = [a for a in ints if a.by_segment]
    if not moving:
        return True
    if any(a.by_count for a in moving) or len(moving) > 2:
        return False
    start = moving[0]
    if start.const < 0 or (len(moving) == 1 and start.const):
        return False
    end = moving[-1]
    return start.by_segment == end.by_segment and end.const <= end.by_segment


def _said(node: fx.Node) -> str:
    return f"{target_name(node.target)} at {node.meta.get('source', '?')}"


NOTHING = Carried()

__all__ = ["NOTHING", "Carried", "CarriedCell", "CarriedTap", "Refill", "carried"]
