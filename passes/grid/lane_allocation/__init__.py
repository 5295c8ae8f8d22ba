"""Lane allocation: give every value that crosses a region boundary a way to travel.

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

drafts.py  groups and lanes under construction;  ports.py  what is no carry;  lanes.py  the ways of the others
hops.py    ways in steps that arrive in time;  taps.py  what is kept
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from rmtcompile.errors import InternalError
from rmtcompile.ir.program import Group, Port, Program
from rmtcompile.passes.grid.if_conversion import class_name, if_convert, ports_key
from rmtcompile.passes.grid.lane_allocation.drafts import ApartError, GroupDraft
from rmtcompile.passes.grid.lane_allocation.hops import hops
from rmtcompile.passes.grid.lane_allocation.lanes import Lanes
from rmtcompile.passes.grid.lane_allocation.ports import invariant_port, mask_ports
from rmtcompile.passes.grid.lane_allocation.taps import Taps
from rmtcompile.passes.grid.partition import CELL
from rmtcompile.passes.grid.reroll import Rolled
from rmtcompile.passes.grid.wavefront import block_size

__all__ = ["allocate_lanes", "hops"]


def allocate_lanes(rolled: Rolled, offsets: frozenset[tuple[int, int]], alpha: int) -> Program:
    """Build the scheduled program; see the module docstring.

    Raises:
        DependenceError: a value cannot reach its reader in time on the given schedule.
    """
    apart: set[tuple[tuple[int, ...], frozenset[int]]] = set()
    while True:
        try:
            return _allocated(rolled, offsets, alpha, apart)
        except ApartError as found:
            apart.add((found.layers, found.classes))


def _allocated(
    rolled: Rolled,
    offsets: frozenset[tuple[int, int]],
    alpha: int,
    apart: set[tuple[tuple[int, ...], frozenset[int]]],
) -> Program:
    """See `allocate_lanes`.

    Args:
        apart: layers of a kind, and two classes of theirs that no one function serves, though their bodies
            are one: other cells read other results of it.
    """
    block = 0 if alpha else block_size(rolled.n_layers)
    drafts = _drafts(rolled, apart)
    lanes = Lanes(rolled, alpha, drafts)
    for draft in drafts:
        _add_ports(draft, lanes)
    if lanes.fewest > rolled.minimum:  # in shorter inputs the last segments would read what no cell has made
        return _allocated(replace(rolled, minimum=lanes.fewest), offsets, alpha, apart)
    taps = _taps(rolled, lanes, block or rolled.n_layers)
    groups: list[Group] = []
    for draft in drafts:
        taps.ask(draft)
        if draft.outputs:  # layers that nobody reads are dead
            groups.append(draft.finish())
    made = tuple(lane.finish() for lane in lanes.lanes.values())
    kept = tuple(taps.taps.values())
    return Program(rolled.n_layers, alpha, offsets, tuple(groups), made, kept, rolled, block)


def _drafts(rolled: Rolled, apart: set[tuple[tuple[int, ...], frozenset[int]]]) -> list[GroupDraft]:
    """A group for each kind of layer; more than one where its classes cannot be merged."""
    drafts: list[GroupDraft] = []
    for i, layers in enumerate(_kinds(rolled)):
        sample = layers[len(layers) // 2]
        rules = {c: rule for c, rule in rolled.rules[(CELL, sample)].items() if rule.body.nodes}
        if not rules:
            continue
        head = rolled.classes[(CELL, sample)].head
        others = [rolled.rules[(CELL, layer)] for layer in layers if layer != sample]
        steady = head if head in rules else min(rules)
        two = [classes for kind, classes in apart if kind == layers]
        for j, merged in enumerate(if_convert(rules, steady, others, two)):
            name = f"kind{i}" + (f"_{class_name(merged.classes[0])}" if j else "")
            drafts.append(GroupDraft(name, layers, merged))
    if len(drafts) == 1:
        drafts[0].name = "layers"
    return drafts


def _kinds(rolled: Rolled) -> list[tuple[int, ...]]:
    """Layers with the same bodies in the same classes."""
    kinds: dict[Any, list[int]] = defaultdict(list)
    for layer in range(rolled.n_layers):
        rules = rolled.rules[(CELL, layer)]
        key = tuple((c, rules[c].body.key, rules[c].ints, ports_key(rules[c])) for c in sorted(rules))
        kinds[(rolled.classes[(CELL, layer)], key)].append(layer)
    return [tuple(layers) for layers in kinds.values()]


def _add_ports(group: GroupDraft, lanes: Lanes) -> None:
    """Give each placeholder of the group's graph a port, and each carry a lane."""
    rules = {layer: lanes.rolled.rules[(CELL, layer)] for layer in group.layers}
    for node, index in group.merged.live_ins.items():
        sources = {layer: [rules[layer][c].sources[j] for c, j in index.items()] for layer in group.layers}
        if all(source.is_invariant for found in sources.values() for source in found):
            if any(source.key != found[0].key for found in sources.values() for source in found):
                raise InternalError("classes that read different invariants have one port", [str(sources)])
            by_layer = [sources[layer][0].steady for layer in group.layers]
            group.ports.append(invariant_port(node, by_layer, lanes.alpha, lanes.rolled))
        else:
            name = f"{group.name}_{node.name}" if len(lanes.groups) > 1 else node.name
            lanes.add(name, group, index, node.meta["val"], node.meta.get("grows", ()))
            group.ports.append(Port(node.name, "lane", name))
    group.ports += mask_ports(group.merged)


def _taps(rolled: Rolled, lanes: Lanes, window: int) -> Taps:
    """What regions, entries of lanes and results read."""
    taps = Taps(window)
    for (kind, _), by_class in rolled.rules.items():
        for number, rule in by_class.items() if kind != CELL else ():
            for live_in in rule.sources:
                taps.keep_live_in(live_in, kind, number)
    for lane in lanes.lanes.values():
        for entry in lane.entries.values():
            for source in entry.sources:
                taps.keep(source, "entry")
    for output in rolled.outputs:
        taps.keep_result(output)
    return taps
