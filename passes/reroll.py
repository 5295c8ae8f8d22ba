"""Reroll: from a graph unrolled over k segments to rules that give the graph of any number of segments.

    cell (0, l)  A' = add(zeros, u)            class first:  A' = add(A, u)    A from init
    cell (1, l)  A' = add(A', u)       ->      class later:  A' = add(A, u)    A from cell (s - 1, l)
    cell (2, l)  A' = add(A', u)

Each region is reduced to a *body* (its operations, live-ins apart) and the sources of its live-ins. Bodies
are equal or not; sources are absolute ("init", "segment 0") or relative ("one segment back"); integers in
prologues and epilogues are affine in the segment s and in the number of segments S.

Proof by comparison: the rules are read from a capture with k segments, then predict a capture with k + 1:
every region, operation, integer and edge of the larger capture has to come out as predicted, or `RerollError`
names what did not.
Reference: loop rerolling is the inverse of unrolling; anti-unification gives the affine integers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from rmtcompile.errors import RerollError
from rmtcompile.passes.number import key_of
from rmtcompile.passes.partition import CELL, EPILOGUE, INIT, PROLOGUE, Partition, Region
from rmtcompile.program import Affine, Body, Each, Source
from rmtcompile.weights import row_of


@dataclass(frozen=True)
class Unrolled:
    """A partitioned capture with `count` segments: the body of every region, and the place of every value.

    Attributes:
        outputs: the graph's outputs (results, what is left behind, what is written); a tuple has one for each
            segment.
        leaf_names: name of the tensor behind each `get_attr` target, equal in all captures of one model.
        sizes: lengths of the inputs' axes, in order.
    """

    count: int
    n_layers: int
    bodies: dict[Region, Body]
    place: dict[fx.Node, tuple[Region, int]]
    outputs: tuple[fx.Node | tuple[fx.Node, ...], ...]
    leaf_names: dict[str, str]
    sizes: tuple[int, ...] = ()

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
    _restore_dead(bodies, place, parts)
    output = next(node for node in graph.nodes if node.op == "output")
    outputs: list[fx.Node] = []
    fx.node.map_arg(output.args, outputs.append)
    sizes = tuple(n for node in graph.nodes if node.op == "placeholder" for n in node.meta["val"].shape)
    return Unrolled(parts.n_segments, parts.n_layers, bodies, place, tuple(outputs), leaf_names, sizes)


def _restore_dead(
    bodies: dict[Region, Body], place: dict[fx.Node, tuple[Region, int]], parts: Partition
) -> None:
    """Give a cell whose last writes are dead code (no segment reads them) the body of the segment before it.

    Computing them all the same changes no result, and spares a class of its own for the last segment.
    """
    for layer in range(parts.n_layers):
        for segment in range(1, parts.n_segments):
            here, before = Region(CELL, segment, layer), Region(CELL, segment - 1, layer)
            if here not in bodies or before not in bodies or bodies[here].key == bodies[before].key:
                continue
            whole = bodies[before]
            found = _embed(bodies[here], whole)
            if found is not None:
                _restore(bodies, place, here, whole, *found)
    _restore_layers(bodies, place, parts)


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
    for i, node in enumerate(bodies[here].nodes):
        if place.get(node) == (here, i):
            place[node] = (here, index[i])
    mine = {there: bodies[here].live_ins[j] for j, there in live_ins.items()}
    restored = tuple(mine.get(j) for j in range(len(whole.live_ins)))
    bodies[here] = Body(whole.key, whole.nodes, restored, whole.ints, whole.lender or whole)


def _embed(part: Body, whole: Body) -> tuple[dict[int, int], dict[int, int]] | None:
    """Positions in `whole` of the operations and live-ins of `part`, if it is `whole` with operations left
    out."""
    index: dict[int, int] = {}
    live_ins: dict[int, int] = {}
    at = 0
    if len(part.key) >= len(whole.key):
        return None
    for i, row in enumerate(part.key):
        while at < len(whole.key):
            trial = _match(row, whole.key[at], index, dict(live_ins))
            if trial is not None:
                break
            at += 1
        else:
            return None
        live_ins = trial
        index[i] = at
        at += 1
    return (index, live_ins) if len(set(live_ins.values())) == len(live_ins) else None


def _match(mine: Any, theirs: Any, index: dict[int, int], live_ins: dict[int, int]) -> dict[int, int] | None:
    """Whether two encoded operations agree under the positions found so far; the live-ins matched, or
    None."""
    if isinstance(mine, tuple) and isinstance(theirs, tuple) and len(mine) == len(theirs):
        if len(mine) == 2 and mine[0] == "n" and theirs[0] == "n":
            return live_ins if index.get(mine[1]) == theirs[1] else None
        if len(mine) == 2 and mine[0] == "x" and theirs[0] == "x":
            return live_ins if live_ins.setdefault(mine[1], theirs[1]) == theirs[1] else None
        for a, b in zip(mine, theirs, strict=True):
            found = _match(a, b, index, live_ins)
            if found is None:
                return None
            live_ins = found
        return live_ins
    return live_ins if mine == theirs else None


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
            return ("x", live_ins.setdefault(value, len(live_ins)))
        if isinstance(value, (list, tuple)):
            if loose and (each := _each_segment(value, parts, index)) is not None:
                return ("each", live_ins.setdefault(each, len(live_ins)))
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


def _each_segment(values: Any, parts: Partition, own: dict[fx.Node, int]) -> tuple[fx.Node, ...] | None:
    """The nodes of a list argument that holds one value of each of several consecutive segments, or None."""
    if len(values) < 2 or not all(isinstance(value, fx.Node) and value in parts.region for value in values):
        return None
    regions = [parts.region[value] for value in values]
    if len({(r.kind, r.layer) for r in regions}) != 1 or regions[0].kind == INIT:
        return None
    start = regions[0].segment
    return tuple(values) if [r.segment for r in regions] == list(range(start, start + len(regions))) else None


def shape_of(val: Any) -> Any:
    """Shape and dtype of a fake value, or of each in a tuple of them."""
    if isinstance(val, torch.Tensor):
        return (tuple(val.shape), val.dtype)
    if isinstance(val, (list, tuple)):
        return tuple(map(shape_of, val))
    return None


@dataclass(frozen=True)
class ClassRule:
    """The body and the sources of one class of one region.

    Attributes:
        body: from the capture that the rules were read from.
        sources: for each live-in, the sources of the first segments of the class one by one, then the steady
            rule (relative or absolute). A list over segments is one `Each`.
        ints: for each integer of the body, its value as a function of s and S.
        varying: dims of the body's values and live-ins that are not the same for every s and S.
    """

    body: Body
    sources: tuple[LiveIn, ...]
    ints: tuple[Affine, ...]
    varying: Mapping[fx.Node, frozenset[int]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class LiveIn:
    """Sources of one live-in over the segments of a class: `early[s]` for the first ones, then `steady`."""

    early: dict[int, Source]
    steady: Source | Each | None

    def at(self, segment: int) -> Source | Each:
        """The source at one segment."""
        found = self.early.get(segment, self.steady)
        assert found is not None
        return found

    @property
    def is_invariant(self) -> bool:
        """Whether every segment reads the same parameter, input or init value."""
        return (
            not self.early and isinstance(self.steady, Source) and self.steady.kind in ("leaf", "input", INIT)
        )

    @property
    def key(self) -> object:
        """Equal for live-ins that travel the same way."""
        steady = self.steady.way if isinstance(self.steady, Source) else self.steady
        return (tuple((s, source.way) for s, source in sorted(self.early.items())), steady)


@dataclass(frozen=True)
class Classes:
    """Which body a region has at segment s of S: `head` of them are peeled off the front, `tail` off the
    end."""

    head: int
    tail: int

    def of(self, segment: int, count: int) -> int:
        """Class number: 0 .. head-1 from the front, -1 .. -tail from the end, `head` for all between."""
        if segment >= count - self.tail:
            return segment - count
        return min(segment, self.head)


Key = tuple[str, int]  # (region kind, layer)


@dataclass(frozen=True)
class Rolled:
    """The rules: `rules[(kind, layer)][class]`; init has the single class 0."""

    n_layers: int
    classes: dict[Key, Classes]
    rules: dict[Key, dict[int, ClassRule]]
    # Absolute segments count from the end where `relative`: S - 1 - segment.
    outputs: tuple[Source | Each, ...]
    base: Unrolled
    minimum: int = 1
    fixed: int | None = None
    proved_on: tuple[int, ...] = field(default=())

    def rule(self, kind: str, layer: int, segment: int, count: int) -> ClassRule:
        key = (kind, layer)
        return self.rules[key][self.classes[key].of(segment, count)]


def reroll(small: Unrolled, large: Unrolled) -> Rolled:
    """Read rules from `small` (k segments) and prove that they give `large` (k + 1 segments).

    Raises:
        RerollError: the two captures do not follow one rule; the message shows the first place where they
            differ.
    """
    if large.count != small.count + 1 or large.n_layers != small.n_layers:
        raise RerollError(
            "one more segment changes the layers that run",
            [
                f"{small.count} segments: {small.n_layers} layers",
                f"{large.count} segments: {large.n_layers} layers",
            ],
        )
    keys: list[Key] = [(PROLOGUE, -1), *((CELL, layer) for layer in range(small.n_layers)), (EPILOGUE, -1)]
    classes: dict[Key, Classes] = {(INIT, -1): Classes(0, 0)}
    rules: dict[Key, dict[int, ClassRule]] = {(INIT, -1): {0: _init_rule(small, large)}}
    for key in keys:
        classes[key] = _classes(key, small, large)
    for key in keys:
        rules[key] = _class_rules(key, classes, small, large)
    outputs = _outputs(small, large, classes)
    rules, outputs = _complete(rules, outputs)
    minimum = max(c.head + c.tail if c.head and c.tail else 1 for c in classes.values())
    return Rolled(small.n_layers, classes, rules, outputs, small, minimum, None, (small.count, large.count))


def fixed(only: Unrolled) -> Rolled:
    """Rules for one number of segments: every segment is its own class. Needs no proof, predicts nothing."""
    keys: list[Key] = [(PROLOGUE, -1), *((CELL, layer) for layer in range(only.n_layers)), (EPILOGUE, -1)]
    classes: dict[Key, Classes] = {(INIT, -1): Classes(0, 0)}
    rules: dict[Key, dict[int, ClassRule]] = {(INIT, -1): {0: _init_rule(only, only)}}
    for key in keys:
        bodies = [_body_at(only, key, s) for s in range(only.count)]
        head = next((h for h in range(only.count) if all(b.key == bodies[h].key for b in bodies[h:])), 0)
        classes[key] = Classes(head, 0)
    for key in keys:
        rules[key] = _class_rules(key, classes, only, only)
    outputs = _outputs(only, only, classes)
    return Rolled(only.n_layers, classes, rules, outputs, only, only.count, only.count, (only.count,))


def _body_at(unrolled: Unrolled, key: Key, segment: int) -> Body:
    kind, layer = key
    return unrolled.bodies.get(Region(kind, segment, layer), _EMPTY)


_EMPTY = Body((), (), (), ())


def _classes(key: Key, small: Unrolled, large: Unrolled) -> Classes:
    """The fewest peeled segments such that repeating the body before the tail once more gives the larger
    capture, and such that the integers of what is repeated follow one rule (a short last segment ends
    early)."""
    short = [_body_at(small, key, s).key for s in range(small.count)]
    long = [_body_at(large, key, s).key for s in range(large.count)]
    found: Classes | None = None
    for tail in range(small.count):
        middle = small.count - tail
        if short[:middle] + [short[middle - 1]] + short[middle:] != long:
            continue
        head = middle - 1
        while head and short[head - 1] == short[middle - 1]:
            head -= 1
        found = found or Classes(head, tail)
        if found.tail == tail or middle - head >= 2:  # integers of one segment follow any rule
            members = _members(key, Classes(head, tail), small, large)
            if all(_follow(key, ofclass) for ofclass in members.values()):
                return Classes(head, tail)
    if found is not None:
        return found
    evidence = list(_difference(key, small, large))
    if constants := _constants(key, large):
        raise RerollError(
            f"a constant in {_region_name(key)} changes from segment to segment: "
            + ", ".join(f"{a!r} and {b!r}" for a, b in constants),
            evidence,
            "make a table before the segments and index it, table = 1 / torch.arange(1, n + 1) and table[s] "
            "instead of 1 / (s + 1); fallback='sequential' runs the model as it is",
        )
    raise RerollError(
        f"the segments of {_region_name(key)} do not follow one rule",
        evidence,
        "segments that differ from each other by more than a special start and end cannot be run on "
        "diagonals; use fallback='sequential' to run the model as it is",
    )


def _region_name(key: Key) -> str:
    return f"layer {key[1]}" if key[0] == CELL else key[0]


def _constants(key: Key, large: Unrolled) -> list[tuple[Any, Any]]:
    """The numbers in which two segments in the middle differ, if they differ in nothing else."""

    def pairs(left: Any, right: Any) -> Iterator[tuple[Any, Any]]:
        if left == right:
            return
        if not (isinstance(left, tuple) and isinstance(right, tuple) and len(left) == len(right)):
            raise _OtherwiseError
        if len(left) == 2 and left[0] == right[0] and left[0] in ("float", "int", "bool"):
            yield left[1], right[1]
            return
        for x, y in zip(left, right, strict=True):
            yield from pairs(x, y)

    for s in range(1, large.count - 1):
        try:
            found = list(pairs(_body_at(large, key, s).key, _body_at(large, key, s + 1).key))
        except _OtherwiseError:
            continue
        if found:
            return found
    return []


class _OtherwiseError(Exception):
    """Two bodies differ in more than numbers."""


def _difference(key: Key, small: Unrolled, large: Unrolled) -> Iterator[str]:
    """Evidence: the first operation at which two segments in the middle differ."""
    middle = small.count - 1
    a, b = _body_at(large, key, middle), _body_at(large, key, middle - 1)
    for left, right, x, y in zip(b.key, a.key, b.nodes, a.nodes, strict=False):
        if left != right:
            yield f"segment {middle - 1}: {x.format_node()}   {x.meta.get('source')}"
            yield f"segment {middle}: {y.format_node()}   {y.meta.get('source')}"
            return
    yield f"segment {middle - 1} has {len(b.nodes)} operations, segment {middle} has {len(a.nodes)}"


def _members(
    key: Key, classes: Classes, small: Unrolled, large: Unrolled
) -> dict[int, list[tuple[Unrolled, int]]]:
    """The instances of each class of a region in both captures."""
    members: dict[int, list[tuple[Unrolled, int]]] = defaultdict(list)
    for unrolled in (small, large) if large is not small else (small,):
        for s in range(unrolled.count):
            members[classes.of(s, unrolled.count)].append((unrolled, s))
    return members


def _follow(key: Key, members: list[tuple[Unrolled, int]]) -> bool:
    """Whether every integer of a class is affine."""
    unrolled, segment = members[0]
    try:
        for j in range(len(_body_at(unrolled, key, segment).ints)):
            _affine(key, j, members)
    except RerollError:
        return False
    return True


def _class_rules(
    key: Key, classes: dict[Key, Classes], small: Unrolled, large: Unrolled
) -> dict[int, ClassRule]:
    members = _members(key, classes[key], small, large)
    rules: dict[int, ClassRule] = {}
    for number, found in members.items():
        base, first = found[0]
        body = _body_at(base, key, first)
        body = body.lender or body
        sources = tuple(_live_in(key, j, found, classes) for j in range(len(body.live_ins)))
        ints = tuple(_affine(key, j, found) for j in range(len(body.ints)))
        others = [_body_at(unrolled, key, s) for unrolled, s in found]
        rules[number] = ClassRule(body, sources, ints, _varying(body, others))
    return rules


def _init_rule(small: Unrolled, large: Unrolled) -> ClassRule:
    key = (INIT, -1)
    a, b = small.bodies.get(Region(INIT), _EMPTY), large.bodies.get(Region(INIT), _EMPTY)
    if a.key != b.key:
        rows = list(zip(a.key, b.key, a.nodes, b.nodes, strict=False))
        where = next(((x, y) for left, right, x, y in rows if left != right), None)
        raise RerollError(
            "what the forward computes before its segments changes with their number",
            [f"{n.format_node()}   {n.meta.get('source')}" for n in where]
            if where
            else [f"{len(a.nodes)} operations for {small.count} segments, {len(b.nodes)} for {large.count}"],
            "compute per segment what depends on the segment",
        )
    members = [(small, 0), (large, 0)] if small is not large else [(small, 0)]
    sources = []
    for j, node in enumerate(a.live_ins):
        source = small.source(node)  # type: ignore[arg-type]
        other = large.source(b.live_ins[j])  # type: ignore[arg-type]
        if source != other:
            raise RerollError("init reads other values with one more segment", [f"{source} against {other}"])
        sources.append(LiveIn({}, source))
    ints = tuple(_affine(key, j, members, by_count_only=True) for j in range(len(a.ints)))
    return ClassRule(a, tuple(sources), ints, _varying(a, [b]))


def _varying(body: Body, others: list[Body]) -> dict[fx.Node, frozenset[int]]:
    """Dims of a body's values that have another size in another instance of it."""
    found: dict[fx.Node, set[int]] = defaultdict(set)
    for other in others:
        mine_all, theirs_all = (*body.nodes, *body.live_ins), (*other.nodes, *other.live_ins)
        for mine, theirs in zip(mine_all, theirs_all, strict=False):
            if isinstance(mine, fx.Node) and isinstance(theirs, fx.Node) and mine is not theirs:
                a, b = shape_of(mine.meta.get("val")), shape_of(theirs.meta.get("val"))
                if a != b and isinstance(mine.meta.get("val"), torch.Tensor):
                    found[mine] |= {i for i, (x, y) in enumerate(zip(a[0], b[0], strict=False)) if x != y}
    return {node: frozenset(dims) for node, dims in found.items()}


