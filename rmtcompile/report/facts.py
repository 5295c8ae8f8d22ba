"""Facts: what reports take from the graphs of a compiled program, as data that is saved with it.

A program that was loaded from a folder has no graphs; its facts were written when it was saved.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rmtcompile.dispatch.entries import Loaded, is_loaded
from rmtcompile.errors import RMTCompileError
from rmtcompile.passes.cell.lift import cell_by_cell, each_cell
from rmtcompile.passes.emit import target_name
from rmtcompile.passes.grid.partition import CELL, INIT
from rmtcompile.passes.sizes import at
from rmtcompile.report.carries import carries_of, reads_of
from rmtcompile.report.names import op_name
from rmtcompile.report.stages import changes
from rmtcompile.saved import decode, encode, know
from rmtcompile.schedule import Carry, Offset

if TYPE_CHECKING:
    from rmtcompile.compiler.pipeline import Compiled


@dataclass(frozen=True)
class Facts:
    """What is known of a program's graphs.

    Attributes:
        carries, reads: what flows between segments; as a schedule has them.
        bodies: operations of a cell, by (layer, class).
        rules: operations of all different bodies.
        hoisted: operations that run once, by name.
        apart: operations that run cell by cell inside of grouped calls, each with its line.
        optimised: what each pass on the cells changed, in words.
    """

    carries: tuple[Carry, ...]
    reads: tuple[tuple[Offset, tuple[int, ...]], ...]
    bodies: dict[tuple[int, int], int]
    rules: int
    hoisted: tuple[tuple[str, int], ...]
    apart: tuple[str, ...]
    optimised: tuple[tuple[str, str], ...]


know(Carry, Facts)


def facts_of(compiled: Compiled) -> Facts:
    """The facts of a program.

    Raises:
        RMTCompileError: it was loaded, and they were not saved with it.
    """
    if isinstance(compiled.origin, Loaded):
        data = compiled.origin.shelved.report()
        if data is None:
            raise RMTCompileError("what reports need was not saved with this program")
        found: Facts = decode(data)
        return replace(found, carries=tuple(at(carry, compiled.sizes) for carry in found.carries))
    rules = compiled.rolled.rules
    bodies = {rule.body.key: len(rule.body.nodes) for by in rules.values() for rule in by.values()}
    cells = ((key, by) for key, by in rules.items() if key[0] == CELL)
    hoisted = Counter(op_name(node) for node in rules[(INIT, -1)][0].body.nodes)
    return Facts(
        tuple(carries_of(compiled)),
        reads_of(compiled),
        {(key[1], number): len(rule.body.nodes) for key, by in cells for number, rule in by.items()},
        sum(bodies.values()),
        tuple(hoisted.most_common()),
        _apart(compiled),
        tuple(changes(compiled, compiled.passes_off)),
    )


def written(compiled: Compiled) -> Any:
    """The facts of a program, as JSON."""
    return encode(facts_of(compiled))


def _apart(compiled: Compiled) -> tuple[str, ...]:
    """Operations of the cells that no grouped call can do, each with its line."""
    nodes = [node for cell in compiled.emitted.cells for node in cell.graph.nodes]
    found = (node for node in nodes if node.target is cell_by_cell)
    words = [f"{target_name(node.args[0])} at {node.meta.get('source', '?')}" for node in found]
    grown = (node for node in nodes if node.target is each_cell)
    words += [
        f"{target_name(node.args[0].op)} at {node.meta.get('source', '?')}, on what grows with the segments"
        for node in grown
    ]
    return tuple(dict.fromkeys(words))


__all__ = ["Facts", "facts_of", "is_loaded", "written"]
