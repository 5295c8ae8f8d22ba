"""Nodes outside of layer calls, placed by their dependences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from rmtcompile.passes.partition.regions import CELL, EPILOGUE, INIT, PROLOGUE, Layers, Region

aten = torch.ops.aten
_JOINS = (aten.cat.default, aten.stack.default)


def cells_of(node: fx.Node, layers: Layers) -> set[tuple[int, int]]:
    """(segment, layer) of the layer calls in which the node was traced; none if it once was outside."""
    if node in layers.cell_of_node:
        return {layers.cell_of_node[node]}
    scopes: Iterable[tuple[int, ...]] = node.meta.get("scopes") or (node.meta.get("scope", ()),)
    cells: set[tuple[int, int]] = set()
    for scope in scopes:
        cells |= {next((layers.cell_of_call[c] for c in scope if c in layers.cell_of_call), (-1, -1))}
    return set() if (-1, -1) in cells else cells


def constant_nodes(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes that read no tensor at all, not even a parameter: zeros, aranges, masks made of them."""
    constant: set[fx.Node] = set()
    for node in nodes:
        if all(operand in constant for operand in node.all_input_nodes):
            constant.add(node)
    return constant


def place_dependent(nodes: list[fx.Node], region: dict[fx.Node, Region], layers: Layers) -> None:
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
    # Where later segments have the same code: with the cell below it or above it. Where any segment has it in
    # the midst of a cell: there, also in the last one, in which what follows may be dead code.
    habits: dict[object, str] = {}
    turns = _turns(nodes, reads)
    midst: set[object] = set()
    for first_pass in (True, False):
        placed: dict[fx.Node, Region] = dict(region)
        for node in nodes:
            if node in region or not reads[node]:
                continue
            if node in results:
                before = [placed[op].segment for op in node.all_input_nodes if op in placed]
                placed[node] = Region(EPILOGUE, max([*before, *(s for s, _ in reads[node])]))
                continue
            in_midst = turns[node] in midst and not first_pass
            place, habit = _between(node, reads[node], placed, feeds, last, habits, kept, in_midst)
            placed[node] = place
            if first_pass and habit == "midst":
                midst.add(turns[node])
            elif first_pass and habit and place.segment > 0:
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


def _turns(nodes: list[fx.Node], reads: dict[fx.Node, set[tuple[int, int]]]) -> dict[fx.Node, object]:
    """Which one a node is of those that its place in the user's code makes in a segment."""
    found: dict[fx.Node, object] = {}
    made: dict[object, int] = defaultdict(int)
    for node in nodes:
        if reads[node]:
            site = _site(node)
            at = (site, max(reads[node])[0])
            found[node] = (site, made[at])
            made[at] += 1
    return found


def _site(node: fx.Node) -> object:
    """The place in the user's code that made a node."""
    return (node.target, node.meta.get("site", ())[:1], len(node.meta.get("scope", ())))


def _between(
    node: fx.Node,
    reads: set[tuple[int, int]],
    region: dict[fx.Node, Region],
    feeds: dict[fx.Node, set[tuple[int, int]]],
    last: int,
    habits: dict[object, str],
    kept: set[object],
    in_midst: bool,
) -> tuple[Region, str]:
    """Region of a node between cells, and on which side of it: "below", "above", or in the "midst" of one (""
    where there is no choice)."""
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
    if low in later or in_midst:
        return Region(CELL, segment, low), "midst"
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


def complete_lists(graph: fx.Graph, region: dict[fx.Node, Region]) -> None:
    """Give lists over all segments one member a segment, of one kind. Changes the graph.

    What enters a layer is the layer's own value as soon as a memory was added to it, but in the first segment
    it is what the layer below or the prologue made. Where an epilogue joins them, all pass through the
    epilogues of their segments.
    """
    for node in list(graph.nodes):
        if node.target not in _JOINS or node not in region or region[node].kind != EPILOGUE:
            continue
        _join_by_segment(graph, node, region)
        places = [region.get(member, Region(INIT)) for member in node.args[0]]
        is_list = [place.segment for place in places] == list(range(len(places)))
        if not is_list or len({(place.kind, place.layer) for place in places}) == 1:
            continue
        members = []
        for member, place in zip(node.args[0], places, strict=True):
            if place.kind != EPILOGUE:
                with graph.inserting_before(node):
                    passed = graph.call_function(aten.alias.default, (member,))
                passed.meta = {**node.meta, "val": member.meta["val"]}
                region[passed] = Region(EPILOGUE, place.segment)
                member = passed
            members.append(member)
        node.args = (members, *node.args[1:])


