"""Route: give every value that crosses a region boundary a way to travel.

    x(s, l)  <- h(s, l-1)        lane x: fed one layer up by each cell; the prologue enters at layer 0
    A(s, l)  <- A'(s-1, l)       lane A: fed by each cell for its layer's next segment; zeros before
    mask(s, l) <- prologue(s)    lane mask: enters at layer 0, moves one layer up with its segment
    B(s, l)  <- B'(s-2, l)       two lanes in a chain, each one segment long
    logits   <- epilogue(0..S)   tap: kept, one value a segment, until it is read

A lane holds one value a layer. The value a cell reads must be the last one written: a write travels
alpha*ds + dl levels, and the same producer writes again alpha levels later, so 1 <= alpha*ds + dl <= alpha
holds for every direct feed; longer ways are cut into hops through lanes in between (`hops`).

With alpha = 0 a level is one layer of many segments, and all layers below have run: a lane holds one value a
segment, each feed is direct whatever its offset, and what the cells of a layer share is not stacked.

Requires: rules from `reroll`, offsets from `dependence`, alpha from `wavefront`. Gives the `Program`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from rmtcompile.errors import DependenceError, RerollError
from rmtcompile.ir.program import Each, Feed, Group, Lane, LaneEntry, Port, Program, Source, Tap, Value
from rmtcompile.ir.weights import Rows, Weight, row_of
from rmtcompile.passes.grid.if_conversion import Merged, align, class_name, ports_key
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, INIT, PROLOGUE
from rmtcompile.passes.grid.reroll import ClassRule, LiveIn, Rolled, shape_of, typed
from rmtcompile.passes.grid.wavefront import block_size


def route(rolled: Rolled, offsets: frozenset[tuple[int, int]], alpha: int) -> Program:
    """Build the scheduled program; see the module docstring.

    Raises:
        DependenceError: a value cannot reach its reader in time on the given schedule.
    """
    return _Router(rolled, alpha).program(offsets)


@dataclass
class _GroupDraft:
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
            shared = dict(known).keys() & mine.keys()
            if shared and all(dict(known)[c] == mine[c] for c in shared):
                combined = {**dict(known), **mine}
                del self.outputs[known]
                self.outputs[tuple(sorted(combined.items()))] = name
                return name
        name = f"out{len(self.outputs)}"
        self.outputs[tuple(sorted(mine.items()))] = name
        return name


@dataclass
class _LaneDraft:
    name: str
    layers: set[int]
    val: Any
    classes: tuple[int, ...] | None = None
    entries: dict[int, LaneEntry] = field(default_factory=dict)
    feeds: dict[tuple[str, str, tuple[int, int]], set[int]] = field(default_factory=lambda: defaultdict(set))


class _Router:
    def __init__(self, rolled: Rolled, alpha: int) -> None:
        self.rolled = rolled
        self.alpha = alpha
        self.n_layers = rolled.n_layers
        self.block = 0 if alpha else block_size(rolled.n_layers)
        self.groups: list[_GroupDraft] = []
        self.lanes: dict[str, _LaneDraft] = {}
        self.taps: dict[Any, Tap] = {}
        self.delays: dict[Any, str] = {}

    # ---- groups --------------------------------------------------------------------------------------------

    def program(self, offsets: frozenset[tuple[int, int]]) -> Program:
        for i, layers in enumerate(self._kinds()):
            sample = layers[len(layers) // 2]
            rules = {c: rule for c, rule in self.rolled.rules[(CELL, sample)].items() if rule.body.nodes}
            if not rules:
                continue
            steady = self.rolled.classes[(CELL, sample)].head
            others = [self.rolled.rules[(CELL, layer)] for layer in layers if layer != sample]
            for j, merged in enumerate(align(rules, steady if steady in rules else min(rules), others)):
                name = f"kind{i}" + (f"_{class_name(merged.classes[0])}" if j else "")
                self.groups.append(_GroupDraft(name, layers, merged))
        if len(self.groups) == 1:
            self.groups[0].name = "layers"
        for group in self.groups:
            self._ports(group)
        for key, by_class in self.rolled.rules.items():
            if key[0] != CELL:
                for number, rule in by_class.items():
                    for live_in in rule.sources:
                        self._tap_live_in(live_in, key[0], number)
        for lane in self.lanes.values():
            for entry in lane.entries.values():
                for source in entry.sources:
                    self._tap(source, "entry")
        for output in self.rolled.outputs:
            if isinstance(output, Each):
                self._add(output.kind, output.layer, output.nodes, ("each",), None)
                continue
            when = ("end", output.segment) if output.relative else ("at", output.segment)
            self._tap(output, "end", when)
        finished = (self._finish(group) for group in self.groups)
        groups = tuple(group for group in finished if group.outputs)  # layers that nobody reads are dead
        lanes = tuple(self._lane(lane) for lane in self.lanes.values())
        taps = tuple(self.taps.values())
        return Program(self.n_layers, self.alpha, offsets, groups, lanes, taps, self.rolled, self.block)

    def _kinds(self) -> list[tuple[int, ...]]:
        kinds: dict[Any, list[int]] = defaultdict(list)
        for layer in range(self.n_layers):
            classes = self.rolled.classes[(CELL, layer)]
            rules = self.rolled.rules[(CELL, layer)]
            key = tuple((c, rules[c].body.key, ports_key(rules[c])) for c in sorted(rules))
            kinds[(classes, key)].append(layer)
        return [tuple(layers) for layers in kinds.values()]

    def _rule(self, layer: int, number: int) -> ClassRule:
        return self.rolled.rules[(CELL, layer)][number]

    def _ports(self, group: _GroupDraft) -> None:
        for node, index in list(group.merged.live_ins.items()):
            sources = {
                (layer, c): self._rule(layer, c).sources[j]
                for layer in group.layers
                for c, j in index.items()
            }
            if all(source.is_invariant for source in sources.values()):
                group.ports.append(self._invariant(node, group, sources))
            else:
                name = f"{group.name}_{node.name}" if len(self.groups) > 1 else node.name
                self._lane_port(name, group, index, node.meta["val"])
                group.ports.append(Port(node.name, "lane", name))
        seen: set[str] = set()
        for number, mask in group.merged.masks.items():
            if mask.name not in seen:
                seen.add(mask.name)
                twins = tuple(c for c, m in group.merged.masks.items() if m is mask)
                group.ports.append(Port(mask.name, "mask", twins))
            del number

    def _invariant(self, node: fx.Node, group: _GroupDraft, sources: dict[tuple[int, int], LiveIn]) -> Port:
        by_layer = [next(s.steady for (k, _), s in sources.items() if k == layer) for layer in group.layers]
        if all(source == by_layer[0] for source in by_layer):
            return Port(node.name, "shared", by_layer[0])
        if not self.alpha:
            return Port(node.name, "layer", tuple(by_layer))
        if all(isinstance(source, Source) and source.kind == "leaf" for source in by_layer):
            return Port(node.name, "weight", Weight(tuple((s.name,) for s in by_layer)))  # type: ignore[union-attr]
        rows = self._rows(by_layer)
        return Port(node.name, "rows", rows) if rows else Port(node.name, "stacked", tuple(by_layer))

    def _rows(self, by_layer: list[Any]) -> Rows | None:
        """The rows of one leaf that the layers read, if that is what they read."""
        nodes = self.rolled.rules[(INIT, -1)][0].body.nodes
        found = [row_of(nodes[source.node]) if source.kind == INIT else None for source in by_layer]
        leaves = {row[0] for row in found if row is not None}
        if None in found or len(leaves) != 1:
            return None
        name = self.rolled.base.leaf_names[str(leaves.pop().target)]
        return Rows(name, tuple(row[1] for row in found if row is not None))

    # ---- lanes ---------------------------------------------------------------------------------------------

    def _lane_port(self, name: str, group: _GroupDraft, index: dict[int, int], val: Any) -> None:
        is_all = set(group.merged.classes) == set(self.rolled.rules[(CELL, group.layers[0])])
        classes = None if is_all else group.merged.classes
        lane = self.lanes[name] = _LaneDraft(name, set(group.layers), val, classes)
        steady: dict[int, Source] = {}
        for layer in group.layers:
            steady[layer] = self._steady(layer, index)
        for layer in group.layers:
            self._early(lane, layer, index, steady[layer])
        roots: dict[Any, list[int]] = defaultdict(list)
        for layer, source in steady.items():
            if source.kind == CELL and source.relative and not self._travels(steady, layer):
                self._connect(lane, source, (source.segment, layer - source.layer), layer)
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

    def _enter(self, lane: _LaneDraft, layer: int, source: Source) -> None:
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
        classes = self.rolled.classes[(CELL, layer)]
        number = classes.head if classes.head in index else max(index)
        source = self._rule(layer, number).sources[index[number]].steady
        assert isinstance(source, Source)
        nodes = dict(source.nodes)
        for other, j in index.items():
            again = self._rule(layer, other).sources[j].steady
            if isinstance(again, Source) and again.way == source.way:
                nodes.update(again.nodes)
        return Source(
            source.kind,
            source.name,
            source.segment,
            source.relative,
            source.layer,
            source.node,
            tuple(sorted(nodes.items())),
        )

    def _early(self, lane: _LaneDraft, layer: int, index: dict[int, int], steady: Source) -> None:
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

    def _connect(self, lane: _LaneDraft, source: Source, offset: tuple[int, int], layer: int) -> None:
        """Feed `lane` at `layer` from the cell `offset` before, in hops that each arrive in time."""
        route = hops(offset, self.alpha)
        nodes = dict(source.nodes)
        at = source.layer
        held: str | None = None  # the lane that holds the value now
        for i, (ds, dl) in enumerate(route):
            target = lane
            if i < len(route) - 1:
                key = (tuple(route[: i + 1]), lane.name, source.nodes)
                name = self.delays.setdefault(key, f"{lane.name}_delay{len(self.delays)}")
                target = self.lanes.setdefault(name, _LaneDraft(name, set(), lane.val))
                target.layers.add(at + dl)
            if held is None:
                for group in self.groups:
                    if at in group.layers and (output := group.output(nodes)) is not None:
                        target.feeds[(group.name, output, (ds, dl))].add(at)
            else:
                target.feeds[("", held, (ds, dl))].add(at)
            held, at = target.name, at + dl

    def _broadcast(self, lane: _LaneDraft, source: Source, layers: list[int]) -> None:
        """One value of a segment read by several layers: it enters once and moves up with its segment.

        It enters at a layer that reads it: only there does the cell's class say whether this lane is read.
        """
        first = min(layers)
        if source.kind == CELL and source.relative and source.segment == 0:
            first = source.layer + 1
            self._connect(lane, source, (0, 1), first)
        else:
            self._enter(lane, first, source)
        lane.layers |= set(range(first, max(layers) + 1))
        for layer in range(first, max(layers)):
            lane.feeds[("", lane.name, (0, 1))].add(layer)

    # ---- taps ----------------------------------------------------------------------------------------------

    def _tap_live_in(self, live_in: LiveIn, reader: str, number: int) -> None:
        """Keep what the class `number` of a region reads; a class of the last segments reads those only."""
        for source in live_in.early.values():
            self._tap(source, reader)
        if isinstance(live_in.steady, Each):
            each = live_in.steady
            self._add(each.kind, each.layer, each.nodes, ("each",), None)
        elif live_in.steady is not None:
            last = number < 0 and live_in.steady.relative
            when = ("end", live_in.steady.segment - 1 - number) if last else ("each",)
            self._tap(live_in.steady, reader, when)

    def _tap(self, source: Source, reader: str, when: tuple[Any, ...] = ("each",)) -> None:
        if source.kind not in (PROLOGUE, CELL, EPILOGUE):
            return
        if reader == "end":
            keep: int | None = source.segment
        elif not source.relative:
            keep, when = None, ("at", source.segment)
        else:
            keep = source.segment + (self.block or self.n_layers)
        self._add(source.kind, source.layer, source.nodes, when, keep)

    def _add(
        self,
        kind: str,
        layer: int,
        nodes: tuple[tuple[int, int], ...],
        when: tuple[Any, ...],
        keep: int | None,
    ) -> None:
        key = (kind, layer, nodes)
        if key in self.taps:
            old = self.taps[key]
            when = when if when == old.when else ("each",)
            keep = None if keep is None or old.keep is None else max(keep, old.keep)
            name = old.name
        else:
            name = f"{kind}{layer}_{len(self.taps)}" if kind == CELL else f"{kind}_{len(self.taps)}"
        self.taps[key] = Tap(name, Value(kind, layer, nodes), (), when, keep)

    # ---- results -------------------------------------------------------------------------------------------

    def _finish(self, draft: _GroupDraft) -> Group:
        for key, tap in list(self.taps.items()):
            if tap.value.kind == CELL and tap.value.layer in draft.layers:
                output = draft.output(dict(tap.value.nodes))
                if output is not None:
                    self.taps[key] = Tap(
                        tap.name, tap.value, (*tap.group_outputs, (draft.name, output)), tap.when, tap.keep
                    )
        graph, merged = draft.merged.graph, draft.merged
        results = []
        ordered = sorted(draft.outputs.items(), key=lambda item: int(item[1][3:]))
        for nodes, _ in ordered:
            results.append(_by_class(graph, merged, dict(nodes)))
        graph.output(tuple(results))
        graph.eliminate_dead_code()
        kept = {node.name for node in graph.nodes if node.op == "placeholder"}
        for node in list(graph.nodes):
            if node.op == "placeholder" and not node.users:
                kept.discard(node.name)
                graph.erase_node(node)
        ports = tuple(port for port in draft.ports if port.name in kept)
        names, values = tuple(name for _, name in ordered), tuple(nodes for nodes, _ in ordered)
        return Group(draft.name, draft.layers, merged.classes, graph, ports, names, values)

    def _lane(self, lane: _LaneDraft) -> Lane:
        feeds = tuple(
            Feed(group, source, offset, tuple(sorted(layers)))
            for (group, source, offset), layers in lane.feeds.items()
        )
        val = lane.val
        entries = tuple(lane.entries[layer] for layer in sorted(lane.entries))
        layers = tuple(sorted(lane.layers))
        return Lane(lane.name, layers, lane.classes, tuple(val.shape), val.dtype, val.device, entries, feeds)


def hops(offset: tuple[int, int], alpha: int) -> list[tuple[int, int]]:
    """The fewest steps that a value takes on its way, each arriving before its place is written again.

    (2,0) at alpha 1 -> (1,0) (1,0)      (2,-1) at alpha 1 -> (2,-1)     (1,3) at alpha 2 -> (0,2) (0,1) (1,0)

    Steps up go first, one segment at a time follows, and the last step goes down. A step (a, b) takes
    alpha*a + b levels, 1 to alpha; segments never run backward and layers stay between the two ends. With
    alpha = 0 nothing is written over, and one step does.

    Raises:
        DependenceError: the reader runs no later than the writer.
    """
    ds, dl = offset
    levels = alpha * ds + dl
    if levels < 1 or ds < 0:
        raise DependenceError(f"a value with offset {offset} cannot reach its reader on levels {alpha}*s + l")
    if levels <= max(alpha, 1) or not alpha:
        return [offset]
    if dl < 0:
        waits = (levels - 1) // alpha
        return [(1, 0)] * waits + [(ds - waits, dl)]
    up = [(0, alpha)] * (dl // alpha) + [(0, dl % alpha)] * (dl % alpha > 0)
    return up + [(1, 0)] * ds


def _by_class(graph: fx.Graph, merged: Merged, nodes: dict[int, int]) -> fx.Node:
    """The merged value that is operation nodes[c] in class c: one node, or a selection by mask."""
    from rmtcompile.passes.grid.if_conversion import aten

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


__all__ = ["INIT", "hops", "route"]
