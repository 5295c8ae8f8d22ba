"""Repeats: find the layers in the graph itself, where the calls of modules do not show them.

    for l in range(2):                     linear(x, up[0])     cell (0, 0)     one place, used with
        x = x + f(linear(x, up[l]))   ->   tanh                 cell (0, 0)     the weights up[0], up[1], once
                                           linear(x, up[1])     cell (0, 1)     each in every segment
                                           tanh                 cell (0, 1)

A *site* is an operand of an operation at one place of the user's code.  A site that is used with several
weights in turn, each of them equally often a segment, lies in the body of the loop over layers, and the
weight says which layer it is.  Weights are parameters, tensors in lists, arguments, or what is computed from
such alone (`w[l]` of a stacked tensor, `w[l].T`).  Between the first and the last of a cell's sites all
operations are the cell's; what stands alike before and after them in all layers of a segment is too.

Requires: a functional, value-numbered graph in the order of the forward.  Gives `Layers`.  Where a cell ends
changes how much runs in parallel, never a value; nodes that belong to no cell are placed by `partition`.
Reference: loop rerolling by repeated subsequences.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from rmtcompile.binding.captured import Call
from rmtcompile.errors import PartitionError
from rmtcompile.passes.grid.partition import Layers, NoLayersError, call_sizes, feeding, find_layers

Cell = tuple[int, int]

_SHOWN = 0.3
"""Share of the operations that calls of layers hold at least; with less, the graph is looked at."""


def layers_of(
    graph: fx.Graph, calls: Sequence[Call], n_segments: int, named: str | None = None
) -> Layers:
    """The layers that module calls show, or else those that the graph shows.

    Args:
        graph: numbered, in the order of the forward.
        calls: module calls of the forward.
        n_segments: segments in this capture.
        named: the user's choice of layers, see `find_layers`.

    Raises:
        PartitionError: neither shows any, or layers do not run equally often in each segment.
    """
    try:
        layers, shown = _called(graph, calls, n_segments, named)
    except NoLayersError as error:
        if named is not None:
            raise
        found = find_repeats(graph, n_segments)
        if found is None:
            raise PartitionError(
                "no repeated layers were found, neither among the module calls nor in the operations",
                error.evidence,
                error.remedy,
            ) from None
        return found
    if named is None and shown < _SHOWN:
        found = find_repeats(graph, n_segments)
        if found is not None and len(found.cell_of_node) > shown * _operations(graph):
            return found
    return layers


def inside_layers(
    graph: fx.Graph, calls: Sequence[Call], n_segments: int, named: str | None = None
) -> Callable[[fx.Node], bool]:
    """Whether a node of a graph that is not numbered yet lies inside a layer, as far as module calls show;
    where they show too little, all nodes do."""
    try:
        layers, shown = _called(graph, calls, n_segments, named)
    except NoLayersError:
        return lambda node: True
    if named is None and shown < _SHOWN:
        return lambda node: True
    return lambda node: any(call in layers.cell_of_call for call in node.meta.get("scope", ()))


def _called(
    graph: fx.Graph, calls: Sequence[Call], n_segments: int, named: str | None
) -> tuple[Layers, float]:
    """The layers that module calls show, and the share of the operations that they hold."""
    sizes = call_sizes(graph, calls)
    layers = find_layers(calls, sizes, n_segments, named, feeding(graph))
    held = sum(sizes.get(index, 0) for index in layers.cell_of_call)
    return layers, held / max(1, _operations(graph))


def _operations(graph: fx.Graph) -> int:
    return sum(node.op == "call_function" for node in graph.nodes)


def find_repeats(graph: fx.Graph, n_segments: int) -> Layers | None:
    """Layers by the weights that one line of code is used with; None where no place is used with several."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    fixed = _fixed(graph)
    varying = [node for node in nodes if node not in fixed and "scopes" not in node.meta]
    counts = [(site, _by_weight(uses, n_segments)) for site, uses in _sites(varying, fixed).items()]
    sites = [by_weight for _, by_weight in counts if by_weight is not None]
    n_layers = _n_layers(sites)
    if n_layers < 2:
        return None
    anchors: dict[fx.Node, set[Cell]] = defaultdict(set)
    for by_weight in sites:
        if len(by_weight) % n_layers == 0:
            _anchor(by_weight, n_layers, n_segments, anchors)
    single = {node: next(iter(cells)) for node, cells in anchors.items() if len(cells) == 1}
    spans = _spans(varying, single)
    if len(spans) != n_layers * n_segments:
        return None
    return Layers(tuple(f"layer {l}" for l in range(n_layers)), {}, _widened(varying, spans))


def _fixed(graph: fx.Graph) -> set[fx.Node]:
    """Parameters and constants, and what is computed from them alone."""
    fixed: set[fx.Node] = set()
    for node in graph.nodes:
        alone = node.op == "call_function" and all(operand in fixed for operand in node.all_input_nodes)
        if node.op == "get_attr" or alone:
            fixed.add(node)
    return fixed


