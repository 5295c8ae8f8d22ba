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
from rmtcompile.ir.segmentation import Cuts
from rmtcompile.passes.flat.functionalise import overload_name
from rmtcompile.passes.flat.segments import Segments
from rmtcompile.passes.flat.store_forwarding.nodes import as_load
from rmtcompile.passes.grid.partition import Layers, call_sizes, feeding, find_layers, split_index
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
    if named is None and (mixed := _mixed(calls, n_segments)) is not None:
        return mixed
    try:
        outer = find_layers(calls, sizes, 1, named, feeds)
    except PartitionError:
        return None
    members = [call for call in calls if call.index in outer.cell_of_call]
    if len({call.module for call in members}) < len(members):
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


def _mixed(calls: Sequence[Call], n_segments: int) -> Layers | None:
    """Layers of several lists, of which some are called for each segment and some once for all of them; the
    model's own loop goes over layers outside.

        mem.0  mem.0  mem.0  ff.0        layer 0
        mem.1  mem.1  mem.1  ff.1        layer 1
    """
    by_parent: dict[int | None, dict[str, dict[int, list[Call]]]] = defaultdict(dict)
    for call in calls:
        if (indexed := split_index(call.path)) is not None:
            name, index = indexed
            by_parent[call.parent].setdefault(name, {}).setdefault(index, []).append(call)
    for lists in by_parent.values():
        each = list(lists.values())
        rows = sorted(each[0])
        times = {tuple({len(found) for found in one.values()}) for one in each}
        members = sorted((call.index, i) for one in each for i, found in one.items() for call in found)
        turns = [i for _, i in members]
        is_even = all(sorted(one) == rows for one in each) and times == {(1,), (n_segments,)}
        if is_even and turns == sorted(turns) and n_segments > 1 and len(rows) > 1:
            paths = (" + ".join(one[i][0].path for one in each) for i in rows)
            return Layers(tuple(paths), {index: (0, rows.index(i)) for index, i in members})
    return None


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
        if node.op == "call_function" and segments.of(node) >= 0 and not _is_input(node, cuts):
            own = {layer for _, layer in cells_of(node, layers)}
            if len(own) == 1:
                found[node] = segments.of(node), next(iter(own))
    whole = _whole(graph, segments, n_segments)
    found = {node: cell for node, cell in found.items() if node not in whole or whole[node]}
    _check_complete(graph, found, layers, n_segments, whole, cuts)
    return Layers(layers.paths, {}, found)


def _is_input(node: fx.Node, cuts: Cuts) -> bool:
    """Whether a node takes a part of an input: where it lies differs from segment to segment."""
    view = as_load(node)
    return view is not None and view.source.target in cuts


def _whole(graph: fx.Graph, segments: Segments, n_segments: int) -> dict[fx.Node, bool]:
    """Joins of the pieces of all segments, and what is made of them; whether any segment's own value is.

    What is made for results alone belongs to no cell. A window over all segments of a short capture is a join
    like these; what is made of it is a piece of another one.
    """
    joins: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if overload_name(node) in ("cat", "stack") and segments.of(node) == n_segments - 1:
            pieces: list[fx.Node] = list(node.args[0])
            if {segments.of(piece) for piece in pieces} >= set(range(n_segments)):
                joins[node] = pieces
    whole: dict[fx.Node, bool] = {}
    for join in joins:
        reached, pending = {join}, [join]
        while pending:
            for user in pending.pop().users:
                if user.op != "output" and user not in reached:
                    reached.add(user)
                    pending.append(user)
        inner = any(
            not reached.isdisjoint(pieces) and not reached.issuperset(pieces) for pieces in joins.values()
        )
        for node in reached:
            whole[node] = whole.get(node, False) or inner
    return whole


def _check_complete(
    graph: fx.Graph,
    cells: dict[fx.Node, tuple[int, int]],
    layers: Layers,
    n_segments: int,
    whole: dict[fx.Node, bool],
    cuts: Cuts,
) -> None:
    """Each layer has operations for each segment, or something mixes the segments."""
    by_layer: dict[int, set[int]] = defaultdict(set)
    for segment, layer in cells.values():
        by_layer[layer].add(segment)
    for layer, path in enumerate(layers.paths):
        if len(by_layer[layer]) < n_segments:
            raise PartitionError(
                "a layer computes something of all segments at once",
                [*_mixing(graph, whole, cuts), f"{path}: no operation depends on the first segment alone"],
                "what treats each position by itself, or reads the segments before, can be scheduled; "
                "fallback='sequential' runs the model as it is",
            )


def _mixing(graph: fx.Graph, whole: dict[fx.Node, bool], cuts: Cuts) -> list[str]:
    """The first operations that read all segments at once, with their lines."""
    joins = {node for node in whole if overload_name(node) in ("cat", "stack")}
    found: dict[str, None] = {}
    for node in graph.nodes:
        read = [op for op in node.all_input_nodes if op in joins or op.target in cuts]
        if node.op == "call_function" and read and node not in joins and not _is_input(node, cuts):
            found[f"{node.target} at {node.meta.get('source')}"] = None
    return list(found)[:3]
