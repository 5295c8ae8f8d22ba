"""What each pass on the cells did: routing and the passes after it, done again one by one.

The compiler keeps the last program only.  These passes take a fraction of a second, so what they did is found
by running them again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import fx

from rmtcompile.ir.program import Program
from rmtcompile.passes.cell.optimise import PASSES, optimise
from rmtcompile.passes.grid.lane_allocation import allocate_lanes
from rmtcompile.report.names import op_name

if TYPE_CHECKING:
    from rmtcompile.compiler.pipeline import Compiled


def programs(compiled: Compiled, switched_off: frozenset[str]) -> Iterator[tuple[str, Program]]:
    """("route", the program as it was routed), then the program after each pass that was on."""
    program = allocate_lanes(compiled.rolled, compiled.program.offsets, compiled.program.alpha)
    yield "route, align", program
    for name in PASSES:
        if name not in switched_off:
            program = optimise(program, frozenset(PASSES) - {name})
            yield name, program


def changes(compiled: Compiled, switched_off: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Each pass after routing, with what it changed in words."""
    for (_, before), (name, after) in pairwise(programs(compiled, switched_off)):
        if after is before:
            yield name, "nothing to do"
        elif after.groups == before.groups:
            yield name, _placements(after)
        else:
            yield name, difference(cell_counts(before), cell_counts(after)) or "arguments of operations"


def _placements(program: Program) -> str:
    """Where results are stored, in words."""
    kinds = Counter(lane.placement for lane in program.lanes)
    said = {"in_place": "overwritten", "double": "in two buffers", "copy": "copied"}
    return "lanes " + ", ".join(f"{said[kind]}: {count}" for kind, count in kinds.items())


def cell_counts(program: Program) -> dict[str, int]:
    """Operations by name in the graphs of the cells."""
    return counts_of(group.graph for group in program.groups)


def counts_of(graphs: Iterable[fx.Graph]) -> dict[str, int]:
    """Operations by name, over several graphs."""
    return dict(
        Counter(op_name(node) for graph in graphs for node in graph.nodes if node.op == "call_function")
    )


def difference(before: dict[str, int], after: dict[str, int]) -> str:
    """`linear: 24 -> 6, split: 0 -> 2`; empty if nothing changed."""
    names = sorted(before.keys() | after.keys())
    pairs = [(name, before.get(name, 0), after.get(name, 0)) for name in names]
    return ", ".join(f"{name}: {a} -> {b}" for name, a, b in pairs if a != b)
