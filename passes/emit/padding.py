"""Padding: whether the last segment's cells may run at the size of a whole segment, and what is around them.

    launched, at the size of the rest      recorded, at the size of a whole segment
    enter(run, S - 1)        -> fill in
                                           cells of the last segment, padded, beside those of the others
                             cut out ->
    leave(run, S - 1)

Between its prologue and its epilogue the last segment has to read nothing but what cells have written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from rmtcompile.ir.program import Program, Source
from rmtcompile.passes.cell.padded import CannotPad, padded
from rmtcompile.passes.emit.cells import CellFunction
from rmtcompile.passes.emit.regions import Regions
from rmtcompile.passes.emit.sizes import Shape, Sized, names_in
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, PROLOGUE


@dataclass(frozen=True)
class Padding:
    """How the last segment's cells run at the size of a whole one.

    Attributes:
        obstacle: why they cannot; empty if they can.
        rest: name of the size that is left over.
        least: the smallest rest that the cells are for.
        entering: for each class of prologues of which the last may be, and each value that it gives to cells,
            a lane that it is filled into.
        leaving: values of the last segment's cells that the last epilogue reads.
        shapes: of values of cells that depend on the rest, by tap.
    """

    obstacle: str = "no size is free"
    rest: str = ""
    least: int = 1
    entering: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    leaving: frozenset[str] = frozenset()
    shapes: Mapping[str, Shape] = field(default_factory=dict)


def padding(
    program: Program, regions: Regions, sized: Sized | None
) -> tuple[Padding, dict[str, CellFunction]]:
    """Find out whether and how; where not, the obstacle says why.

    Returns:
        What the runtime has to know, and the padded functions, by the cell function's name.
    """
    if sized is None or len(sized.rests) != 1:
        return Padding("not one size is left over by whole segments"), {}
    (rest,) = sized.rests
    try:
        cells, least = {}, 1
        for cell, (graph, enough) in _padded_cells(program, sized.cells, rest):
            cells[cell.name] = replace(cell, name=f"{cell.name}_padded", graph=graph)
            least = max(least, enough)
        entering = _entering(program, regions, rest)
        _check_prologue(regions)
        leaving = _leaving(regions)
    except CannotPad as error:
        return Padding(str(error)), {}
    return Padding("", rest, least, entering, leaving, _tap_shapes(program, sized.cells, rest)), cells


def _depends(value: object, rest: str) -> bool:
    return rest in names_in((value,))


def _padded_cells(
    program: Program, cells: Sequence[CellFunction], rest: str
) -> Iterator[tuple[CellFunction, tuple[fx.Graph, int]]]:
    for cell in cells:
        sizes = [(n.meta.get("sizes", ()), n.args, n.kwargs) for n in cell.graph.nodes]
        if not _depends(sizes, rest):
            continue
        if cell.classes != (-1,):
            raise CannotPad(f"cells of other segments than the last one depend on it ({cell.name})")
        group = next(group for group in program.groups if group.name == cell.group)
        ports = {port.name: port for port in group.ports}
        for node in cell.graph.nodes:
            is_open = node.op == "placeholder" and _depends(node.meta.get("sizes", ()), rest)
            if is_open and ports[node.name].role != "lane":
                raise CannotPad(f"what all layers share depends on it ({node.meta.get('source', node.name)})")
        yield cell, padded(cell.graph, rest)


def _last(regions: Regions, kind: str) -> set[int]:
    """The classes of which the last segment may be."""
    numbers = set(regions.rolled.rules[(kind, -1)])
    return {-1} if -1 in numbers else {number for number in numbers if number >= 0}


def _entering(program: Program, regions: Regions, rest: str) -> dict[int, dict[str, str]]:
    """See `Padding.entering`."""
    found: dict[int, dict[str, str]] = {number: {} for number in _last(regions, PROLOGUE)}
    shapes = {lane.name: lane.shape for lane in program.lanes}
    for lane in program.lanes:
        if lane.classes is not None and -1 not in lane.classes:
            continue  # read by other segments
        is_open = _depends(lane.shape, rest)
        for source in (source for entry in lane.entries for source in entry.sources):
            if source.kind != PROLOGUE and is_open:
                raise CannotPad(f"lane {lane.name} is filled with {source}")
            if source.kind != PROLOGUE:
                continue
            is_own = source.relative and not source.segment
            if not is_own and is_open:
                raise CannotPad(f"lane {lane.name} is filled by another segment")
            tap = regions.tap_name(source)
            for number in set(dict(source.nodes)).intersection(found) if is_own else ():
                if shapes[found[number].setdefault(tap, lane.name)] != lane.shape:
                    raise CannotPad(f"{tap} is filled into lanes of several shapes")
    return found


def _read(regions: Regions, kind: str) -> Iterator[Source]:
    """What this region of the last segment reads of the run."""
    for number in _last(regions, kind):
        for live_in in regions.rolled.rules[(kind, -1)][number].sources:
            yield from (x for x in (live_in.steady, *live_in.early.values()) if isinstance(x, Source))


def _check_prologue(regions: Regions) -> None:
    for source in _read(regions, PROLOGUE):
        if source.kind in (PROLOGUE, CELL, EPILOGUE):
            raise CannotPad(f"the last segment's prologue reads {source}")


def _leaving(regions: Regions) -> frozenset[str]:
    """See `Padding.leaving`."""
    found = set()
    for source in _read(regions, EPILOGUE):
        is_own = source.relative and not source.segment
        if source.kind == CELL and is_own:
            found.add(regions.tap_name(source))
        elif source.kind in (CELL, EPILOGUE) or (source.kind == PROLOGUE and not is_own):
            raise CannotPad(f"the last segment's epilogue reads {source}")
    return frozenset(found)


def _tap_shapes(program: Program, cells: Sequence[CellFunction], rest: str) -> dict[str, Shape]:
    """See `Padding.shapes`."""
    found = {}
    groups = {group.name: group for group in program.groups}
    for tap in program.taps:
        for name, output in tap.group_outputs:
            for cell in (cell for cell in cells if cell.group == name):
                results = next(node for node in cell.graph.nodes if node.op == "output").args[0]
                place = list(groups[name].outputs).index(output)
                value = results[place]
                shape = value.meta.get("sizes", ())[1:]
                if _depends(shape, rest):
                    found[tap.name] = shape
    return found


__all__ = ["Padding", "padding"]
