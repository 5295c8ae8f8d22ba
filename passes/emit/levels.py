"""Levels: the grouped calls of one wavefront, and the loop over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmtcompile.ir.program import Group, Program
from rmtcompile.passes.cell.lift import SEGMENTS
from rmtcompile.passes.cell.padded import REST
from rmtcompile.passes.emit.calls import Calls
from rmtcompile.passes.emit.cells import CellFunction
from rmtcompile.passes.emit.regions import Regions
from rmtcompile.passes.emit.text import Writer, outside


def write_level(
    writer: Writer, program: Program, cells: list[CellFunction], padded: Mapping[str, CellFunction]
) -> None:
    """Print one level.

    Args:
        padded: by name of a cell function, what runs in its place where the last segment is padded.
    """
    writer.function(
        "level", ["run", "t"], f"One wavefront: every cell (s, l) with {level_formula(program)} = t."
    )
    writer.line("windows = run.windows(t)")
    writer.line("moved = run.moves(t)")
    writer.line("results = [CELLS[w.group](run, w) for w in windows]")
    writer.line("move(moved)")
    writer.line("run.write(windows, results)")
    writer.end()
    for group in program.groups:
        mine = [cell for cell in cells if cell.group == group.name]
        writer.function(
            f"cells_{group.name}", ["run", "w"], f"Run the cells of window w, layers {ranges(group.layers)}."
        )
        grown = {n.name for n in group.graph.nodes if n.op == "placeholder" and n.meta.get("grows")}
        args = {port.name: _argument(port, group, port.name in grown) for port in group.ports}
        args |= {SEGMENTS: "w.segments", REST: "run.remainder"}
        for i, cell in enumerate(mine):
            tests = [f"run.is_only(w, {set(cell.classes)!r})"] if i < len(mine) - 1 else []
            if cell.name in padded:
                tests_padded = ["run.remainder is not None", *tests]
                _write_call(writer, padded[cell.name], group, args, " and ".join(tests_padded))
            _write_call(writer, cell, group, args, " and ".join(tests))
        writer.end()
    writer.line()
    writer.line()
    writer.line("CELLS = {" + ", ".join(f"{g.name!r}: cells_{g.name}" for g in program.groups) + "}")


def _write_call(writer: Writer, cell: CellFunction, group: Group, args: Mapping[str, str], test: str) -> None:
    """The call of one cell function, under a condition or always."""
    params = [args[node.name] for node in cell.graph.nodes if node.op == "placeholder"]
    if test:
        writer.line(f"if {test}:")
    writer.depth += bool(test)
    writer.line(f"values = run.call({cell.name}, w,")
    writer.block("\n".join(f"    {param}," for param in params))
    writer.line(")")
    writer.line(f"return dict(zip({list(group.outputs)!r}, values))")
    writer.depth -= bool(test)


def _argument(port: Any, group: Group, grows: bool) -> str:
    if port.role == "lane":
        return f"run.read{'_each' if grows else ''}({port.source!r}, w)"
    if port.role == "weight":
        return f"run.weight({group.name + '.' + port.name!r}, w)"
    if port.role in ("stacked", "rows"):
        return f"run.invariant({group.name + '.' + port.name!r}, w)"
    if port.role == "mask":
        return f"run.mask({tuple(port.source)!r}, w)"
    return outside(port.source)


def level_formula(program: Program) -> str:
    if not program.alpha:
        return f"l, for each block of {program.block} segments"
    return "s + l" if program.alpha == 1 else f"{program.alpha} * s + l"


def ranges(layers: tuple[int, ...]) -> str:
    return (
        f"{layers[0]}..{layers[-1]}"
        if len(layers) == layers[-1] - layers[0] + 1
        else ", ".join(map(str, layers))
    )


def write_forward(writer: Writer, regions: Regions, enter: Calls, leave: Calls) -> dict[str, tuple[int, int]]:
    """Print what runs all levels; gives the first and last line of each phase."""
    regions.write_setup(writer)
    regions.write_outputs(writer)
    writer.function(
        "step",
        ["run", "t"],
        "Level t, with the segment that enters before it and the one that leaves after it.",
    )
    writer.line("if (s := run.entering(t)) is not None:")
    writer.depth += 1
    enter.write_call(writer)
    writer.depth -= 1
    writer.line("fill(run, t)")
    writer.line("level(run, t)")
    writer.line("if (s := run.leaving(t)) is not None:")
    writer.depth += 1
    leave.write_call(writer)
    writer.depth -= 1
    writer.end()
    writer.function(
        "forward", ["run"], "All levels: segments enter one by one, run through the layers, and leave."
    )
    writer.line("setup(run)")
    phases: dict[str, tuple[int, int]] = {}
    for name, doc in (
        ("ramp_up", "ramp-up: one more layer becomes alive with each segment that enters"),
        ("steady", "steady state: full width"),
        ("ramp_down", "ramp-down: no segment enters any more, layers finish one by one"),
    ):
        first = writer.line(f"for t in run.{name}:  # {doc}")
        writer.line("    run.level(t, step)")
        phases[name] = (first, first + 1)
    writer.line("return outputs(run)")
    writer.end()
    return phases
