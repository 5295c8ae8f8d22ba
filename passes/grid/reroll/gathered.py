"""Gathered: lists over segments that are returned, with one member a segment, of one kind.

    [x0, h1, h2]      the first segment's is made by the prologue, or is a parameter, the others' by cells
        ->            [alias(x0), alias(h1), alias(h2)], each in the epilogue of its segment

Rules say where all members of a list come from at once.  Lists that the forward joins itself are completed
where the regions are found (`partition/lists.py`); which outputs are a list is known when two captures are
compared.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from rmtcompile.ir.program import Body
from rmtcompile.passes.grid.partition import EPILOGUE, Region
from rmtcompile.passes.grid.reroll.unrolled import EMPTY, Unrolled

aten = torch.ops.aten


def gathered(unrolled: Unrolled) -> Unrolled:
    """The same capture with lists of mixed origin passed through epilogues."""
    outputs = list(unrolled.outputs)
    for i, members in enumerate(outputs):
        if isinstance(members, tuple) and _is_mixed(unrolled, members):
            unrolled, outputs[i] = _passed(unrolled, members)
    return replace(unrolled, outputs=tuple(outputs))


def _is_mixed(unrolled: Unrolled, members: tuple[fx.Node, ...]) -> bool:
    """Whether the members are one a segment, and lie in regions of different kinds or layers, or in none: a
    parameter, an argument."""
    placed = {s: unrolled.place[x][0] for s, x in enumerate(members) if x in unrolled.place}
    is_each = all(region.segment == s for s, region in placed.items())
    kinds = {(region.kind, region.layer) for region in placed.values()}
    return is_each and bool(kinds) and (len(kinds) > 1 or len(placed) < len(members))


def _passed(unrolled: Unrolled, members: tuple[fx.Node, ...]) -> tuple[Unrolled, tuple[fx.Node, ...]]:
    bodies, place, found = dict(unrolled.bodies), dict(unrolled.place), []
    for s, member in enumerate(members):
        region = Region(EPILOGUE, s)
        with member.graph.inserting_after(member):
            node = member.graph.call_function(aten.alias.default, (member,))
        node.meta = dict(member.meta)
        bodies[region] = _with(bodies.get(region, EMPTY), node, member)
        place[node] = region, len(bodies[region].nodes) - 1
        found.append(node)
    return replace(unrolled, bodies=bodies, place=place), tuple(found)


def _with(body: Body, node: fx.Node, member: fx.Node) -> Body:
    """A body that ends with an alias."""
    live_ins = body.live_ins
    if member in body.nodes:
        read: tuple[object, ...] = ("n", body.nodes.index(member))
    else:
        live_ins = live_ins if member in live_ins else (*live_ins, member)
        read = ("x", live_ins.index(member))
    row = (node.target, ("tuple", read), ("dict",), node.meta.get("context", ()))
    return replace(body, key=(*body.key, row), nodes=(*body.nodes, node), live_ins=live_ins)


__all__ = ["gathered"]
