"""Partition: every node of the flat graph gets its place on the layer x segment grid.

    slice, embedding, cat      ->  prologue(s)
    layers.2 ... (2nd call)    ->  cell (1, 2)
    norm, head                 ->  epilogue(s)
    arange, cos, masks         ->  init (the same for all segments)

The layers are found from the module calls: sibling modules that the forward calls in turn, once a segment
(`repeats` finds them where there are no such modules).
Nodes between calls are placed by their dependences, then moved next to the layer they belong to where the
layers beside it show so.

Requires: a functional, value-numbered graph with meta `scope`/`scopes`.  Ensures: the regions form an acyclic
graph; where a node is placed changes only how much runs in parallel, never a value.
"""

from __future__ import annotations

import operator

from torch import fx

from rmtcompile.errors import CircleError
from rmtcompile.passes.flat.segments import Segments
from rmtcompile.passes.grid.partition.claim import claim
from rmtcompile.passes.grid.partition.layers import call_sizes, feeding, find_layers, split_index
from rmtcompile.passes.grid.partition.lists import complete_lists
from rmtcompile.passes.grid.partition.parts import joined, period_of_parts, skew_of
from rmtcompile.passes.grid.partition.place import cells_of, constant_nodes, place_dependent
from rmtcompile.passes.grid.partition.regions import (
    CELL,
    EPILOGUE,
    INIT,
    PROLOGUE,
    Layers,
    NoLayersError,
    Partition,
    Region,
)
from rmtcompile.passes.grid.partition.sources import place_sources


def partition(
    graph: fx.Graph, layers: Layers, segments: Segments, period: int = 1, may_join: bool = True
) -> Partition:
    """Place every node of `graph`; see the module docstring.

    Args:
        segments: of the model's inputs.
        period: how many of them are taken as one.
        may_join: whether layers may be parts of larger ones, see `parts`.

    Raises:
        CircleError: the regions cannot be ordered.
    """
    region = _placed(graph, layers, segments, period)
    if may_join and skew_of(region) > 1 and (parts := period_of_parts(region, layers)) > 1:
        whole = joined(layers, parts)
        if (other := _ordered(graph, whole, segments, period)) is not None and skew_of(other) == 1:
            layers, region = whole, other
    complete_lists(graph, region)
    region = {node: region[node] for node in graph.nodes if node in region}
    _check_acyclic(region)
    return Partition(-(-segments.n_segments // period), layers, region)


def _ordered(
    graph: fx.Graph, layers: Layers, segments: Segments, period: int
) -> dict[fx.Node, Region] | None:
    """The places of all nodes, if there is an order of cells."""
    region = _placed(graph, layers, segments, period)
    try:
        _check_acyclic(region)
    except CircleError:
        return None
    return region


def _placed(graph: fx.Graph, layers: Layers, segments: Segments, period: int) -> dict[fx.Node, Region]:
    n_segments = segments.n_segments
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    region: dict[fx.Node, Region] = {}
    constant = constant_nodes(nodes)
    for node in nodes:
        cells = cells_of(node, layers)
        if len(cells) == 1 and node not in constant:
            region[node] = Region(CELL, *next(iter(cells)))
    scoped = set(region)
    place_dependent(nodes, region, layers, segments)
    place_sources(nodes, region, segments)
    claim(region, scoped, n_segments, len(layers.paths))
    for node in nodes:  # what crosses a border is a tensor, no tuple of them
        if node.target is operator.getitem and region[node.all_input_nodes[0]].kind == CELL:
            region[node] = region[node.all_input_nodes[0]]
    if period > 1:
        region = _coarse(graph, region, period)
    return {node: region[node] for node in graph.nodes if node in region}


def _coarse(graph: fx.Graph, region: dict[fx.Node, Region], period: int) -> dict[fx.Node, Region]:
    """Places with `period` segments as one. What one of them leaves to the next is then within one segment,
    and belongs to the cell that made it: in its prologue, or in an epilogue that a cell reads."""
    wide = {
        node: at if at.kind == INIT else at._replace(segment=at.segment // period)
        for node in graph.nodes
        if (at := region.get(node)) is not None
    }
    inner: set[fx.Node] = set()
    for node in reversed(wide):
        if wide[node].kind == EPILOGUE:
            readers = [u for u in node.users if u in wide and wide[u].segment == wide[node].segment]
            if any(wide[u].kind != EPILOGUE or u in inner for u in readers):
                inner.add(node)
    found: dict[fx.Node, Region] = {}
    for node, at in wide.items():
        if at.kind == PROLOGUE or node in inner:
            read = [found[operand] for operand in node.all_input_nodes if operand in found]
            layers = [place.layer for place in read if place.kind == CELL and place.segment == at.segment]
            at = Region(CELL, at.segment, max(layers)) if layers else at
        found[node] = at
    return found


def _check_acyclic(region: dict[fx.Node, Region]) -> None:
    import networkx as nx  # a loaded program needs none

    grid: nx.DiGraph = nx.DiGraph()
    witness: dict[tuple[Region, Region], tuple[fx.Node, fx.Node]] = {}
    for node, place in region.items():
        for operand in node.all_input_nodes:
            if operand in region and region[operand] != place:
                grid.add_edge(region[operand], place)
                witness.setdefault((region[operand], place), (operand, node))
    if nx.is_directed_acyclic_graph(grid):
        return
    cycle = nx.find_cycle(grid)
    evidence = []
    for a, b in cycle:
        producer, consumer = witness[(a, b)]
        evidence.append(
            f"{a} -> {b}: {producer} ({producer.meta.get('source')}) feeds "
            f"{consumer} ({consumer.meta.get('source')})"
        )
    raise CircleError(
        "the layers of one segment depend on each other in a circle, so there is no order of cells",
        evidence,
        "name the layers with layers='path.to.container' so that each layer's work lies in one call",
    )


__all__ = ["CELL", "EPILOGUE", "INIT", "PROLOGUE", "Layers", "NoLayersError", "Partition", "Region"]
__all__ += ["call_sizes", "feeding", "find_layers", "partition", "split_index"]
