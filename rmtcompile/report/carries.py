"""What flows from segment to segment, and which layers read by which offset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import fx

from rmtcompile.ir.program import Source
from rmtcompile.passes.grid.dependence import edges
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, PROLOGUE
from rmtcompile.report.names import lane_names, op_name
from rmtcompile.schedule import Carry, Offset

if TYPE_CHECKING:
    from rmtcompile.compiler.pipeline import Compiled
    from rmtcompile.ir.program import Feed, Lane


def carries_of(compiled: Compiled) -> list[Carry]:
    """The values that cells of one segment leave to cells of a later one."""
    return list(dict.fromkeys([*_between_cells(compiled), *_around_cells(compiled)]))


def values_of(compiled: Compiled) -> list[Carry]:
    """The values that cells leave to other cells of the same segment, such as what goes up the layers."""
    return list(dict.fromkeys(_between_cells(compiled, later=False)))


def reads_of(compiled: Compiled) -> tuple[tuple[Offset, tuple[int, ...]], ...]:
    """The layers that read by each offset, as `Schedule.reads` has them."""
    found: dict[Offset, set[int]] = {}
    for edge in edges(compiled.rolled):
        found.setdefault(edge.offset, set()).add(edge.consumer)
    return tuple((offset, tuple(sorted(layers))) for offset, layers in sorted(found.items()))


def _between_cells(compiled: Compiled, later: bool = True) -> Iterator[Carry]:
    """One for each feed of a lane that goes to a later segment, or to the same one."""
    names = lane_names(compiled)
    for lane in compiled.program.lanes:
        size = torch.empty((), dtype=lane.dtype).element_size()
        for n in lane.shape:
            size *= n
        for feed in lane.feeds:
            if bool(feed.offset[0]) == later:
                yield Carry(
                    names.get(lane.name, lane.name),
                    feed.offset,
                    tuple(lane.shape),
                    str(lane.dtype),
                    size,
                    tuple(feed.layers),
                    _written_at(compiled, feed),
                )


def _written_at(compiled: Compiled, feed: Feed) -> str:
    """`file:line` of the operation whose value a feed hands on, through other lanes if need be."""
    lanes: dict[str, Lane] = {lane.name: lane for lane in compiled.program.lanes}
    seen: set[str] = set()
    while not feed.group:
        feeds = lanes[feed.source].feeds
        if feed.source in seen or not feeds:
            return ""
        seen.add(feed.source)
        feed = feeds[0]
    group = next(group for group in compiled.program.groups if group.name == feed.group)
    output = next(node for node in group.graph.nodes if node.op == "output")
    values = output.args[0]
    assert isinstance(values, (list, tuple))
    value = values[group.outputs.index(feed.source)]
    return str(value.meta.get("source", "")) if isinstance(value, fx.Node) else ""


def _around_cells(compiled: Compiled) -> Iterator[Carry]:
    """What a prologue reads of an earlier segment's last layer, as classic RMT does."""
    rolled = compiled.rolled
    last = rolled.n_layers - 1
    seen: set[tuple[object, ...]] = set()
    for rule in rolled.rules[(PROLOGUE, -1)].values():
        for live_in, node in zip(rule.sources, rule.body.live_ins, strict=True):
            source = live_in.steady
            if not isinstance(source, Source) or source.kind not in (CELL, EPILOGUE) or not source.relative:
                continue
            val = node.meta.get("val") if isinstance(node, fx.Node) else None
            if not source.segment or source.identity in seen or not isinstance(val, torch.Tensor):
                continue
            seen.add(source.identity)
            writer = source.layer if source.kind == CELL else last
            made = _made(compiled, source)
            yield Carry(
                op_name(made) if made is not None else "memory",
                (source.segment, -writer),
                tuple(int(n) for n in val.shape),
                str(val.dtype),
                val.numel() * val.element_size(),
                (writer,),
                str(made.meta.get("source", "")) if made is not None else "",
                "the prologue" if source.kind == CELL else "the epilogue and the prologue",
            )


def _made(compiled: Compiled, source: Source) -> fx.Node | None:
    """The operation behind a source, in the last class of its region."""
    rules = compiled.rolled.rules[(source.kind, source.layer)]
    number, index = source.nodes[-1]
    return rules[number].body.nodes[index] if number in rules else None
