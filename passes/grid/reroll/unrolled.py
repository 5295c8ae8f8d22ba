"""A partitioned capture as bodies: the operations of each region, and the place of each value."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from rmtcompile.ir.program import Body, Source
from rmtcompile.ir.weights import row_of
from rmtcompile.passes.flat.value_numbering import key_of
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, INIT, PROLOGUE, Partition, Region

Key = tuple[str, int]  # (region kind, layer)


@dataclass(frozen=True)
class Unrolled:
    """A partitioned capture with `count` segments: the body of every region, and the place of every value.

    Attributes:
        outputs: the graph's outputs (results, what is left behind, what is written); a tuple has one for each
            segment.
        leaf_names: name of the tensor behind each `get_attr` target, equal in all captures of one model.
        sizes: lengths of the inputs' axes, in order.
        written: what each region does, dead code left out.
    """

    count: int
    n_layers: int
    bodies: dict[Region, Body]
    place: dict[fx.Node, tuple[Region, int]]
    outputs: tuple[fx.Node | tuple[fx.Node, ...], ...]
    leaf_names: dict[str, str]
    sizes: tuple[int, ...] = ()
    written: Mapping[Region, Body] = field(default_factory=dict)

    def source(self, node: fx.Node) -> Source:
        """Where `node` is computed, its segment absolute."""
        if node.op == "placeholder":
            return Source("input", str(node.target))
        if node.op == "get_attr":
            return Source("leaf", self.leaf_names[str(node.target)])
        region, index = self.place[node]
        return Source(region.kind, "", max(region.segment, 0), False, region.layer, index)


def unroll(graph: fx.Graph, parts: Partition, leaf_names: dict[str, str]) -> Unrolled:
    """Read bodies and places off a partitioned graph."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    private = _private_weights(parts)
    instances = parts.instances()
    used_inside = {node for node, layer in private.items() if layer is not None}
    bodies: dict[Region, Body] = {}
    place: dict[fx.Node, tuple[Region, int]] = {}
    for region, nodes in instances.items():
        if region.kind == INIT:
            kept = [n for n in nodes if n not in used_inside or not _only_cells_use(n, parts)]
        else:
            kept = (
                sorted({*nodes, *_inlined(nodes, private)}, key=order.__getitem__)
                if region.kind == CELL
                else nodes
            )
        bodies[region] = _body(kept, region, parts)
        for index, node in enumerate(kept):
            if region.kind != CELL or parts.region[node] == region:
                place[node] = (region, index)
    written = dict(bodies)
    _restore_dead(bodies, place, parts)
    output = next(node for node in graph.nodes if node.op == "output")
    outputs: list[fx.Node] = []
    fx.node.map_arg(output.args, outputs.append)
    sizes = tuple(n for node in graph.nodes if node.op == "placeholder" for n in node.meta["val"].shape)
    return Unrolled(
        parts.n_segments, parts.n_layers, bodies, place, tuple(outputs), leaf_names, sizes, written
    )


_FILLED = 7
"""Segments after which it has to repeat."""

_READ = 4
"""Last segments that may do less, where what they write is read no more."""


def period_of(unrolled: Unrolled, longest: int) -> int:
    """After how many segments, `longest` at most, what the regions do repeats, the first ones and the last,
    where much is dead code, left out; 0 where this does not show."""
    last = unrolled.count - 1
    rows = [(PROLOGUE, -1), *((CELL, layer) for layer in range(unrolled.n_layers)), (EPILOGUE, -1)]

    def at(kind: str, segment: int, layer: int) -> Any:
        return unrolled.written.get(Region(kind, segment, layer), EMPTY).key

    def repeats(period: int) -> bool:
        return all(
            at(kind, s, layer) == at(kind, s + period, layer)
            for kind, layer in rows
            for s in range(_FILLED, last - period - max(period, _READ))
        )

    return next((period for period in range(1, longest + 1) if repeats(period)), 0)


def _restore_dead(
    bodies: dict[Region, Body], place: dict[fx.Node, tuple[Region, int]], parts: Partition
) -> None:
    """Give a cell whose last writes are dead code (no segment reads them) the body of the segment before it.

    Computing them all the same changes no result, and spares a class of its own for the last segment. What
    later cells read of it has to be what they read of the one before: a memory that is written at every
    second segment is another value there, and no dead code.
    """
    read = _read_later(place, parts)
    for layer in range(parts.n_layers):
        for segment in range(1, parts.n_segments):
            here, before = Region(CELL, segment, layer), Region(CELL, segment - 1, layer)
            if here not in bodies or before not in bodies or bodies[here].key == bodies[before].key:
                continue
            whole = bodies[before]
            found = _embed(bodies[here], whole, _may_be_one)
            if found is not None:
                mine = {found[0][place[node][1]] for node in read[here]}
                if mine <= {place[node][1] for node in read[before]}:
                    _restore(bodies, place, here, whole, *found)
    _restore_layers(bodies, place, parts)


