"""Lanes: the ways of values from cell to cell, found from where each layer reads."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from rmtcompile.errors import DependenceError, InternalError
from rmtcompile.ir.program import LaneEntry, Source
from rmtcompile.passes.grid.lane_allocation.drafts import GroupDraft, LaneDraft
from rmtcompile.passes.grid.lane_allocation.hops import hops
from rmtcompile.passes.grid.partition import CELL
from rmtcompile.passes.grid.reroll import ClassRule, Rolled


class Lanes:
    """The lanes of a program under construction, by name; groups are asked for the outputs that feed them.

    Attributes:
        fewest: segments of the shortest input in which all cells find what they read of earlier segments.
    """

    def __init__(self, rolled: Rolled, alpha: int, groups: list[GroupDraft]) -> None:
        self.rolled = rolled
        self.alpha = alpha
        self.groups = groups
        self.fewest = rolled.minimum
        self.lanes: dict[str, LaneDraft] = {}
        self._delays: dict[Any, str] = {}

    def add(
        self, name: str, group: GroupDraft, index: dict[int, int], val: Any, grows: tuple[int, ...] = ()
    ) -> None:
        """A lane for a port of a group.

        Args:
            index: the live-in of each class that stands at the port.
            val: what the lane holds.
            grows: its dims that are larger in later segments.
        """
        is_all = set(group.merged.classes) == set(self.rolled.rules[(CELL, group.layers[0])])
        classes = None if is_all else group.merged.classes
        lane = self.lanes[name] = LaneDraft(name, set(group.layers), val, classes, grows)
        steady = {layer: self._steady(layer, index) for layer in group.layers}
        for layer in group.layers:
            self._early(lane, layer, index, steady[layer])
        roots: dict[Any, list[int]] = defaultdict(list)
        for layer, source in steady.items():
            if source.kind == CELL and source.relative and not self._travels(steady, layer):
                self._connect(lane, source, (source.segment, layer - source.layer))
            else:
                roots[source.identity].append(layer)
        for layers in roots.values():
            source = steady[layers[0]]
            whole = len(layers) == len(steady) > 1 and not (source.relative and source.segment)
            if whole and self.alpha:
                self._broadcast(lane, source, layers)
            else:
                for layer in layers:
                    self._enter(lane, layer, source)

    def _rule(self, layer: int, number: int) -> ClassRule:
        return self.rolled.rules[(CELL, layer)][number]

    def _enter(self, lane: LaneDraft, layer: int, source: Source) -> None:
        """Put `source` in the layer's place whenever a cell of the layer is about to run."""
        early = lane.entries[layer].early if layer in lane.entries else ()
        lane.entries[layer] = LaneEntry(layer, early, source)

    def _travels(self, steady: dict[int, Source], layer: int) -> bool:
        """Whether another layer reads the very same value, which then moves up with its segment; where each
        of them is one direct feed away, it need not."""
        if not self.alpha:
            return False
        source = steady[layer]
        readers = [other for other, found in steady.items() if found.identity == source.identity]
        offsets = [(source.segment, reader - source.layer) for reader in readers]
        return len(readers) > 1 and any(not self._is_direct(*offset) for offset in offsets)

    def _is_direct(self, ds: int, dl: int) -> bool:
        return 1 <= self.alpha * ds + dl <= self.alpha

    def _steady(self, layer: int, index: dict[int, int]) -> Source:
        """Where a layer reads in most segments, with the operation that makes it in each class met there.

        Classes that this port never meets may make values of another shape: a whole segment and a rest.
        """
        classes = self.rolled.classes[(CELL, layer)]
        number = classes.head if classes.head in index else max(index)
        source = self._rule(layer, number).sources[index[number]].steady
        assert isinstance(source, Source)
        nodes = dict(source.nodes)
        for other, j in index.items():
            again = self._rule(layer, other).sources[j].steady
            if isinstance(again, Source) and again.way == source.way:
                if any(nodes.setdefault(c, node) != node for c, node in again.nodes):
                    raise InternalError(
                        "classes that read different values have one lane",
                        [f"layer {layer}, class {other}: {again}", f"class {number}: {source}"],
                    )
        if source.kind == CELL and source.relative:
            of_producer, fewest = self.rolled.classes[(CELL, source.layer)], self.rolled.minimum
            met = {c for other in index for c in classes.met(other, source.segment, of_producer, fewest)}
            nodes = {c: node for c, node in nodes.items() if c in met}
        return replace(source, nodes=tuple(sorted(nodes.items())))

    def _early(self, lane: LaneDraft, layer: int, index: dict[int, int], steady: Source) -> None:
        """What early segments read instead of the steady source."""
        classes = self.rolled.classes[(CELL, layer)]
        early: dict[int, Source] = {}
        for number, j in index.items():
            live_in = self._rule(layer, number).sources[j]
            early.update(live_in.early)
            assert isinstance(live_in.steady, Source)
            if live_in.steady.way != steady.way:
                if number < 0:
                    raise DependenceError(
                        f"the last segments of layer {layer} read a value from another place than the others",
                        [f"{live_in.steady} against {steady}"],
                    )
                if number < classes.head:
                    early[number] = live_in.steady
        if early:
            lane.entries[layer] = LaneEntry(layer, tuple(sorted(early.items())), None)
        first = steady.segment if steady.relative else 0
        while first and first - 1 in early:
            first -= 1
        self.fewest = max([self.fewest, *(first - number for number in index if number < 0)])

    def _connect(self, lane: LaneDraft, source: Source, offset: tuple[int, int]) -> None:
        """Feed `lane` from the cell `offset` before, in hops that each arrive in time."""
        way = hops(offset, self.alpha)
        nodes = dict(source.nodes)
        at = source.layer
        held: str | None = None  # the lane that holds the value now
        for i, (ds, dl) in enumerate(way):
            target = lane
            if i < len(way) - 1:
                key = (tuple(way[: i + 1]), lane.name, source.nodes)
                name = self._delays.setdefault(key, f"{lane.name}_delay{len(self._delays)}")
                target = self.lanes.setdefault(name, LaneDraft(name, set(), lane.val, grows=lane.grows))
                target.layers.add(at + dl)
            if held is None:
                for group in self.groups:
                    if at in group.layers and (output := group.output(nodes)) is not None:
                        target.feeds[(group.name, output, (ds, dl))].add(at)
                        target.grows = target.grows or group.grows(nodes)
            else:
                target.feeds[("", held, (ds, dl))].add(at)
            held, at = target.name, at + dl

    def _broadcast(self, lane: LaneDraft, source: Source, layers: list[int]) -> None:
        """One value of a segment read by several layers: it enters once and moves up with its segment.

        It enters at a layer that reads it: only there does the cell's class say whether this lane is read.
        """
        first = min(layers)
        if source.kind == CELL and source.relative and source.segment == 0:
            first = source.layer + 1
            self._connect(lane, source, (0, 1))
        else:
            self._enter(lane, first, source)
        lane.layers |= set(range(first, max(layers) + 1))
        for layer in range(first, max(layers)):
            lane.feeds[("", lane.name, (0, 1))].add(layer)
