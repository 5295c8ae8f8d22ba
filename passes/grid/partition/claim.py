"""Nodes between two layers, moved next to the layer that they belong to."""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from rmtcompile.passes.grid.partition.regions import CELL, EPILOGUE, PROLOGUE, Region


def claim(region: dict[fx.Node, Region], scoped: set[fx.Node], n_segments: int, n_layers: int) -> None:
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
            same = same and all(region.get(op) != Region(EPILOGUE, s) for op in a.all_input_nodes)
            if same and len(a.all_input_nodes) > where and a.all_input_nodes[where] is mine:
                taken.add(a)
                region[a] = Region(CELL, s, layer)
                _claim_users(a, b, region, scoped, s, layer)
                break