def _read_later(
    place: dict[fx.Node, tuple[Region, int]], parts: Partition
) -> dict[Region, list[fx.Node]]:
    """What cells of later segments read of each region."""
    found: dict[Region, list[fx.Node]] = defaultdict(list)
    for node, (region, _) in place.items():
        readers = (parts.region[user] for user in node.users if user in parts.region)
        if any(reader.kind == CELL and reader.segment > region.segment for reader in readers):
            found[region].append(node)
    return found


def _may_be_one(x: fx.Node, y: fx.Node) -> bool:
    """Whether live-ins of two segments of one layer may be the same: not two different weights."""
    return x is y or x.op != "get_attr" or y.op != "get_attr"


def _restore_layers(
    bodies: dict[Region, Body], place: dict[fx.Node, tuple[Region, int]], parts: Partition
) -> None:
    """The same for a layer whose last operations are dead code in all segments (nothing above reads what the
    top layer keeps), if they read nothing else: it spares a kind of its own."""
    for layer in range(1, parts.n_layers):
        row = [(Region(CELL, s, layer), Region(CELL, s, layer - 1)) for s in range(parts.n_segments)]
        if not all(here in bodies and below in bodies for here, below in row):
            continue
        pairs = [(here, bodies[below], _embed(bodies[here], bodies[below])) for here, below in row]
        found = [(here, whole, embedded) for here, whole, embedded in pairs if embedded is not None]
        if len(found) == len(row) and all(len(live) == len(whole.live_ins) for _, whole, (_, live) in found):
            for here, whole, (index, live_ins) in found:
                _restore(bodies, place, here, whole, index, live_ins)


def _restore(
    bodies: dict[Region, Body],
    place: dict[fx.Node, tuple[Region, int]],
    here: Region,
    whole: Body,
    index: dict[int, int],
    live_ins: dict[int, int],
) -> None:
    """Give `here` the body `whole`, which has its operations at `index` and its live-ins at `live_ins`."""
    for node, (region, i) in place.items():  # a body that was restored before has the nodes of another cell
        if region == here:
            place[node] = (here, index[i])
    mine = {there: bodies[here].live_ins[j] for j, there in live_ins.items()}
    restored = tuple(mine.get(j) for j in range(len(whole.live_ins)))
    bodies[here] = Body(whole.key, whole.nodes, restored, whole.ints, whole.lender or whole)


def _embed(
    part: Body, whole: Body, may_be: Callable[[fx.Node, fx.Node], bool] = lambda x, y: True
) -> tuple[dict[int, int], dict[int, int]] | None:
    """Positions in `whole` of the operations and live-ins of `part`, if it is `whole` with operations left
    out.

    Args:
        may_be: whether a live-in of `part` may stand for one of `whole`. Weights of one layer tell operations
            apart that are alike otherwise.
    """

    def fits(mine: int, theirs: int) -> bool:
        x, y = part.live_ins[mine], whole.live_ins[theirs]
        return not isinstance(x, fx.Node) or not isinstance(y, fx.Node) or may_be(x, y)

    index: dict[int, int] = {}
    live_ins: dict[int, int] = {}
    at = 0
    if len(part.key) >= len(whole.key):
        return None
    for i, row in enumerate(part.key):
        while at < len(whole.key):
            trial = _match(row, whole.key[at], index, dict(live_ins), fits)
            if trial is not None:
                break
            at += 1
        else:
            return None
        live_ins = trial
        index[i] = at
        at += 1
    return (index, live_ins) if len(set(live_ins.values())) == len(live_ins) else None


def _match(
    mine: Any, theirs: Any, index: dict[int, int], live_ins: dict[int, int], fits: Callable[[int, int], bool]
) -> dict[int, int] | None:
    """Whether two encoded operations agree under the positions found so far; the live-ins matched, or
    None."""
    if isinstance(mine, tuple) and isinstance(theirs, tuple) and len(mine) == len(theirs):
        if len(mine) == 2 and mine[0] == "n" and theirs[0] == "n":
            return live_ins if index.get(mine[1]) == theirs[1] else None
        if len(mine) == 3 and mine[0] == "x" and theirs[0] == "x":
            is_same = _is_same_live_in(mine, theirs, live_ins) and fits(mine[1], theirs[1])
            return live_ins if is_same else None
        for a, b in zip(mine, theirs, strict=True):
            found = _match(a, b, index, live_ins, fits)
            if found is None:
                return None
            live_ins = found
        return live_ins
    return live_ins if mine == theirs else None


def _is_same_live_in(mine: Any, theirs: Any, live_ins: dict[int, int]) -> bool:
    """Whether two encoded live-ins have one type, and may be the same; notes that they are."""
    return mine[2] == theirs[2] and live_ins.setdefault(mine[1], theirs[1]) == theirs[1]


