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

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import networkx as nx
from torch import fx

from rmtcompile.capture import Call
from rmtcompile.errors import PartitionError

INIT, PROLOGUE, CELL, EPILOGUE = "init", "prologue", "cell", "epilogue"


class Region(NamedTuple):
    """A place on the grid; `segment` is -1 for init, `layer` is -1 for all but cells."""

    kind: str
    segment: int = -1
    layer: int = -1

    def __str__(self) -> str:
        if self.kind == CELL:
            return f"cell ({self.segment}, {self.layer})"
        return self.kind if self.kind == INIT else f"{self.kind}({self.segment})"


@dataclass(frozen=True)
class Layers:
    """The layers: their names, and the (segment, layer) of each module call that is one, or of nodes.

    Attributes:
        paths: module paths by layer.
        cell_of_call: by index of the call.
        cell_of_node: where no module is a layer.
    """

    paths: tuple[str, ...]
    cell_of_call: dict[int, tuple[int, int]]
    cell_of_node: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)


class NoLayersError(PartitionError):
    """No module is a layer."""


@dataclass(frozen=True)
class Partition:
    """Region of every node (placeholders, `get_attr` and the output excepted)."""

    n_segments: int
    layers: Layers
    region: dict[fx.Node, Region]

    @property
    def n_layers(self) -> int:
        return len(self.layers.paths)

    def instances(self) -> dict[Region, list[fx.Node]]:
        """Nodes by region, in graph order."""
        found: dict[Region, list[fx.Node]] = defaultdict(list)
        for node, region in self.region.items():
            found[region].append(node)
        return dict(found)


def split_index(path: str) -> tuple[str, int] | None:
    """`blocks.3` -> ("blocks.", 3), `layer2` -> ("layer", 2); None where the path does not end in a
    number."""
    match = re.fullmatch(r"(.*?)(\d+)(\]?)", path)
    return (match[1], int(match[2])) if match else None


def find_layers(
    calls: Sequence[Call], size: dict[int, int], n_segments: int, layers: str | None = None
) -> Layers:
    """Find the modules that are called in turn, once (or equally often) a segment, and hold most of the work.

    Args:
        calls: module calls in the order of the forward.
        size: nodes traced inside each call, nested calls included.
        n_segments: segments in this capture.
        layers: override: the path of the container (`model.layers`) or a regular expression for the layers'
            paths.

    Raises:
        NoLayersError: no such family.
        PartitionError: its members are not called equally often in each segment.
    """
    families: dict[tuple[str | None, str], list[Call]] = defaultdict(list)
    for call in calls:
        parent = None if call.parent is None else calls[call.parent].path
        if layers is not None:
            if re.fullmatch(layers, call.path) or re.fullmatch(
                rf"{re.escape(layers)}\.?\[?\d+\]?", call.path
            ):
                families[(None, layers)].append(call)
            continue
        indexed = split_index(call.path)
        families[(parent, indexed[0] if indexed else call.path)].append(call)
    total = max((size.get(call.index, 0) for call in calls if call.parent is None), default=0) or sum(
        size.values()
    )
    covers = {key: sum(size.get(c.index, 0) for c in found) for key, found in families.items()}
    positions = {key: len(found) / n_segments for key, found in families.items()}
    usable = {key for key in families if len(families[key]) % n_segments == 0 and covers[key] > 0}
    several = [key for key in usable if positions[key] >= 2]
    single = [
        key for key in usable if positions[key] == 1 and key[0] is not None and split_index(f"{key[1]}0")
    ]
    best = max(several, key=lambda key: covers[key], default=None)
    outer = max(
        (key for key in single if split_index(families[key][0].path)),
        key=lambda key: covers[key],
        default=None,
    )
    if outer is not None and (best is None or covers[best] < 0.6 * covers[outer]):
        best = outer
    if best is None:
        raise NoLayersError(
            "no repeated layers were found among the module calls",
            [
                f"{key[1]}: {len(found)} calls for {n_segments} segments"
                for key, found in list(families.items())[:8]
            ],
            "name the layers with layers='path.to.container', or check that the model walks segments and "
            "layers",
        )
    chosen = [best]
    if layers is None:
        chosen += [
            k
            for k in several + single
            if k != best
            and k[0] == best[0]
            and covers[k] >= 0.05 * max(1, total)
            and split_index(families[k][0].path)
            and split_index(families[best][0].path)
        ]
    members = sorted((c for key in chosen for c in families[key]), key=lambda call: call.index)
    return _grid(members, n_segments)


