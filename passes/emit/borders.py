"""Borders: what a block of levels reads of a run, and what it leaves to later blocks and to the host.

    levels   0 .. 15 | 16 .. 23 | 24 .. 31 | 32 ..      a block does the same for any segments
                     ^ lanes; values that a later level reads (`reach`); what the caller reads (`outer`)

A run whose operations between these borders depend on no segment's number can be recorded block by block, and
the recordings serve inputs of any length.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rmtcompile.ir.program import Each, Program, Source
from rmtcompile.passes.emit.calls import Calls, Case
from rmtcompile.passes.emit.cells import CellFunction
from rmtcompile.passes.emit.regions import Regions
from rmtcompile.passes.emit.sizes import names_in
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, INIT, PROLOGUE
from rmtcompile.passes.grid.reroll import ClassRule, LiveIn

GRID = (PROLOGUE, CELL, EPILOGUE)


@dataclass(frozen=True)
class Borders:
    """What crosses the border of a block of levels.

    Attributes:
        obstacle: why levels cannot be recorded apart from the numbers of their segments; empty if they can.
        setup_is_fixed: whether what is computed before the first level reads no input, and depends on no
            number of segments.
        init: places in the body of init that levels read.
        inputs: arguments of the forward that levels read whole.
        reach: for each tap that levels read, the levels from the one on which its segment enters to the last
            on which the value is read.
        outer: taps that are read outside of levels: results, and lists over segments.
        head, tail: numbers of segments from the start and from the end that differ from all others.
        sizes: the free sizes on which anything depends that runs before the last `tail` segments.
    """

    obstacle: str = ""
    setup_is_fixed: bool = False
    init: tuple[int, ...] = ()
    inputs: tuple[str, ...] = ()
    reach: Mapping[str, int] = field(default_factory=dict)
    outer: frozenset[str] = frozenset()
    head: int = 0
    tail: int = 0
    sizes: frozenset[str] = frozenset()


@dataclass
class _Found:
    """What levels read, by reader."""

    init: set[int] = field(default_factory=set)
    inputs: set[str] = field(default_factory=set)
    reach: dict[str, int] = field(default_factory=dict)
    back: int = 0  # segments between a value and its reader at most
    obstacle: str = ""


def borders(
    program: Program,
    regions: Regions,
    cells: Sequence[CellFunction],
    enter: Calls,
    leave: Calls,
    sizes: Collection[str] = (),
) -> Borders:
    """Find the borders of a program with a skew above 0, and with these free sizes."""
    found, late = _Found(), _late_taps(enter, leave)
    for read in _reads_of_levels(program, enter, leave):
        _note(found, read, program.alpha, regions, late)
    for calls in (enter, leave):
        for case in calls.cases:
            if not _views_are_outside(case):
                found.obstacle = f"the {calls.kind} cuts what segments have made by s"
            taken = set(case.parts.before)  # whose shapes are looked at when a run is replayed
            if any(case.rule.varying.get(x) for x in case.parts.inputs if x not in taken):
                found.obstacle = f"the {calls.kind} reads a value whose shape depends on s or S"
    if grown := [lane.name for lane in program.lanes if lane.grows]:
        found.obstacle = f"what later segments read is larger ({grown[0]})"
    return Borders(
        found.obstacle,
        _is_fixed(regions),
        tuple(sorted(found.init)),
        tuple(sorted(found.inputs)),
        found.reach,
        _outer_taps(regions, enter, leave),
        _head(program, regions) + found.back,
        _tail(program, regions),
        _early_names(program, regions, cells).intersection(sizes),
    )


@dataclass(frozen=True)
class _Read:
    """One source that is read inside of levels.

    Attributes:
        at: levels after its segment has entered on which the reader runs.
        segment: the reader's segment, where it is the only one.
    """

    source: Source
    at: int
    segment: int | None = None

    @property
    def back(self) -> int | None:
        """Segments between the value and its reader; None where readers of all segments read one value."""
        if self.source.relative:
            return self.source.segment
        return self.segment - self.source.segment if self.segment is not None else None


def _reads_of_levels(program: Program, enter: Calls, leave: Calls) -> Iterator[_Read]:
    for group in program.groups:
        for port in group.ports:
            yield from (_Read(source, 0) for source in port.sources if port.role != "stacked")
    for lane in program.lanes:
        for entry in lane.entries:
            yield from (_Read(source, entry.layer, segment) for segment, source in entry.early)
            if entry.steady is not None:
                yield _Read(entry.steady, entry.layer)
    for calls, at in ((enter, 0), (leave, program.n_layers - 1)):
        for case in calls.cases:
            read = set(case.parts.inputs)
            for node, live_in in zip(case.rule.body.live_ins, case.rule.sources, strict=True):
                if node in read:
                    yield from (_Read(source, at, segment) for segment, source in _sources(live_in))


def _sources(live_in: LiveIn) -> list[tuple[int | None, Source]]:
    """(segment, source) of a live-in; None for all segments but the early ones."""
    steady = [(None, live_in.steady)] if isinstance(live_in.steady, Source) else []
    return [*live_in.early.items(), *steady]


def _note(found: _Found, read: _Read, alpha: int, regions: Regions, late: frozenset[str]) -> None:
    source, back = read.source, read.back
    if source.kind == INIT:
        found.init.add(source.node)
    elif source.kind == "input":
        found.inputs.add(source.name)
    elif source.kind in GRID:
        tap = regions.tap_name(source)
        if back is None:
            found.obstacle = f"all segments read what segment {source.segment} has left ({tap})"
            return
        if tap in late:
            found.obstacle = f"levels read {tap}, which depends on s or S or reads all segments"
        found.reach[tap] = max(found.reach.get(tap, 0), alpha * back + read.at)
        found.back = max(found.back, back)


def _late_taps(*calls: Calls) -> frozenset[str]:
    """Taps whose values are made after a body, by the host."""
    return frozenset(tap for one in calls for case in one.cases for _, tap in case.kept(after=True))


def _views_are_outside(case: Case) -> bool:
    """Whether what depends on s is taken of inputs and of what is the same for all segments."""
    read = {x for node in case.parts.before for x in node.all_input_nodes}
    return all(
        source.kind not in GRID
        for node, live_in in zip(case.rule.body.live_ins, case.rule.sources, strict=True)
        if node in read
        for _, source in _sources(live_in)
    )


def _is_fixed(regions: Regions) -> bool:
    rule: ClassRule = regions.rolled.rules[(INIT, -1)][0]
    sources = [live_in.steady for live_in in rule.sources]
    return all(a.is_constant for a in rule.ints) and all(
        isinstance(source, Source) and source.kind == "leaf" for source in sources
    )


def _outer_taps(regions: Regions, enter: Calls, leave: Calls) -> frozenset[str]:
    read: list[Any] = [x for x in regions.rolled.outputs if isinstance(x, Each) or x.kind in GRID]
    for calls in (enter, leave):
        for case in calls.cases:
            late = set(case.parts.rest_inputs)
            for node, live_in in zip(case.rule.body.live_ins, case.rule.sources, strict=True):
                if node in late or isinstance(node, tuple):
                    read += [live_in.steady] if isinstance(live_in.steady, Each) else []
                    read += [source for _, source in _sources(live_in) if source.kind in GRID]
    return frozenset(regions.tap_name(source) for source in read)


def _head(program: Program, regions: Regions) -> int:
    """Segments from the start that differ from later ones in what they run or read."""
    early = [segment for lane in program.lanes for entry in lane.entries for segment, _ in entry.early]
    for (kind, _), by_class in regions.rolled.rules.items():
        if kind != INIT:
            early += [s for rule in by_class.values() for live_in in rule.sources for s in live_in.early]
    early += [tap.when[1] for tap in program.taps if tap.when[0] == "at"]
    heads = [classes.head for (kind, _), classes in regions.rolled.classes.items() if kind != INIT]
    return max([*heads, *(s + 1 for s in early)], default=0)


def _tail(program: Program, regions: Regions) -> int:
    """Segments from the end that differ from earlier ones."""
    kept = [tap.when[1] + 1 for tap in program.taps if tap.when[0] == "end"]
    tails = [classes.tail for (kind, _), classes in regions.rolled.classes.items() if kind != INIT]
    return max([*tails, *kept], default=0)


def _early_names(program: Program, regions: Regions, cells: Sequence[CellFunction]) -> frozenset[str]:
    """Names on which what a class counted from the start has depends: integers, shapes, lanes."""
    found: list[Any] = [lane.shape for lane in program.lanes if _is_early(lane.classes)]
    for by_class in regions.rolled.rules.values():
        for rule in (rule for number, rule in by_class.items() if _is_early((number,))):
            found.append(rule.ints)
            found += [regions.shapes.get(node, ()) for node in rule.body.nodes]
    for cell in cells:
        if _is_early(cell.classes):
            found += [(n.args, n.kwargs, n.meta.get("sizes", ())) for n in cell.graph.nodes]
    return frozenset(names_in(found))


def _is_early(classes: Sequence[int] | None) -> bool:
    """Whether one of the classes is counted from the start: it is no class of the last segments alone."""
    return classes is None or max(classes, default=-1) >= 0


__all__ = ["Borders", "borders"]
