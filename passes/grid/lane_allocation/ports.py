"""Ports: where a group's graph finds the values that are no carries, and the masks of its classes."""

from __future__ import annotations

from typing import Any

from torch import fx

from rmtcompile.ir.program import Port, Source
from rmtcompile.ir.weights import Rows, Weight, row_of
from rmtcompile.passes.grid.if_conversion import Merged
from rmtcompile.passes.grid.partition import INIT
from rmtcompile.passes.grid.reroll import Rolled


def mask_ports(merged: Merged) -> list[Port]:
    """One port a mask, with the classes that set it."""
    classes: dict[fx.Node, list[int]] = {}
    for number, mask in merged.masks.items():
        classes.setdefault(mask, []).append(number)
    return [Port(mask.name, "mask", tuple(found)) for mask, found in classes.items()]


def invariant_port(node: fx.Node, by_layer: list[Any], alpha: int, rolled: Rolled) -> Port:
    """A port for what never changes: one for all layers, or one a layer, read in place where it can be."""
    if all(source == by_layer[0] for source in by_layer):
        return Port(node.name, "shared", by_layer[0])
    if not alpha:
        return Port(node.name, "layer", tuple(by_layer))
    if all(isinstance(source, Source) and source.kind == "leaf" for source in by_layer):
        return Port(node.name, "weight", Weight(tuple((source.name,) for source in by_layer)))
    rows = _rows(by_layer, rolled)
    return Port(node.name, "rows", rows) if rows else Port(node.name, "stacked", tuple(by_layer))


def _rows(by_layer: list[Any], rolled: Rolled) -> Rows | None:
    """The rows of one leaf that the layers read, if that is what they read."""
    nodes = rolled.rules[(INIT, -1)][0].body.nodes
    found = [row_of(nodes[source.node]) if source.kind == INIT else None for source in by_layer]
    leaves = {row[0] for row in found if row is not None}
    if None in found or len(leaves) != 1:
        return None
    name = rolled.base.leaf_names[str(leaves.pop().target)]
    return Rows(name, tuple(row[1] for row in found if row is not None))