def _grid(members: list[Call], n_segments: int) -> Layers:
    """Give each layer call its (segment, layer): calls come segment by segment, or layer by layer."""
    per_segment, rest = divmod(len(members), n_segments)
    counts: dict[int, int] = defaultdict(int)
    for call in members:
        counts[call.module] += 1
    uneven = [call for call in members if counts[call.module] % n_segments]
    if rest or uneven:
        raise PartitionError(
            "layers are not called equally often in each segment",
            [f"{call.path}: {counts[call.module]} calls for {n_segments} segments" for call in uneven[:6]],
            "layers whose number of calls depends on the segment or on data cannot be scheduled; use "
            "fallback='sequential' to run the model as it is",
        )
    blocks = [members[i * per_segment : (i + 1) * per_segment] for i in range(n_segments)]
    order = [call.module for call in blocks[0]]
    if all([call.module for call in block] == order for block in blocks):
        rows = blocks  # segment by segment
    else:
        columns = [members[i * n_segments : (i + 1) * n_segments] for i in range(per_segment)]
        if any(len({call.module for call in column}) != 1 for column in columns):
            raise PartitionError(
                "the order in which layers are called differs between segments",
                [f"segment {s}: " + ", ".join(c.path for c in block) for s, block in enumerate(blocks[:3])],
                "call the layers in one order, or use fallback='sequential'",
            )
        rows = [[column[s] for column in columns] for s in range(n_segments)]
    layer_of = _merge_columns(rows[0])
    paths: dict[int, list[str]] = defaultdict(list)
    for call, layer in zip(rows[0], layer_of, strict=True):
        paths[layer].append(call.path)
    cells = {
        call.index: (s, layer)
        for s, row in enumerate(rows)
        for call, layer in zip(row, layer_of, strict=True)
    }
    return Layers(tuple(" + ".join(paths[layer]) for layer in sorted(paths)), cells)


def _merge_columns(row: list[Call]) -> list[int]:
    """Neighbouring calls with one index in several containers (`attn.3`, `ffn.3`, `writers.3`) are one
    layer."""
    keys = [split_index(call.path) for call in row]
    layer_of: list[int] = []
    seen: set[str] = set()
    for i, key in enumerate(keys):
        before = keys[i - 1] if i else None
        joins = key is not None and before is not None and key[1] == before[1] and key[0] not in seen
        if not joins:
            seen = set()
        seen.add(key[0] if key else "")
        layer_of.append(layer_of[-1] + (not joins) if layer_of else 0)
    return layer_of


def call_sizes(graph: fx.Graph, calls: Sequence[Call]) -> dict[int, int]:
    """Nodes traced inside each call, nested calls included."""
    size: dict[int, int] = defaultdict(int)
    for node in graph.nodes:
        if node.op == "call_function":
            for index in set(node.meta.get("scope", ())):
                size[index] += 1
    return size


def partition(graph: fx.Graph, layers: Layers, n_segments: int) -> Partition:
    """Place every node of `graph`; see the module docstring.

    Raises:
        PartitionError: the regions cannot be ordered.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    region: dict[fx.Node, Region] = {}
    constant = _constant_nodes(nodes)
    for node in nodes:
        cells = _cells_of(node, layers)
        if len(cells) == 1 and node not in constant:
            region[node] = Region(CELL, *next(iter(cells)))
    scoped = set(region)
    _place_dependent(nodes, region, layers)
    _place_sources(nodes, region, n_segments)
    _claim(region, scoped, n_segments, len(layers.paths))
    ordered = {node: region[node] for node in nodes}
    _check_acyclic(ordered)
    return Partition(n_segments, layers, ordered)


def _cells_of(node: fx.Node, layers: Layers) -> set[tuple[int, int]]:
    if node in layers.cell_of_node:
        return {layers.cell_of_node[node]}
    scopes: Iterable[tuple[int, ...]] = node.meta.get("scopes") or (node.meta.get("scope", ()),)
    cells: set[tuple[int, int]] = set()
    for scope in scopes:
        cells |= {next((layers.cell_of_call[c] for c in scope if c in layers.cell_of_call), (-1, -1))}
    return set() if (-1, -1) in cells else cells


def _constant_nodes(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes that read no tensor at all, not even a parameter: zeros, aranges, masks made of them."""
    constant: set[fx.Node] = set()
    for node in nodes:
        if all(operand in constant for operand in node.all_input_nodes):
            constant.add(node)
    return constant


