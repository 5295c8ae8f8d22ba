"""Nodes outside of layer calls, placed by their dependences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from rmtcompile.ir.randomness import is_random
from rmtcompile.passes.flat.segments import Segments
from rmtcompile.passes.grid.partition.regions import CELL, EPILOGUE, PROLOGUE, Layers, Region, site_of


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
    """Nodes that read no tensor at all, not even a parameter: zeros, aranges, masks made of them. Random
    numbers are none: they are drawn where they are."""
    constant: set[fx.Node] = set()
    for node in nodes:
        if all(operand in constant for operand in node.all_input_nodes) and not is_random(node):
            constant.add(node)
    return constant


def cells_read(
    nodes: Iterable[fx.Node], region: dict[fx.Node, Region]
) -> dict[fx.Node, set[tuple[int, int]]]:
    """The (segment, layer) of the cells that each node depends on, seen through nodes that lie in none."""
    reads: dict[fx.Node, set[tuple[int, int]]] = {}
    for node in nodes:
        found: set[tuple[int, int]] = set()
        for operand in node.all_input_nodes:
            if operand in region and region[operand].kind == CELL:
                found.add((region[operand].segment, region[operand].layer))
            else:
                found |= reads.get(operand, set())
        reads[node] = found
    return reads


@dataclass
class _Glue:
    """What decides where a node between cells lies.

    Attributes:
        feeds: for each node, the cells reached from it through nodes that lie in none.
        last: the last layer.
        kept: places in the code that make what a later segment reads.
        segments: of the inputs.
        habits: on which side of it the code of a place lies in later segments.
    """

    feeds: dict[fx.Node, set[tuple[int, int]]]
    last: int
    kept: set[object]
    segments: Segments
    habits: dict[object, str] = field(default_factory=dict)


def place_dependent(
    nodes: list[fx.Node], region: dict[fx.Node, Region], layers: Layers, segments: Segments
) -> None:
    """Place nodes outside layer calls that depend on a cell: between the cells they read and the cells that
    read them.

    Args:
        segments: of the inputs.
    """
    last = len(layers.paths) - 1
    reads = cells_read(nodes, region)
    feeds = _first_hits(nodes, region)
    # What reads an earlier segment lies with the layer above, unless it is kept for a later one itself: the
    # further up a reader lies, the earlier it may run.
    kept = {
        site_of(node)
        for node in nodes
        if reads[node] and any(s > max(reads[node])[0] for s, _ in feeds[node])
    }
    results = _for_results([n for n in nodes if n not in region and reads[n]], reads, feeds, last)
    # Where later segments have the same code: with the cell below it or above it. Where any segment has it in
    # the midst of a cell: there, also in the last one, in which what follows may be dead code.
    glue = _Glue(feeds, last, kept, segments)
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
            place, habit = _between(node, reads[node], placed, glue, in_midst)
            placed[node] = place
            if first_pass and habit == "midst":
                midst.add(turns[node])
            elif first_pass and habit and place.segment > 0:
                glue.habits.setdefault(site_of(node), habit)
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
    carried = {site_of(node) for node in nodes if feeds[node]}
    tops: dict[object, set[int]] = defaultdict(set)
    for node in nodes:
        tops[site_of(node)].add(max(reads[node])[1])
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        lone = len({s for s, _ in reads[node]}) == 1 and last in tops[site_of(node)]
        if site_of(node) not in carried and not lone:
            if all(user.op == "output" or user in found for user in node.users):
                found.add(node)
    return found


def _turns(nodes: list[fx.Node], reads: dict[fx.Node, set[tuple[int, int]]]) -> dict[fx.Node, object]:
    """Which one a node is of those that its place in the user's code makes in a segment."""
    found: dict[fx.Node, object] = {}
    made: dict[object, int] = defaultdict(int)
    for node in nodes:
        if reads[node]:
            site = site_of(node)
            at = (site, max(reads[node])[0])
            found[node] = (site, made[at])
            made[at] += 1
    return found


def _between(
    node: fx.Node, reads: set[tuple[int, int]], region: dict[fx.Node, Region], glue: _Glue, in_midst: bool
) -> tuple[Region, str]:
    """Region of a node between cells, and on which side of it: "below", "above", or in the "midst" of one (""
    where there is no choice)."""
    feeds, last = glue.feeds, glue.last
    segments = [s for s, _ in reads]
    segments += [region[op].segment for op in node.all_input_nodes if op in region]
    segment = max([*segments, *_source_segments(node, region, glue)])
    inside = [layer for s, layer in reads if s == segment]
    later = [layer for s, layer in feeds.get(node, ()) if s == segment]
    if not inside:
        return Region(PROLOGUE, segment), ""
    placed = (region[op] for op in node.all_input_nodes if op in region)
    low = max(*inside, *(place.layer for place in placed if place.segment == segment), -1)
    if low in later or in_midst:  # "midst" only where the cell is read, not just glue that lies in it
        return Region(CELL, segment, low), "midst" if low == max(inside) else ""
    if later and (high := min(later)) > low:
        carried = any(s < segment and (layer >= high or site_of(node) not in glue.kept) for s, layer in reads)
        habit = "above" if carried else glue.habits.get(site_of(node), "below") if segment == 0 else "below"
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


def _source_segments(node: fx.Node, region: dict[fx.Node, Region], glue: _Glue) -> set[int]:
    """Segments that enter through operands which depend on no cell: those of the pieces of the input that
    they are made of, or else, of what is made of the whole input, the only one that it feeds. What depends on
    no segment (numbers that are written out, parameters, other arguments) belongs to none, whoever reads it.
    """
    found: set[int] = set()
    for operand in node.all_input_nodes:
        hits = {s for s, _ in glue.feeds.get(operand, ())}
        if operand in region or operand.op != "call_function" or glue.segments.of(operand) < 0 or not hits:
            continue
        if not glue.segments.is_whole(operand):
            found.add(min(glue.segments.of(operand), *hits))
        elif len(hits) == 1:
            found |= hits
    return found
