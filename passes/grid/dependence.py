"""Dependence: which cells need which, as offsets (segments, layers), consumer minus producer.

    cell (s, l) reads h of cell (s, l - 1)      (0, 1)
    cell (s, l) reads A of cell (s - 1, l)      (1, 0)
    prologue(s) reads h of cell (s - 1, L - 1)  (1, 1 - L) towards layer 0

Requires: rules from `reroll`.  Gives: every offset with a witness: the operation that reads, the one that is
read, and the lines they come from.  A value that passes through a prologue or an epilogue counts from the
cell that made it to the cell that uses it.  Reference: distance vectors of loop-carried dependences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from rmtcompile.errors import DependenceError
from rmtcompile.ir.program import Source
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, PROLOGUE, Region
from rmtcompile.passes.grid.reroll import Rolled

Offset = tuple[int, int]


@dataclass(frozen=True)
class Dependence:
    """One offset, the place in the program that shows it, and the layers of its consumer and its producer."""

    offset: Offset
    consumer: str
    producer: str
    reason: str
    layers: tuple[int, int] = (0, 0)

    def described(self, paths: tuple[str, ...]) -> str:
        """The dependence in words, with the layers' module paths."""
        reader, writer = (paths[layer] for layer in self.layers)
        text = f"offset {self.offset}: {self.consumer}, for {reader}, reads {self.producer}, from {writer}"
        return f"{text}, {self.reason}" if self.reason else text


@dataclass(frozen=True)
class Edge:
    """A read of a cell's value: the layers of its two ends, the place that reads, and the value it gets."""

    offset: Offset
    consumer: int
    producer: int
    kind: str
    source: Source
    reader: fx.Node
    read: object


def edges(rolled: Rolled) -> Iterator[Edge]:
    """Every read of a cell's value by a cell, directly or through a prologue or an epilogue."""
    last = rolled.n_layers - 1
    for (kind, layer), by_class in rolled.rules.items():
        if kind not in (CELL, PROLOGUE):
            continue
        consumer = layer if kind == CELL else 0
        for number, rule in by_class.items():
            for j, (live_in, node) in enumerate(zip(rule.sources, rule.body.live_ins, strict=True)):
                late = _late_node(rolled, (kind, layer), number, j) or node
                for segment, source in _instances(live_in, rolled, (kind, layer), number):
                    read = node if segment in live_in.early else late
                    for back, producer in _cells_behind(source, segment, last):
                        reader = _first_reader(rule.body.nodes, node)
                        offset = (back, consumer - producer)
                        yield Edge(offset, consumer, producer, kind, source, reader, read)


def dependences(rolled: Rolled) -> dict[Offset, Dependence]:
    """All offsets between cells, each with its first witness.

    Raises:
        DependenceError: a cell needs a later cell of its own segment.
    """
    found: dict[Offset, Dependence] = {}
    for edge in edges(rolled):
        if edge.offset not in found:
            found[edge.offset] = _witness(edge)
    backward = [d for (ds, dl), d in found.items() if ds < 0 or (ds == 0 and dl < 1)]
    if backward:
        raise DependenceError(
            "a layer needs a later layer of the same segment",
            [f"{d.consumer} reads {d.producer}, offset {d.offset}" for d in backward],
            "name the layers with layers='path.to.container'",
        )
    return found


def _witness(edge: Edge) -> Dependence:
    back, producer = edge.offset[0], edge.producer
    return Dependence(
        edge.offset,
        f"{_name(edge.kind, 's', edge.consumer)} {edge.reader.name} ({edge.reader.meta.get('source', '?')})",
        f"{_name(CELL, f's - {back}' if back else 's', producer)} "
        f"{getattr(edge.read, 'name', edge.read)} ({_meta(edge.read, 'source')})",
        "" if edge.source.kind == CELL else f"through the {edge.source.kind} of that segment",
        (edge.consumer, producer),
    )


def _instances(
    live_in: object, rolled: Rolled, key: tuple[str, int], number: int
) -> Iterator[tuple[int, Source]]:
    """(consumer segment, source) pairs that stand for all: the early ones, and one far from both ends."""
    early = live_in.early  # type: ignore[attr-defined]
    steady = live_in.steady  # type: ignore[attr-defined]
    yield from early.items()
    if isinstance(steady, Source) and (steady.relative or steady.kind in (CELL, EPILOGUE)):
        head = rolled.classes[key].head
        yield (
            (number if 0 <= number < head else max(head, steady.segment, 1 + max(early, default=-1))),
            steady,
        )


def _cells_behind(source: Source, segment: int, last: int) -> Iterator[tuple[int, int]]:
    """(segments back, layer) of the cell that a source stands for; an epilogue stands for the last layer."""
    if source.kind == CELL:
        yield segment - source.segment_from(segment), source.layer
    elif source.kind == EPILOGUE:
        yield segment - source.segment_from(segment), last


def _late_node(rolled: Rolled, key: tuple[str, int], number: int, j: int) -> object:
    """The live-in as the last captured segment of the class reads it: a carried value, not an initial one."""
    kind, layer = key
    for segment in reversed(range(rolled.base.count)):
        body = rolled.base.bodies.get(Region(kind, segment, layer))
        if body is None or rolled.classes[key].of(segment, rolled.base.count) != number:
            continue
        if j < len(body.live_ins) and body.live_ins[j] is not None:
            return body.live_ins[j]
    return None


def _first_reader(nodes: tuple[fx.Node, ...], live_in: object) -> fx.Node:
    wanted = live_in if isinstance(live_in, tuple) else (live_in,)
    return next(node for node in nodes if any(operand in wanted for operand in node.all_input_nodes))


def _meta(node: object, key: str) -> str:
    return str(getattr(node, "meta", {}).get(key, "?"))


def _name(kind: str, segment: str, layer: int) -> str:
    return f"cell ({segment}, {layer})" if kind == CELL else f"{kind}({segment})"
