"""Lists over segments that epilogues join."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rmtcompile.passes.grid.partition.regions import EPILOGUE, INIT, Region

aten = torch.ops.aten
JOINS = (aten.cat.default, aten.stack.default)


def complete_lists(graph: fx.Graph, region: dict[fx.Node, Region]) -> None:
    """Give lists over all segments one member a segment, of one kind. Changes the graph.

    What enters a layer is the layer's own value as soon as a memory was added to it, but in the first segment
    it is what the layer below or the prologue made. Where an epilogue joins them, all pass through the
    epilogues of their segments.
    """
    for node in list(graph.nodes):
        if node.target not in JOINS or node not in region or region[node].kind != EPILOGUE:
            continue
        _join_by_segment(graph, node, region)
        places = [region.get(member, Region(INIT)) for member in node.args[0]]
        segments = [place.segment for place in places]
        is_list = list(range(len(places))) in (segments, segments[::-1])
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
    is_of_all = segments == sorted(segments) and set(segments) == set(range(count))
    if count < 2 or len(members) == count or not is_of_all:
        return
    pieces = []
    for s in range(count):
        own = [member for member, segment in zip(members, segments, strict=True) if segment == s]
        with graph.inserting_before(node):
            piece = graph.call_function(join, (own, *node.args[1:]), dict(node.kwargs))
        values = [member.meta["val"] for member in own]
        piece.meta = {**node.meta, "val": join(values, *node.args[1:], **node.kwargs)}
        region[piece] = Region(EPILOGUE, s)
        pieces.append(piece)
    node.target = aten.cat.default
    node.args = (pieces, *node.args[1:])