def _affine(key: Key, j: int, members: list[tuple[Unrolled, int]], by_count_only: bool = False) -> Affine:
    """Fit one integer over all instances of a class; every instance must lie on the fit."""
    points = [(s, u.count, _body_at(u, key, s if key[0] != INIT else -1).ints[j]) for u, s in members]
    s0, n0, v0 = points[0]
    pairs = [(p, q) for i, p in enumerate(points) for q in points[i + 1 :]]
    by_segment = by_count = 0
    if not by_count_only:
        along = next(((p, q) for p, q in pairs if p[1] == q[1] and p[0] != q[0]), None)
        along = along or next(((p, q) for p, q in pairs if p[0] != q[0]), None)
        by_segment = (along[1][2] - along[0][2]) // (along[1][0] - along[0][0]) if along else 0
    across = next(((p, q) for p, q in pairs if p[1] != q[1]), None)
    if across:
        (sp, np, vp), (sq, nq, vq) = across
        by_count = (vq - vp - by_segment * (sq - sp)) // (nq - np)
    fit = Affine(v0 - by_segment * s0 - by_count * n0, by_segment, by_count)
    if by_segment and len(points) <= 3 and abs(by_segment) not in _steps(members):
        raise RerollError(
            f"an integer in {_region_name(key)} is not seen often enough to be called even",
            [f"segment {a} of {b}: {c}" for a, b, c in points],
        )
    if any(fit.at(s, n) != v for s, n, v in points):
        raise RerollError(
            f"an integer in {_region_name(key)} does not grow evenly with the segment",
            [f"segment {a} of {b}: {c}" for a, b, c in points],
            "use positions and sizes that are affine in the segment number",
        )
    return fit