def _join_by_segment(graph: fx.Graph, node: fx.Node, region: dict[fx.Node, Region]) -> None:
    """Join the members of each segment in its epilogue first, where a list has several of each: one of every
    layer, as in `stack([a00, a01, a10, a11])`, which is `cat([stack([a00, a01]), stack([a10, a11])])`."""
    join: Any = node.target
    members: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    segments = [region.get(member, Region(INIT)).segment for member in members]
    count = max(segments, default=0) + 1
    each = len(members) // max(1, count)
    if each < 2 or segments != [s for s in range(count) for _ in range(each)]:
        return
    pieces = []
    for s in range(count):
        own = members[s * each : (s + 1) * each]
        with graph.inserting_before(node):
            piece = graph.call_function(join, (own, *node.args[1:]), dict(node.kwargs))
        values = [member.meta["val"] for member in own]
        piece.meta = {**node.meta, "val": join(values, *node.args[1:], **node.kwargs)}
        region[piece] = Region(EPILOGUE, s)
        pieces.append(piece)
    node.target = aten.cat.default
    node.args = (pieces, *node.args[1:])


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


def place_sources(nodes: list[fx.Node], region: dict[fx.Node, Region], n_segments: int) -> None:
    """Place nodes that depend on no cell: prologue of the segment they feed first, or init.

    What a segment reads of its input may be read again one segment later (a cached embedding); only what all
    segments read, or what depends on no input and serves several, is the same for all.
    """
    from_input: set[fx.Node] = set()
    for node in nodes:
        if any(operand.op == "placeholder" or operand in from_input for operand in node.all_input_nodes):
            from_input.add(node)
    leaving = _leaving(nodes, region, from_input)
    region.update(_counters(nodes, region, from_input, n_segments))
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


def _counters(
    nodes: list[fx.Node], region: dict[fx.Node, Region], from_input: set[fx.Node], n_segments: int
) -> dict[fx.Node, Region]:
    """What is counted from segment to segment, without reading any input: `n = n + 4`, once a segment.

    All of it could be computed before the segments, but would be more with each one; the prologue of each
    segment counts on instead, and computes what it makes of the count.
    """
    first_use: dict[fx.Node, int] = {}
    by_site: dict[object, list[fx.Node]] = defaultdict(list)
    for node in reversed(nodes):
        if node not in region:
            users = [region[u].segment if u in region else first_use.get(u, n_segments) for u in node.users]
            first_use[node] = min(users, default=n_segments)
    candidates = [node for node in nodes if node not in region and node not in from_input]
    for node in candidates:
        by_site[_site(node)].append(node)
    found: dict[fx.Node, Region] = {}
    for chain in by_site.values():
        once_each = all(first_use[node] in (s, s + 1, n_segments) for s, node in enumerate(chain))
        if n_segments - 1 <= len(chain) <= n_segments and len(chain) > 1 and once_each:
            if _is_chain(chain, set(candidates)):
                found |= {node: Region(PROLOGUE, s) for s, node in enumerate(chain)}
    for node in candidates:
        counts = [found[op].segment for op in node.all_input_nodes if op in found]
        if counts and node not in found:
            found[node] = Region(PROLOGUE, max(counts))
    return found


def _is_chain(chain: list[fx.Node], among: set[fx.Node]) -> bool:
    """Whether each node is computed from the one before."""
    for before, node in pairwise(chain):
        pending, seen = [node], set[fx.Node]()
        while pending and before not in seen:
            operands = [op for op in pending.pop().all_input_nodes if op in among and op not in seen]
            seen.update(operands)
            pending += operands
        if before not in seen:
            return False
    return True


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