def _place_dependent(nodes: list[fx.Node], region: dict[fx.Node, Region], layers: Layers) -> None:
    """Place nodes outside layer calls that depend on a cell: between the cells they read and the cells that
    read them."""
    last = len(layers.paths) - 1
    reads: dict[fx.Node, set[tuple[int, int]]] = {}  # cells a node depends on, seen through unplaced nodes
    for node in nodes:
        found: set[tuple[int, int]] = set()
        for operand in node.all_input_nodes:
            if operand in region and region[operand].kind == CELL:
                found.add((region[operand].segment, region[operand].layer))
            else:
                found |= reads.get(operand, set())
        reads[node] = found
    feeds = _first_hits(nodes, region)
    # What reads an earlier segment lies with the layer above, unless it is kept for a later one itself: the
    # further up a reader lies, the earlier it may run.
    kept = {
        _site(node)
        for node in nodes
        if reads[node] and any(s > max(reads[node])[0] for s, _ in feeds[node])
    }
    results = _for_results([n for n in nodes if n not in region and reads[n]], reads, feeds, last)
    # Where later segments have the same code: with the cell below it or above it.
    habits: dict[object, str] = {}
    for first_pass in (True, False):
        placed: dict[fx.Node, Region] = dict(region)
        for node in nodes:
            if node in region or not reads[node]:
                continue
            if node in results:
                before = [placed[op].segment for op in node.all_input_nodes if op in placed]
                placed[node] = Region(EPILOGUE, max([*before, *(s for s, _ in reads[node])]))
                continue
            place, habit = _between(node, reads[node], placed, feeds, last, habits, kept)
            placed[node] = place
            if first_pass and habit and place.segment > 0:
                habits.setdefault(_site(node), habit)
    region.update(placed)


def _for_results(
    nodes: list[fx.Node],
    reads: dict[fx.Node, set[tuple[int, int]]],
    feeds: dict[fx.Node, set[tuple[int, int]]],
    last: int,
) -> set[fx.Node]:
    """Nodes that no cell ever reads, in no segment: what is returned of the layers below the last one.

    In the cells they would tell these layers from the last one, or the last segment, which puts the pieces
    of all segments together, from the others. Where every layer has them (a head a layer) they stay there.
    """
    carried = {_site(node) for node in nodes if feeds[node]}
    tops: dict[object, set[int]] = defaultdict(set)
    for node in nodes:
        tops[_site(node)].add(max(reads[node])[1])
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        lone = len({s for s, _ in reads[node]}) == 1 and last in tops[_site(node)]
        if _site(node) not in carried and not lone:
            if all(user.op == "output" or user in found for user in node.users):
                found.add(node)
    return found


def _site(node: fx.Node) -> object:
    """The place in the user's code that made a node."""
    return (node.target, node.meta.get("source"), len(node.meta.get("scope", ())))


def _between(
    node: fx.Node,
    reads: set[tuple[int, int]],
    region: dict[fx.Node, Region],
    feeds: dict[fx.Node, set[tuple[int, int]]],
    last: int,
    habits: dict[object, str],
    kept: set[object],
) -> tuple[Region, str]:
    """Region of a node between cells, and on which side of it: "below" or "above" ("" where there is no
    choice)."""
    segments = [s for s, _ in reads]
    segments += [region[op].segment for op in node.all_input_nodes if op in region]
    entering = {s for s, _ in _source_segments(node, region, feeds)}
    segment = max([*segments, *entering])
    inside = [layer for s, layer in reads if s == segment]
    later = [layer for s, layer in feeds.get(node, ()) if s == segment]
    if not inside:
        return Region(PROLOGUE, segment), ""
    placed = (region[op] for op in node.all_input_nodes if op in region)
    low = max(*inside, *(place.layer for place in placed if place.segment == segment), -1)
    if low in later:
        return Region(CELL, segment, low), ""  # computed by a cell, and once more outside it
    if later and (high := min(later)) > low:
        carried = any(s < segment and (layer >= high or _site(node) not in kept) for s, layer in reads)
        habit = "above" if carried else habits.get(_site(node), "below") if segment == 0 else "below"
        return Region(CELL, segment, high if habit == "above" else low), habit
    if low < last and all(s > segment for s, _ in feeds.get(node, ())):
        return Region(CELL, segment, low), ""
    return Region(EPILOGUE, segment), ""


def _first_hits(nodes: list[fx.Node], region: dict[fx.Node, Region]) -> dict[fx.Node, set[tuple[int, int]]]:
    """For each node, the cells reached from it through nodes that lie in no cell."""
    feeds: dict[fx.Node, set[tuple[int, int]]] = {}
    for node in reversed(nodes):
        found: set[tuple[int, int]] = set()
        for user in node.users:
            if user in region and region[user].kind == CELL:
                found.add((region[user].segment, region[user].layer))
            else:
                found |= feeds.get(user, set())
        feeds[node] = found
    return feeds