def _steps(members: list[tuple[Unrolled, int]]) -> set[int]:
    """By how much positions move from one segment to the next: one, or the length of a segment."""
    sizes = {unrolled.count: unrolled.sizes for unrolled, _ in members}
    if len(sizes) == 1:
        ((count, only),) = sizes.items()
        return {1, *(n // count for n in only if n % count == 0)}
    small, large = (sizes[count] for count in sorted(sizes))
    return {1, *(b - a for a, b in zip(small, large, strict=True))}


def _live_in(key: Key, j: int, members: list[tuple[Unrolled, int]], classes: dict[Key, Classes]) -> LiveIn:
    """One live-in over the instances of a class: sources of the early segments, then one rule."""
    nodes = [(unrolled, s, _body_at(unrolled, key, s).live_ins[j]) for unrolled, s in members]
    nodes = [entry for entry in nodes if entry[2] is not None]  # live-ins of code that is dead there
    if any(isinstance(node, tuple) for _, _, node in nodes):
        return LiveIn({}, _each(key, nodes, classes))
    seen = [(unrolled, s, unrolled.source(node)) for unrolled, s, node in nodes if isinstance(node, fx.Node)]
    if not seen:
        raise RerollError(
            f"nothing that is returned depends on {_region_name(key)} in some segments",
            [f"segments {sorted({s for _, s in members})}"],
            "return a value of each segment, or run with fallback='sequential'",
        )
    last_segment = max(s for _, s, _ in seen)
    rule = _steady([(s, found) for _, s, found in seen], last_segment)
    early: dict[int, Source] = {}
    steady_seen: list[tuple[Unrolled, Source]] = []
    for unrolled, s, found in seen:
        if _agrees(rule, s, found):
            steady_seen.append((unrolled, found))
        elif early.setdefault(s, _ruled([(unrolled, found)], classes)) != found:
            raise RerollError(
                f"segment {s} of {_region_name(key)} reads from another place with one more segment",
                [str(early[s]), str(found)],
            )
    regular = {s for _, s, found in seen if _agrees(rule, s, found)}
    if early and (max(early) >= last_segment or len(regular) < 2):
        raise RerollError(
            f"a value that {_region_name(key)} reads comes from another place in each segment",
            [f"segment {s}: {found}" for _, s, found in seen],
            "dependences must be the same number of segments back in every segment",
        )
    return LiveIn(early, replace(rule, nodes=_ruled(steady_seen, classes).nodes))


def _ruled(
    seen: list[tuple[Unrolled, Source]], classes: dict[Key, Classes], from_end: bool = False
) -> Source:
    """The first source, with its index in the producer's body for every class of producer that was seen."""
    nodes: dict[int, int] = {}
    for unrolled, found in seen:
        if found.kind in ("leaf", "input"):
            return found
        segment = unrolled.count - 1 - found.segment if from_end and found.relative else found.segment
        number = classes[(found.kind, found.layer)].of(segment, unrolled.count) if found.kind != INIT else 0
        if nodes.setdefault(number, found.node) != found.node:
            raise RerollError(
                "one value comes from two operations of the same code",
                [f"{_region_name((found.kind, found.layer))}: operations {nodes[number]} and {found.node}"],
            )
    return replace(seen[0][1], nodes=tuple(sorted(nodes.items())))


def _steady(seen: list[tuple[int, Source]], last: int) -> Source:
    """The rule in the last segment: relative to the segment, or absolute where every segment reads the same
    one."""
    found = next(source for s, source in seen if s == last)
    if found.kind in ("leaf", "input", INIT):
        return found
    everywhere = all(other == found for _, other in seen) and len({s for s, _ in seen}) > 1
    if found.segment < last and everywhere:
        return found
    return replace(found, segment=last - found.segment, relative=True)


def _agrees(rule: Source, segment: int, found: Source) -> bool:
    """Whether `rule` gives `found`, up to the position in a body of another class."""
    if (rule.kind, rule.name, rule.layer) != (found.kind, found.name, found.layer):
        return False
    if rule.kind in ("leaf", "input"):
        return True
    if rule.kind == INIT:
        return rule.node == found.node
    return rule.segment_from(segment) == found.segment


def _each(key: Key, seen: list[tuple[Unrolled, int, Any]], classes: dict[Key, Classes]) -> Each:
    """A list over segments: every instance must hold the same segments, counted from the start and from its
    own."""
    found: set[Each] = set()
    nodes: dict[int, int] = {}
    for unrolled, segment, values in seen:
        sources = [unrolled.source(node) for node in (values if isinstance(values, tuple) else (values,))]
        first, last = sources[0], sources[-1]
        found.add(Each(first.segment, segment - last.segment, first.kind, first.layer))
        for source in sources:
            number = classes[(source.kind, source.layer)].of(source.segment, unrolled.count)
            if nodes.setdefault(number, source.node) != source.node:
                found.add(Each(-1, -1, source.kind, source.layer))
    if len(found) != 1:
        raise RerollError(
            f"a list over segments in {_region_name(key)} does not follow one rule",
            [str(each) for each in found],
        )
    return replace(found.pop(), nodes=tuple(sorted(nodes.items())))


def _output_source(node: fx.Node, unrolled: Unrolled) -> Source:
    source = unrolled.source(node)
    if source.kind in (PROLOGUE, CELL, EPILOGUE):
        return replace(source, segment=unrolled.count - 1 - source.segment, relative=True)
    return source


def _outputs(small: Unrolled, large: Unrolled, classes: dict[Key, Classes]) -> tuple[Source | Each, ...]:
    found: list[Source | Each] = []
    for a, b in zip(small.outputs, large.outputs, strict=True):
        if isinstance(a, tuple) and isinstance(b, tuple):
            seen = [(small, small.count - 1, a), (large, large.count - 1, b)]
            found.append(_each(("the outputs", -1), seen, classes))
            continue
        assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
        x, y = _output_source(a, small), _output_source(b, large)
        from_end = (x.kind, x.name, x.segment, x.layer) == (y.kind, y.name, y.segment, y.layer)
        if not from_end:
            x, y = small.source(a), large.source(b)
            if (x.kind, x.segment, x.layer) != (y.kind, y.segment, y.layer):
                raise RerollError(
                    "an output comes from another place with one more segment",
                    [
                        f"{a.format_node()}   {a.meta.get('source')}",
                        f"{b.format_node()}   {b.meta.get('source')}",
                    ],
                )
        found.append(_ruled([(small, x), (large, y)], classes, from_end))
    return tuple(found)


def _complete(
    rules: dict[Key, dict[int, ClassRule]], outputs: tuple[Source | Each, ...]
) -> tuple[dict[Key, dict[int, ClassRule]], tuple[Source | Each, ...]]:
    """Give each source the index of its value in every class that any consumer of the same value has shown.

    The last state of layer l is read from a later segment in any capture with several segments; that segment
    0 holds the same value at another index is known from segment 1, which reads it.
    """
    known: dict[Key, list[dict[int, int]]] = defaultdict(list)

    def learn(source: Source | Each) -> None:
        merged = dict(source.nodes)
        rest = []
        for other in known[(source.kind, source.layer)]:
            shares = any(merged.get(number) == index for number, index in other.items())
            clashes = any(merged.get(number, index) != index for number, index in other.items())
            if shares and not clashes:
                merged = {**other, **merged}
            else:
                rest.append(other)
        known[(source.kind, source.layer)] = [*rest, merged]

    def recall(source: Any) -> Any:
        for other in known.get((source.kind, source.layer), ()) if source is not None else ():
            if all(other.get(number) == index for number, index in source.nodes):
                return replace(source, nodes=tuple(sorted(other.items())))
        return source

    for by_class in rules.values():
        for rule in by_class.values():
            for live_in in rule.sources:
                for source in (*live_in.early.values(), live_in.steady):
                    if source is not None and source.nodes:
                        learn(source)
    for source in outputs:
        if source.nodes:
            learn(source)
    completed = {
        key: {
            number: replace(
                rule,
                sources=tuple(
                    LiveIn({s: recall(source) for s, source in x.early.items()}, recall(x.steady))
                    for x in rule.sources
                ),
            )
            for number, rule in by_class.items()
        }
        for key, by_class in rules.items()
    }
    return completed, tuple(recall(source) for source in outputs)
