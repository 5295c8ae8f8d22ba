"""Emit with alpha = 0: print a program whose cells run layer by layer, many segments at once.

    Program  ->  def init, prologue, cell_..., epilogue      as for any schedule
                 def layer(run, l)                           all segments of layer l in one call a group
                 def forward(run)                            blocks of segments, and in each the layers

A grouped cell has the segment as its leading axis.  What all cells of a layer share, its weights above all,
comes without that axis: a linear is one large product instead of a batch of small ones, and no weight is
stacked.

Requires: a `Program` routed with alpha = 0.  Ensures: the module computes, for any number of segments the
rules cover, what the captured forward computes; memory does not grow with the number of blocks.
"""

from __future__ import annotations

from typing import Any

from rmtcompile.ir.program import Group, Lane, LaneEntry, Program
from rmtcompile.passes.emit.calls import Calls
from rmtcompile.passes.emit.cells import CellFunction
from rmtcompile.passes.emit.levels import ranges
from rmtcompile.passes.emit.regions import Regions
from rmtcompile.passes.emit.text import Writer, outside


def write_rows(
    writer: Writer, regions: Regions, cells: list[CellFunction], enter: Calls, leave: Calls
) -> dict[str, tuple[int, int]]:
    """Print what follows the cell functions but `enter` and `leave`; gives the lines of the only phase."""
    program = regions.program
    _write_fill(writer, regions)
    for group in program.groups:
        _write_calls(writer, group, [cell for cell in cells if cell.group == group.name])
    _write_layer(writer, program)
    regions.write_setup(writer)
    regions.write_outputs(writer)
    return _write_forward(writer, program, enter, leave)


def _write_fill(writer: Writer, regions: Regions) -> None:
    writer.function("fill", ["run", "l"], "What the cells of layer l read that no cell has written.")
    writer.line("S = run.segments")
    entries: dict[Any, tuple[list[str], list[int], LaneEntry]] = {}
    for lane in regions.program.lanes:
        for names, layers, entry in _alike(lane):
            entries.setdefault((lane.classes, tuple(layers), entry.key), ([], layers, entry))[0].extend(names)
    for (classes, _, _), (names, layers, entry) in entries.items():
        _write_entry(writer, regions, classes, names, layers, entry)
    if not entries:
        writer.line("pass")
    writer.end()


def _alike(lane: Lane) -> list[tuple[list[str], list[int], LaneEntry]]:
    """The layers of a lane that get the same values put in, together."""
    found: dict[Any, tuple[list[str], list[int], LaneEntry]] = {}
    for entry in lane.entries:
        found.setdefault(entry.key, ([lane.name], [], entry))[1].append(entry.layer)
    return list(found.values())


def _write_entry(
    writer: Writer, regions: Regions, classes: Any, names: list[str], layers: list[int], entry: LaneEntry
) -> None:
    early, steady = entry.early, entry.steady
    only = "" if classes is None else f", classes={classes!r}"
    only += f", last={max(s for s, _ in early)}" if steady is None else ""
    writer.line(f"for s in run.alive(l, {layers!r}{only}):")
    writer.depth += 1
    regions.write_cases(writer, early, steady, names, "s")
    writer.depth -= 1


def _write_calls(writer: Writer, group: Group, mine: list[CellFunction]) -> None:
    doc = f"Run the cells of window w: segments of one of the layers {ranges(group.layers)}."
    writer.function(f"cells_{group.name}", ["run", "w"], doc)
    args = {port.name: _argument(port, group) for port in group.ports}
    for i, cell in enumerate(mine):
        chosen = i < len(mine) - 1
        if chosen:
            writer.line(f"if run.is_only(w, {set(cell.classes)!r}):")
            writer.depth += 1
        writer.line(f"values = run.call({cell.name}, w,")
        for node in cell.graph.nodes:
            if node.op == "placeholder":
                writer.line(f"    {args[node.name]},")
        writer.line(")")
        writer.line(f"return dict(zip({list(group.outputs)!r}, values))")
        writer.depth -= chosen
    writer.end()


def _argument(port: Any, group: Group) -> str:
    if port.role == "lane":
        return f"run.read({port.source!r}, w)"
    if port.role == "layer":
        return f"run.own({group.name + '.' + port.name!r}, w)"
    if port.role == "mask":
        return f"run.mask({tuple(port.source)!r}, w)"
    return outside(port.source)


def _write_layer(writer: Writer, program: Program) -> None:
    writer.function("layer", ["run", "l"], "Layer l, all segments of the block at once.")
    writer.line("fill(run, l)")
    writer.line("windows = run.windows(l)")
    writer.line("results = [CELLS[w.group](run, w) for w in windows]")
    writer.line("run.write(l, windows, results)")
    writer.end()
    writer.line()
    writer.line()
    writer.line("CELLS = {" + ", ".join(f"{g.name!r}: cells_{g.name}" for g in program.groups) + "}")


def _write_forward(
    writer: Writer, program: Program, enter: Calls, leave: Calls
) -> dict[str, tuple[int, int]]:
    last = program.n_layers - 1
    writer.function(
        "step", ["run", "l"], "Layer l; the block's segments enter before the first and leave after the last."
    )
    for calls, layer in ((enter, 0), (leave, last)):
        if calls is leave:
            writer.line("layer(run, l)")
        writer.line(f"if l == {layer}:")
        writer.line("    for s in run.block:")
        writer.depth += 2
        calls.write_call(writer)
        writer.depth -= 2
    writer.end()
    writer.function("forward", ["run"], "Layer by layer: all segments of a layer run together.")
    writer.line("setup(run)")
    doc = f"{program.block} segments at most, so that memory does not grow with their number"
    first = writer.line(f"for block in run.blocks:  # {doc}")
    writer.line("    run.begin(block)")
    writer.line(f"    for l in range({program.n_layers}):")
    end = writer.line("        run.level(l, step)")
    writer.line("return outputs(run)")
    writer.end()
    return {"steady": (first, end)}


__all__ = ["write_rows"]