def _source_segments(
    node: fx.Node, region: dict[fx.Node, Region], feeds: dict[fx.Node, set[tuple[int, int]]]
) -> set[tuple[int, int]]:
    """Segments that enter through operands which depend on no cell: an embedding that feeds one segment
    only."""
    found: set[tuple[int, int]] = set()
    for operand in node.all_input_nodes:
        if operand not in region and operand.op == "call_function":
            hits = feeds.get(operand, set())
            if len({s for s, _ in hits}) == 1:
                found |= hits
    return found


def _place_sources(nodes: list[fx.Node], region: dict[fx.Node, Region], n_segments: int) -> None:
    """Place nodes that depend on no cell: prologue of the segment they feed first, or init.

    What a segment reads of its input may be read again one segment later (a cached embedding); only what all
    segments read, or what depends on no input and serves several, is the same for all.
    """
    from_input: set[fx.Node] = set()
    for node in nodes:
        if any(operand.op == "placeholder" or operand in from_input for operand in node.all_input_nodes):
            from_input.add(node)
    leaving = _leaving(nodes, region, from_input)
    for node in reversed(nodes):
        if node in region or node in leaving:
            continue
        users = {region[user].segment for user in node.users if user in region}
        several = len(users) > 1 and (node not in from_input or len(users) == n_segments)
        if users and not several and min(users) >= 0:
            region[node] = Region(PROLOGUE, min(users))
        else:
            region[node] = Region(INIT)
    for node in leaving:
        segment = max(region[op].segment if op in region else -1 for op in node.all_input_nodes)
        region[node] = Region(INIT) if segment < 0 else Region(EPILOGUE, segment)


def _leaving(
    nodes: list[fx.Node], region: dict[fx.Node, Region], from_input: set[fx.Node]
) -> dict[fx.Node, None]:
    """What is made of the input for the result alone, in order: what is embedded, put together again."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        if node not in region and node in from_input:
            if all(user.op == "output" or user in found for user in node.users):
                found.add(node)
    return {node: None for node in nodes if node in found}


def _claim(region: dict[fx.Node, Region], scoped: set[fx.Node], n_segments: int, n_layers: int) -> None:
    """Move prologue nodes into layer 0, and epilogue nodes into the last layer, where the layers beside show
    the same.

    Glue before layer 1 that reads layer 1's memory lies in cell (s, 1); the same code before layer 0 looks
    like prologue. Likewise what follows the last layer looks like epilogue, although the same follows every
    layer.
    """
    if n_layers < 2:
        return
    bodies: dict[Region, list[fx.Node]] = defaultdict(list)
    for node in scoped:
        bodies[region[node]].append(node)
    order = {node: i for i, node in enumerate(region)}
    for found in bodies.values():
        found.sort(key=order.__getitem__)
    for s in range(n_segments):
        first, second = bodies[Region(CELL, s, 0)], bodies[Region(CELL, s, 1)]
        if [n.target for n in first] == [n.target for n in second]:
            for mine, model in zip(first, second, strict=True):
                _claim_operands(mine, model, region, scoped, s)
        before, last = bodies[Region(CELL, s, n_layers - 2)], bodies[Region(CELL, s, n_layers - 1)]
        if [n.target for n in before] == [n.target for n in last]:
            for model, mine in zip(before, last, strict=True):
                _claim_users(mine, model, region, scoped, s, n_layers - 1)


def _claim_operands(
    mine: fx.Node, model: fx.Node, region: dict[fx.Node, Region], scoped: set[fx.Node], s: int
) -> None:
    for a, b in zip(mine.all_input_nodes, model.all_input_nodes, strict=False):
        if b in region and b not in scoped and region[b] == Region(CELL, s, 1) and a.target == b.target:
            if region.get(a) == Region(PROLOGUE, s):
                region[a] = Region(CELL, s, 0)
                _claim_operands(a, b, region, scoped, s)


def _claim_users(
    mine: fx.Node, model: fx.Node, region: dict[fx.Node, Region], scoped: set[fx.Node], s: int, layer: int
) -> None:
    taken: set[fx.Node] = set()
    for b in model.users:
        if b in scoped or region.get(b) != Region(CELL, s, layer - 1):
            continue
        where = b.all_input_nodes.index(model)
        for a in mine.users:
            same = a.target == b.target and a not in taken and region.get(a) == Region(EPILOGUE, s)
            if same and len(a.all_input_nodes) > where and a.all_input_nodes[where] is mine:
                taken.add(a)
                region[a] = Region(CELL, s, layer)
                _claim_users(a, b, region, scoped, s, layer)
                break


def _check_acyclic(region: dict[fx.Node, Region]) -> None:
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
    raise PartitionError(
        "the layers of one segment depend on each other in a circle, so there is no order of cells",
        evidence,
        "name the layers with layers='path.to.container' so that each layer's work lies in one call",
    )
