"""Layer-major: find the grid where the loop over layers is outside, and each layer walks the segments itself.

    for layer in layers: x = layer(x)          layers.0 is called once; inside, in turn:
                                        =>     cell (0, 0), cell (1, 0), cell (2, 0), ...

A module call shows the layer of a node there; its segment is the last one whose input it depends on, once
operations on the whole input are taken apart (`strip_mine`).  The grid is the same as that of a forward which
walks the layers inside of the segments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import fx

from rmtcompile.binding.captured import Call
from rmtcompile.errors import PartitionError
from rmtcompile.passes.flat.strip_mine import Cuts, Segments
from rmtcompile.passes.grid.partition import Layers, call_sizes, feeding, find_layers
from rmtcompile.passes.grid.partition.place import cells_of

_MOST = 0.6
"""Share of the work of modules called once that layers inside of one of them hold at most, if the loop over
segments is to lie in these modules."""


def layer_major(
    graph: fx.Graph, calls: Sequence[Call], n_segments: int, named: str | None = None
) -> Layers | None:
    """The layers that are called once each, for all segments; None where layers are called once a segment.

    Their cells are those of one segment: (0, layer).

    Args:
        graph: not numbered yet.
        calls: module calls of the forward.
        n_segments: segments in this capture.
        named: the user's choice of layers, see `find_layers`.
    """
    sizes, feeds = call_sizes(graph, calls), feeding(graph)
    try:
        outer = find_layers(calls, sizes, 1, named, feeds)
    except PartitionError:
        return None
    members = [call for call in calls if call.index in outer.cell_of_call]
    if len({call.module for call in members}) < len(members) or len(outer.paths) < 2:
        return None  # modules called several times: by segments
    try:
        inner = find_layers(calls, sizes, n_segments, named, feeds)
    except PartitionError:
        return outer
    held = {i: _ancestor(calls[i], calls, outer) for i in inner.cell_of_call}
    if any(above is None or above == i for i, above in held.items()):
        return None
    work = [sum(sizes.get(i, 0) for i in layers.cell_of_call) for layers in (inner, outer)]
    return outer if work[0] < _MOST * work[1] else None


def _ancestor(call: Call, calls: Sequence[Call], layers: Layers) -> int | None:
    """The layer's call inside which a call was made, or which it is."""
    index: int | None = call.index
    while index is not None and index not in layers.cell_of_call:
        index = calls[index].parent
    return index


def cells_by_segment(graph: fx.Graph, layers: Layers, cuts: Cuts, n_segments: int) -> Layers:
    """The cells of a layer-major forward: layers from the calls, segments from what is read of the input.

    Args:
        graph: numbered; operations on the whole input are taken apart.
        layers: what `layer_major` gave.

    Raises:
        PartitionError: a layer computes something of all segments at once.
    """
    segments = Segments(cuts, n_segments)
    found: dict[fx.Node, tuple[int, int]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and segments.of(node) >= 0:
            own = {layer for _, layer in cells_of(node, layers)}
            if len(own) == 1:
                found[node] = segments.of(node), next(iter(own))
    leaving = _leaving(graph, found)
    found = {node: cell for node, cell in found.items() if node not in leaving}
    _check_complete(found, layers, n_segments)
    return Layers(layers.paths, {}, found)


def _leaving(graph: fx.Graph, cells: dict[fx.Node, tuple[int, int]]) -> set[fx.Node]:
    """Joins of several segments, and what is made of them, that no cell reads: results."""
    joins: set[fx.Node] = set()
    for node in graph.nodes:
        read = {cells[operand][0] for operand in node.all_input_nodes if operand in cells}
        if len(read) > 2 or (len(read) > 1 and node.all_input_nodes == list(node.args[0])) if _is_join(
            node
        ) else not joins.isdisjoint(node.all_input_nodes):
            joins.add(node)
    for node in reversed(graph.nodes):
        if node in joins and not all(user.op == "output" or user in joins for user in node.users):
            joins.discard(node)
    return joins


def _is_join(node: fx.Node) -> bool:
    return getattr(node.target, "_opname", "") in ("cat", "stack")


def _check_complete(cells: dict[fx.Node, tuple[int, int]], layers: Layers, n_segments: int) -> None:
    """Each layer has operations for each segment, or something mixes the segments."""
    by_layer: dict[int, set[int]] = defaultdict(set)
    for segment, layer in cells.values():
        by_layer[layer].add(segment)
    for layer, path in enumerate(layers.paths):
        missing = [s for s in range(n_segments) if s not in by_layer[layer]]
        if missing:
            raise PartitionError(
                "a layer computes something of all segments at once",
                [f"{path}: no operation depends on segments up to {missing[0]} alone"],
                "use fallback='sequential' to run the model as it is",
            )
