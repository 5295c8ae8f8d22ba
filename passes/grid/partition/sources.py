"""Nodes that depend on no cell: inputs, constants, counts, and what is made of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

from torch import fx

from rmtcompile.ir.randomness import is_random
from rmtcompile.passes.flat.segments import Segments
from rmtcompile.passes.grid.partition.lists import JOINS
from rmtcompile.passes.grid.partition.regions import CELL, EPILOGUE, INIT, PROLOGUE, Region, site_of


def place_sources(nodes: list[fx.Node], region: dict[fx.Node, Region], segments: Segments) -> None:
    """Place nodes that depend on no cell: prologue of the segment they feed first, or init.

    What a segment reads of its input may be read again one segment later (a cached embedding); only what all
    segments read, or what depends on no input and serves several, is the same for all.
    """
    n_segments = segments.n_segments
    from_input: set[fx.Node] = set()
    for node in nodes:
        if any(operand.op == "placeholder" or operand in from_input for operand in node.all_input_nodes):
            from_input.add(node)
    drawn: set[fx.Node] = set()
    for node in nodes:
        if node not in region and node not in from_input:
            if is_random(node) or drawn.intersection(node.all_input_nodes):
                drawn.add(node)
    leaving = _leaving(nodes, region, from_input | drawn)
    region.update(_counters(nodes, region, from_input, n_segments))
    region.update(_totals(nodes, region, from_input - leaving.keys(), n_segments))
    region.update(_joined_at_the_end(nodes, region, from_input - leaving.keys(), segments))
    region.update(_joined_with_others(nodes, region, from_input - leaving.keys(), segments))
    region.update(_draws(nodes, region, drawn - leaving.keys(), n_segments))
    begins = _begins(nodes, region)
    for node in reversed(nodes):
        if node in region or node in leaving:
            continue
        users = {region[user].segment for user in node.users if user in region}
        several = len(users) > 1 and (node not in from_input or len(users) == n_segments)
        segment = min(users) if users and not several else -1
        segment = max(segment, begins.get(node, -1))
        region[node] = Region(INIT) if segment < 0 else Region(PROLOGUE, segment)
    for node in leaving:
        places = (region[op].segment if op in region else -1 for op in node.all_input_nodes)
        segment = max(places, default=-1)
        region[node] = Region(INIT) if segment < 0 else Region(EPILOGUE, segment)


def _begins(nodes: list[fx.Node], region: dict[fx.Node, Region]) -> dict[fx.Node, int]:
    """The segment whose prologue makes the last of what a node reads, of nodes that read any of that."""
    found: dict[fx.Node, int] = {}
    for node in nodes:
        read = [region[op].segment if op in region else found.get(op, -1) for op in node.all_input_nodes]
        if node not in region and max(read, default=-1) >= 0:
            found[node] = max(read)
    return found


def _draws(
    nodes: list[fx.Node], region: dict[fx.Node, Region], drawn: set[fx.Node], n_segments: int
) -> dict[fx.Node, Region]:
    """Numbers that are drawn without reading any cell, as often in each segment, and what is made of them:
    the cell that reads them first, or the prologue of the segment that does. Later readers (a list of all
    masks) change nothing."""
    first_use: dict[fx.Node, int] = {}
    by_site: dict[object, list[int]] = defaultdict(list)
    for node in reversed(nodes):
        users = [region[u].segment if u in region else first_use.get(u, n_segments) for u in node.users]
        first_use[node] = min(users, default=n_segments)
        if node in drawn:
            by_site[site_of(node)].append(first_use[node])
    found: dict[fx.Node, Region] = {}
    for node in reversed(nodes):
        uses, s = by_site[site_of(node)], first_use[node]
        if node in drawn and {uses.count(s) for s in range(n_segments)} == {len(uses) // n_segments}:
            readers = [found.get(user) or region.get(user) for user in node.users]
            cells = [place for place in readers if place is not None and place[:2] == (CELL, s)]
            found[node] = min(cells, default=Region(PROLOGUE, s))
    return found


def _counters(
    nodes: list[fx.Node], region: dict[fx.Node, Region], from_input: set[fx.Node], n_segments: int
) -> dict[fx.Node, Region]:
    """What is counted from segment to segment, without reading any input: `n = n + 4`, once a segment.

    All of it could be computed before the segments, but would be more with each one; the prologue of each
    segment counts on instead, and computes what it makes of the count.
    """
    first_use = _first_uses(nodes, region, n_segments)
    candidates = [node for node in nodes if node not in region and node not in from_input]
    found: dict[fx.Node, Region] = {}
    for chain in _by_site(candidates):
        once_each = all(first_use[node] in (s, s + 1, n_segments) for s, node in enumerate(chain))
        if n_segments - 1 <= len(chain) <= n_segments and len(chain) > 1 and once_each:
            if _is_chain(chain, set(candidates)):
                found |= {node: Region(PROLOGUE, s) for s, node in enumerate(chain)}
    for node in candidates:
        counts = [found[op].segment for op in node.all_input_nodes if op in found]
        if counts and node not in found:
            found[node] = Region(PROLOGUE, max(counts))
    return found


def _totals(
    nodes: list[fx.Node], region: dict[fx.Node, Region], from_input: set[fx.Node], n_segments: int
) -> dict[fx.Node, Region]:
    """What is added up over the input, once a segment, and is read at the end: the number of labels by which
    a sum of losses is divided. The last segment would read all of it; the prologue of each adds its own."""
    first_use = _first_uses(nodes, region, n_segments)
    candidates = [node for node in nodes if node not in region and node in from_input]
    found: dict[fx.Node, Region] = {}
    for chain in _by_site(candidates):
        if len(chain) == n_segments > 1 and _is_chain(chain, set(candidates)):
            if all(s <= first_use[node] for s, node in enumerate(chain)):
                found |= {node: Region(PROLOGUE, s) for s, node in enumerate(chain)}
    return found


def _joined_at_the_end(
    nodes: list[fx.Node], region: dict[fx.Node, Region], from_input: set[fx.Node], segments: Segments
) -> dict[fx.Node, Region]:
    """What is made of each segment's piece of the input for the end alone, where all of it is joined (a mask
    by which a loss is divided). The last segment would make all of it; the prologue of each makes its own."""
    n_segments = segments.n_segments
    first_use = _first_uses(nodes, region, n_segments)
    candidates = [node for node in nodes if node not in region and node in from_input]
    found: dict[fx.Node, Region] = {}
    for alike in _by_rank([node for node in candidates if not segments.is_whole(node)]):
        own = [segments.of(node) for node in alike]
        if own == list(range(n_segments)) and all(first_use[node] == n_segments - 1 for node in alike):
            found |= {node: Region(PROLOGUE, s) for s, node in enumerate(alike)}
    return found


def _joined_with_others(
    nodes: list[fx.Node], region: dict[fx.Node, Region], from_input: set[fx.Node], segments: Segments
) -> dict[fx.Node, Region]:
    """What the first segments give without any cell, where what cells give for the others is joined with it
    at the end: the last segment would make it; the prologue of each makes its own."""
    first_use = _first_uses(nodes, region, segments.n_segments)
    found: dict[fx.Node, Region] = {}
    for node in nodes:
        if node.target not in JOINS or region.get(node, Region(INIT)).kind != EPILOGUE:
            continue
        members = [x for x in node.args[0] if isinstance(x, fx.Node)]  # type: ignore[union-attr]
        own = [region[x].segment if x in region else segments.of(x) for x in members]
        if list(range(segments.n_segments)) in (own, own[::-1]):
            placed = [(x, s) for x, s in zip(members, own, strict=True) if x in from_input]
            found |= {x: Region(PROLOGUE, s) for x, s in placed if s <= first_use.get(x, -1)}
    return found


def _first_uses(nodes: list[fx.Node], region: dict[fx.Node, Region], n_segments: int) -> dict[fx.Node, int]:
    """The first segment that reads what is made outside of regions, or `n_segments` where none does."""
    found: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        if node not in region:
            users = [region[u].segment if u in region else found.get(u, n_segments) for u in node.users]
            found[node] = min(users, default=n_segments)
    return found


def _by_site(nodes: list[fx.Node]) -> Iterable[list[fx.Node]]:
    """Nodes that come from the same place of the user's code, together."""
    found: dict[object, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        found[site_of(node)].append(node)
    return found.values()


def _by_rank(nodes: list[fx.Node]) -> Iterator[list[fx.Node]]:
    """The same, apart by the number of dimensions of their values."""
    for alike in _by_site(nodes):
        found: dict[int, list[fx.Node]] = defaultdict(list)
        for node in alike:
            found[len(getattr(node.meta.get("val"), "shape", ()))].append(node)
        yield from found.values()


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
    """What is made of the input (or of numbers drawn) for the result alone, in order: what is embedded, put
    together again."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        if node not in region and node in from_input:
            if all(user.op == "output" or user in found for user in node.users):
                found.add(node)
    return {node: None for node in nodes if node in found}