def _private_weights(parts: Partition) -> dict[fx.Node, int | None]:
    """Init nodes computed from parameters alone that only one layer's cells use: `w.t()`, `-exp(a_log)`.

    Not `w[l]` of a tensor that holds the weights of several layers: cells differ in l.
    """
    alone = _used_by_one_layer(parts, frozenset())
    layers: dict[fx.Node, set[int]] = defaultdict(set)
    for node, layer in alone.items():
        if layer is not None and (row := row_of(node)) is not None:
            layers[row[0]].add(layer)
    rows = {node for node in alone if (row := row_of(node)) is not None and len(layers[row[0]]) > 1}
    return _used_by_one_layer(parts, frozenset(rows)) if rows else alone


def _used_by_one_layer(parts: Partition, given: frozenset[fx.Node]) -> dict[fx.Node, int | None]:
    """The layer that alone uses an init node computed from parameters and `given`, or None."""
    private: dict[fx.Node, int | None] = {}
    for node, region in parts.region.items():
        if region.kind != INIT or not node.all_input_nodes or node in given:
            continue
        if all(op.op == "get_attr" or op in private or op in given for op in node.all_input_nodes):
            private[node] = None
    for node in reversed(list(private)):
        layers = set()
        for user in node.users:
            if user in private:
                layers.add(private[user])
            elif user in parts.region and parts.region[user].kind == CELL:
                layers.add(parts.region[user].layer)
            else:
                layers.add(None)
        private[node] = next(iter(layers)) if len(layers) == 1 else None
    return private


def _only_cells_use(node: fx.Node, parts: Partition) -> bool:
    return all(user in parts.region for user in node.users)


def _inlined(nodes: list[fx.Node], private: dict[fx.Node, int | None]) -> Iterator[fx.Node]:
    pending = list(nodes)
    while pending:
        for operand in pending.pop().all_input_nodes:
            if private.get(operand) is not None:
                yield operand
                pending.append(operand)


def _body(nodes: list[fx.Node], region: Region, parts: Partition) -> Body:
    index = {node: i for i, node in enumerate(nodes)}
    live_ins: dict[Any, int] = {}
    ints: list[int] = []
    loose = region.kind != CELL

    def encode(value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value in index:
                return ("n", index[value])
            j = live_ins.setdefault(value, len(live_ins))
            return ("x", j) if loose else ("x", j, shape_of(value.meta.get("val")))
        if isinstance(value, (list, tuple)):
            for turned, values in enumerate((value, value[::-1]) if loose else ()):
                if (each := _each_segment(values, parts, region)) is not None:
                    return ("each", "the last one first" * turned, live_ins.setdefault(each, len(live_ins)))
            return (type(value).__name__, *map(encode, value))
        if isinstance(value, dict):
            return ("dict", *((k, encode(v)) for k, v in value.items()))
        if loose and type(value) is int:
            ints.append(value)
            return ("int",)
        return key_of(value)

    rows = []
    for node in nodes:
        args = ("tuple", *map(encode, node.args))  # never themselves a list over segments: add(total, new)
        row = (node.target, args, encode(node.kwargs), node.meta.get("context", ()))
        rows.append(row if loose else (*row, shape_of(node.meta.get("val"))))
    return Body(tuple(rows), tuple(nodes), tuple(live_ins), tuple(ints))


def _each_segment(values: Any, parts: Partition, reader: Region) -> tuple[fx.Node, ...] | None:
    """The nodes of a list argument that holds one value of each of several consecutive segments, or None."""
    if len(values) < 2 or not all(isinstance(value, fx.Node) and value in parts.region for value in values):
        return None
    regions = [parts.region[value] for value in values]
    if len({(r.kind, r.layer) for r in regions}) != 1 or regions[0].kind == INIT:
        return None
    start, n = regions[0].segment, len(regions)
    if reader.kind == EPILOGUE and start >= max(n, 2):  # the last few segments, however many there are
        return None
    return tuple(values) if [r.segment for r in regions] == list(range(start, start + n)) else None


def shape_of(val: Any) -> Any:
    """Shape, dtype and device of a fake value, or of each in a tuple of them."""
    if isinstance(val, torch.Tensor):
        return (tuple(val.shape), val.dtype, val.device)
    if isinstance(val, (list, tuple)):
        return tuple(map(shape_of, val))
    return None


def typed(node: fx.Node) -> str:
    """The type of a node's value in short: `float32[1, 4, 16]`."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return type(val).__name__
    return f"{str(val.dtype).removeprefix('torch.')}{list(val.shape)}"


EMPTY = Body((), (), (), ())


def body_at(unrolled: Unrolled, key: Key, segment: int) -> Body:
    kind, layer = key
    return unrolled.bodies.get(Region(kind, segment, layer), EMPTY)


def region_name(key: Key) -> str:
    return f"layer {key[1]}" if key[0] == CELL else key[0]
