"""Places on the layer x segment grid, and which module calls are layers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

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


def site_of(node: fx.Node) -> object:
    """The place in the user's code that made a node."""
    return (node.target, node.meta.get("site", ())[:1], len(node.meta.get("scope", ())))