def _sites(varying: list[fx.Node], fixed: set[fx.Node]) -> dict[Any, list[tuple[fx.Node, fx.Node]]]:
    """For each operand at each place, the (operation, weight) pairs in order. A place is an instruction, and
    also an instruction with the one that called its function, for functions that a layer calls several times.
    """
    sites: dict[Any, list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
    for node in varying:
        for i, operand in enumerate(node.all_input_nodes):
            if operand in fixed or operand.op == "placeholder":
                for depth in (1, 2):
                    sites[node.target, node.meta.get("site", ())[:depth], i].append((node, operand))
    return sites


def _by_weight(uses: list[tuple[fx.Node, fx.Node]], n_segments: int) -> list[list[fx.Node]] | None:
    """The operations by weight, if there are several weights and each is used equally often a segment."""
    by_weight: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node, weight in uses:
        by_weight[weight].append(node)
    counts = {len(found) for found in by_weight.values()}
    if len(by_weight) < 2 or len(counts) != 1 or next(iter(counts)) % n_segments:
        return None
    return list(by_weight.values())


def _n_layers(sites: list[list[list[fx.Node]]]) -> int:
    """The number of layers that explains most operations: a site may see several weights of one layer."""

    def explained(n: int) -> int:
        return sum(sum(map(len, site)) for site in sites if len(site) % n == 0)

    candidates = {len(site) for site in sites}
    return max(candidates, key=lambda n: (explained(n), n), default=0)


def _anchor(
    by_weight: list[list[fx.Node]], n_layers: int, n_segments: int, anchors: dict[fx.Node, set[Cell]]
) -> None:
    """The cells of a site's operations: the weight gives the layer, the count of its uses the segment."""
    for w, found in enumerate(by_weight):
        for u, node in enumerate(found):
            anchors[node].add((u * n_segments // len(found), w * n_layers // len(by_weight)))


def _spans(varying: list[fx.Node], anchors: dict[fx.Node, Cell]) -> dict[Cell, tuple[int, int]]:
    """First and last position of each cell's anchors; empty where cells are interleaved."""
    spans: dict[Cell, tuple[int, int]] = {}
    latest: Cell | None = None
    for position, node in enumerate(varying):
        cell = anchors.get(node)
        if cell is None:
            continue
        if cell in spans and cell != latest:
            return {}
        spans[cell] = (spans.get(cell, (position, position))[0], position)
        latest = cell
    return spans


def _widened(varying: list[fx.Node], spans: dict[Cell, tuple[int, int]]) -> dict[fx.Node, Cell]:
    """The cell of each node: from its first to its last anchor, and as far around as all layers of the
    segment have the same."""
    inside = {node: cell for cell, (a, b) in spans.items() for node in varying[a : b + 1]}
    before, after = _around(varying, spans, inside)
    found = dict(inside)
    for cell in sorted(spans, key=lambda cell: spans[cell]):
        row = [other for other in spans if other[0] == cell[0]]
        n_after = _common([after[other] for other in row])
        n_before = _common([before[other][::-1] for other in row])
        for node in (*after[cell][:n_after], *before[cell][::-1][:n_before]):
            found.setdefault(node, cell)
    reads = _cells_read(varying, found)
    if all(_precedes(other, cell) for node, cell in found.items() for other in reads[node]):
        return found
    return inside


def _around(
    varying: list[fx.Node], spans: dict[Cell, tuple[int, int]], inside: dict[fx.Node, Cell]
) -> tuple[dict[Cell, list[fx.Node]], dict[Cell, list[fx.Node]]]:
    """By cell, in order: what it needs of the nodes since the cell before, and what needs it of the nodes up
    to the next cell. Neither reads what the cell itself may not: a later segment, a later layer."""
    order = sorted(spans, key=lambda cell: spans[cell])
    bounds = [-1, *(end for cell in order for end in spans[cell]), len(varying)]
    reads = _cells_read(varying, inside)
    before: dict[Cell, list[fx.Node]] = {}
    after: dict[Cell, list[fx.Node]] = {}
    for i, cell in enumerate(order):
        legal = lambda node, cell=cell: all(_precedes(other, cell) for other in reads[node])  # noqa: E731
        gap = varying[bounds[2 * i] + 1 : bounds[2 * i + 1]]
        needed = _ancestors(varying[bounds[2 * i + 1] : bounds[2 * i + 2] + 1], set(gap))
        before[cell] = [node for node in gap if node in needed and legal(node)]
        gap = varying[bounds[2 * i + 2] + 1 : bounds[2 * i + 3]]
        results = [node for node in gap if cell in reads[node] and legal(node)]
        needed = _ancestors(results, set(gap)) | set(results)
        after[cell] = [node for node in gap if node in needed and legal(node)]
    return before, after


def _precedes(other: Cell, cell: Cell) -> bool:
    """Whether `cell` may read `other`: an earlier segment, or the same one up to the same layer."""
    return other[0] < cell[0] or (other[0] == cell[0] and other[1] <= cell[1])


def _cells_read(varying: list[fx.Node], inside: dict[fx.Node, Cell]) -> dict[fx.Node, set[Cell]]:
    """The cells that a node reads, seen through nodes that lie in none."""
    reads: dict[fx.Node, set[Cell]] = {}
    for node in varying:
        found: set[Cell] = set()
        for operand in node.all_input_nodes:
            found |= {inside[operand]} if operand in inside else reads.get(operand, set())
        reads[node] = found
    return reads


def _ancestors(nodes: list[fx.Node], among: set[fx.Node]) -> set[fx.Node]:
    """The nodes of `among` that `nodes` are computed from, by way of nodes of `among` alone."""
    pending = list(nodes)
    found: set[fx.Node] = set()
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand in among and operand not in found:
                found.add(operand)
                pending.append(operand)
    return found


def _common(sequences: list[list[fx.Node]]) -> int:
    """How many operations all sequences begin with, by operation, line and type."""
    tokens = [[_token(node) for node in sequence] for sequence in sequences]
    length = min(map(len, tokens))
    return next((i for i in range(length) if len({t[i] for t in tokens}) > 1), length)


def _token(node: fx.Node) -> Any:
    val = node.meta.get("val")
    return (node.target, node.meta.get("site", ())[:1], str(getattr(val, "shape", None)))
