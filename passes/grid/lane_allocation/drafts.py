"""Drafts: groups and lanes while it is found out what travels."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from rmtcompile.errors import RerollError
from rmtcompile.ir.program import Feed, Group, Lane, LaneEntry, Port
from rmtcompile.ir.randomness import drop_dead
from rmtcompile.passes.grid.if_conversion import Merged
from rmtcompile.passes.grid.reroll import shape_of, typed

aten = torch.ops.aten


class ApartError(Exception):
    """Two classes of one body, for which no mask tells them apart, give an output by different operations.

    Attributes:
        layers: of the group.
        classes: the two.
    """

    def __init__(self, layers: tuple[int, ...], classes: frozenset[int]) -> None:
        super().__init__()
        self.layers, self.classes = layers, classes


@dataclass
class GroupDraft:
    """A group under construction."""

    name: str
    layers: tuple[int, ...]
    merged: Merged
    ports: list[Port] = field(default_factory=list)
    outputs: dict[tuple[tuple[int, int], ...], str] = field(default_factory=dict)

    def output(self, nodes: dict[int, int]) -> str | None:
        """Name of the output that holds operation nodes[c] in class c; None if no class of this group makes
        it."""
        mine = {c: i for c, i in nodes.items() if c in self.merged.classes}
        if not mine:
            return None
        for known, name in self.outputs.items():
            if mine.items() <= dict(known).items():
                return name
        for known, name in self.outputs.items():
            shared = dict(known).keys() & mine.keys()
            if shared and all(dict(known)[c] == mine[c] for c in shared):
                combined = {**dict(known), **mine}
                del self.outputs[known]
                self.outputs[tuple(sorted(combined.items()))] = name
                return name
        name = f"out{len(self.outputs)}"
        self.outputs[tuple(sorted(mine.items()))] = name
        return name

    def grows(self, nodes: dict[int, int]) -> tuple[int, ...]:
        """The dims that are larger in later segments of an output, asked for as for `output`."""
        made = [self.merged.values[c][i] for c, i in nodes.items() if c in self.merged.classes]
        return tuple(sorted({dim for node in made for dim in node.meta.get("grows", ())}))

    def finish(self) -> Group:
        """The group with a graph that makes the outputs asked for, and the ports that they need.

        Raises:
            ApartError: no mask tells two classes apart that give an output by different operations.
        """
        graph = self.merged.graph
        ordered = sorted(self.outputs.items(), key=lambda item: int(item[1][3:]))
        for nodes, _ in ordered:
            self._check_masks(dict(nodes))
        graph.output(tuple(_by_class(graph, self.merged, dict(nodes)) for nodes, _ in ordered))
        drop_dead(graph)
        kept = {node.name for node in graph.nodes if node.op == "placeholder"}
        for node in list(graph.nodes):
            if node.op == "placeholder" and not node.users:
                kept.discard(node.name)
                graph.erase_node(node)
        ports = tuple(port for port in self.ports if port.name in kept)
        names, values = tuple(name for _, name in ordered), tuple(nodes for nodes, _ in ordered)
        return Group(self.name, self.layers, self.merged.classes, graph, ports, names, values)


    def _check_masks(self, nodes: dict[int, int]) -> None:
        made: dict[fx.Node | None, tuple[int, fx.Node]] = {}
        for c, i in nodes.items():
            if c in self.merged.classes:
                first, node = made.setdefault(self.merged.masks.get(c), (c, self.merged.values[c][i]))
                if node is not self.merged.values[c][i]:
                    raise ApartError(self.layers, frozenset((first, c)))


@dataclass
class LaneDraft:
    """A lane under construction; its feeds by group, output (or lane) and offset, with the layers they come
    from."""

    name: str
    layers: set[int]
    val: Any
    classes: tuple[int, ...] | None = None
    grows: tuple[int, ...] = ()
    entries: dict[int, LaneEntry] = field(default_factory=dict)
    feeds: dict[tuple[str, str, tuple[int, int]], set[int]] = field(default_factory=lambda: defaultdict(set))

    def finish(self) -> Lane:
        """The lane, its entries and feeds in a fixed order."""
        feeds = tuple(
            Feed(group, source, offset, tuple(sorted(layers)))
            for (group, source, offset), layers in self.feeds.items()
        )
        val = self.val
        entries = tuple(self.entries[layer] for layer in sorted(self.entries))
        layers = tuple(sorted(self.layers))
        kind = (tuple(val.shape), val.dtype, val.device)
        return Lane(self.name, layers, self.classes, *kind, entries, feeds, grows=self.grows)


def _by_class(graph: fx.Graph, merged: Merged, nodes: dict[int, int]) -> fx.Node:
    """The merged value that is operation nodes[c] in class c: one node, or a selection by mask."""
    found = {c: merged.values[c][i] for c, i in nodes.items() if c in merged.classes}
    base_class = next(c for c in merged.classes if c in found)
    base = found[base_class]
    for c, node in found.items():
        if node is base or c not in merged.masks:
            continue
        if shape_of(node.meta["val"]) != shape_of(base.meta["val"]):
            raise RerollError(
                "the first segment leaves a value of another shape or type than later ones",
                [f"{n.name}: {typed(n)}   {n.meta.get('source')}" for n in (node, base)],
            )
        chosen = graph.call_function(aten.where.self, (merged.masks[c], node, base))
        chosen.meta.update(base.meta)
        base = chosen
    return base
