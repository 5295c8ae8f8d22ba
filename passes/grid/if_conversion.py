"""Align: the variants of one layer's cells become one graph, predicated where they differ.

    first:  h = attend(x)                            h0 = x + read(mq(x), A)       computed for all cells
    later:  h = attend(x + read(mq(x), A))     ->    h1 = where(is_first, x, h0)   kept or dropped by cell
                                                     h  = attend(h1)               shared

On a wavefront of the ramp-up one cell belongs to the first segment and the others do not.  Running it by
itself would cost an extra small step a level; predication costs a few operations on one cell.  Selection is
exact: `where` keeps the bits of the operand it picks.  Where a live-in of the first variant is what a carry
holds before its first write (a zero matrix, say), no selection is needed: it becomes the lane's initial
value.

Requires: bodies of one kind of layer, by class.  Ensures: for each class, the merged graph with its mask set
computes what the class's body computes.  Classes whose values differ in shape stay apart (`Group`s of their
own).
Reference: if-conversion; sequence alignment by longest matching blocks.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from rmtcompile.ir.program import Body, Source
from rmtcompile.passes.grid.reroll import ClassRule, LiveIn, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Merged:
    """One graph for several classes.

    Attributes:
        graph: placeholders `v0, v1, ...` for live-ins, then `is_<class>` masks (bool scalars per cell); no
            output node.
        live_ins: for each live-in placeholder, its index among the live-ins of each class that has it.
        values: for each class, the node that holds each operation of that class's body.
        masks: mask placeholder by class; the first class needs none.
    """

    graph: fx.Graph
    live_ins: dict[fx.Node, dict[int, int]]
    values: dict[int, list[fx.Node]]
    masks: dict[int, fx.Node]

    @property
    def classes(self) -> tuple[int, ...]:
        return tuple(self.values)


class _CannotMergeError(Exception):
    """The classes differ in a way that a selection cannot bridge."""


@dataclass(eq=False)
class _Row:
    """One operation of the merged program under construction."""

    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any]


@dataclass(eq=False)
class _Port:
    """A live-in placeholder under construction: its index in each class, and what identifies it."""

    index: dict[int, int]
    val: Any
    meta: dict[str, Any] = field(default_factory=dict)


def align(
    rules: Mapping[int, ClassRule], steady: int, others: Sequence[Mapping[int, ClassRule]] = ()
) -> list[Merged]:
    """Merge the classes of one kind, the steady class first; classes that cannot be merged come as graphs of
    their own.

    Args:
        rules: the body of each class, all of one layer.
        steady: the class that most segments belong to.
        others: the same of the other layers of the kind, whose values come from elsewhere.
    """
    distinct: dict[Any, list[int]] = {}
    for number in sorted(rules, key=lambda c: (c != steady, c)):
        distinct.setdefault((rules[number].body.key, ports_key(rules[number])), []).append(number)
    merged: list[_Builder] = []
    for numbers in distinct.values():
        for builder in merged:
            try:
                builder.fold(numbers, rules[numbers[0]])
                break
            except _CannotMergeError:
                continue
        else:
            merged.append(_Builder(numbers, rules[numbers[0]], others))
    return [builder.finish() for builder in merged]


def ports_key(rule: ClassRule) -> Any:
    """Types of a body's live-ins."""
    return tuple(shape_of(_val(node)) for node in rule.body.live_ins)


def _val(node: Any) -> Any:
    return node.meta.get("val")


def _is_fed_anew(live_in: LiveIn) -> bool:
    """Whether every segment makes the value itself: it is no carry."""
    steady = live_in.steady
    return isinstance(steady, Source) and steady.relative and steady.segment == 0


def _anew(rule: ClassRule) -> list[tuple[LiveIn, Any]]:
    """The live-ins that every segment makes itself."""
    return [
        (x, node) for x, node in zip(rule.sources, rule.body.live_ins, strict=True) if _is_fed_anew(x)
    ]


class _Builder:
    """A merged program that classes are folded into one by one."""

    def __init__(
        self, numbers: list[int], rule: ClassRule, others: Sequence[Mapping[int, ClassRule]]
    ) -> None:
        self.others = others
        self.ports: list[_Port] = []
        self.rows: list[Any] = []  # _Row, in order
        self.values: dict[int, list[Any]] = {}  # class -> row of each of its operations
        self.masks: dict[int, tuple[int, ...]] = {}
        self.twins: dict[int, tuple[int, ...]] = {numbers[0]: tuple(numbers)}
        self.rules = {numbers[0]: rule}
        for j, node in enumerate(rule.body.live_ins):
            self.ports.append(_Port({numbers[0]: j}, _val(node), _kept_meta(node)))
        values: dict[fx.Node, Any] = dict(zip(rule.body.live_ins, self.ports, strict=True))  # type: ignore[arg-type]
        rows = []
        for node in rule.body.nodes:
            rows.append(
                _Row(node.target, _map(node.args, values), _map(node.kwargs, values), dict(node.meta))
            )
            values[node] = rows[-1]
        self.rows = rows
        self.values[numbers[0]] = list(rows)

    def fold(self, numbers: list[int], rule: ClassRule) -> None:
        """Merge one more class in, or raise `_CannotMergeError` and leave the builder as it was."""
        number, body = numbers[0], rule.body
        self._check_lengths(rule)
        pairs = self._match(body)
        _check_worth(pairs, self.rows, body)
        bound = self._bind(pairs, body, number, rule)
        ports, extra = list(self.ports), []
        by_index: dict[int, _Port] = {}
        for port, j in bound.items():
            by_index.setdefault(j, port)
        values: dict[fx.Node, Any] = {}

        def value_of(node: fx.Node) -> Any:
            if node in values:
                return values[node]
            j = body.live_ins.index(node)
            if j not in by_index:
                by_index[j] = _Port({number: j}, _val(node), _kept_meta(node))
                extra.append(by_index[j])
            return by_index[j]

        rows: list[Any] = []
        selections: dict[tuple[int, int], _Row] = {}
        renamed: dict[int, _Row] = {}  # old row -> its replacement with selected operands
        matched = {id(row): node for row, node in pairs}
        pending = iter(body.nodes)

        def advance(until: fx.Node | None) -> None:
            for node in pending:
                if node is until:
                    return
                row = _Row(
                    node.target,
                    _map_with(node.args, value_of),
                    _map_with(node.kwargs, value_of),
                    dict(node.meta),
                )
                values[node] = row
                rows.append(row)

        for old in self.rows:
            args, kwargs = _rename(old.args, renamed), _rename(old.kwargs, renamed)
            node = matched.get(id(old))
            if node is not None:
                advance(node)
                live_ins = {id(n): j for j, n in enumerate(body.live_ins)}

                def merge(
                    mine: Any, theirs: Any, live_ins: dict[int, int] = live_ins, reader: fx.Node = node
                ) -> Any:
                    if isinstance(theirs, fx.Node):
                        if (
                            isinstance(mine, _Port)
                            and id(theirs) in live_ins
                            and bound.get(mine) == live_ins[id(theirs)]
                        ):
                            return mine
                        other = value_of(theirs)
                        if mine is not other:
                            _check_selection(_row_val(other), _row_val(mine), reader)
                        if mine is not other and (id(mine), id(other)) not in selections:
                            selections[(id(mine), id(other))] = _select(number, other, mine, rows)
                        return mine if mine is other else selections[(id(mine), id(other))]
                    if isinstance(theirs, (list, tuple)):
                        return type(theirs)(merge(a, b) for a, b in zip(mine, theirs, strict=True))
                    if isinstance(theirs, dict):
                        return {k: merge(mine[k], v) for k, v in theirs.items()}
                    return mine

                args, kwargs = merge(args, node.args), merge(kwargs, dict(node.kwargs))
            row = _Row(old.target, args, kwargs, old.meta)
            renamed[id(old)] = row
            if node is not None:
                values[node] = row
            rows.append(row)
        advance(None)
        for port, j in bound.items():
            port.index[number] = j
        self.ports = ports + extra
        self.rows = rows
        self.values = {c: [renamed[id(row)] for row in found] for c, found in self.values.items()}
        self.values[number] = [values[node] for node in body.nodes]
        self.twins[number] = tuple(numbers)
        self.rules[number] = rule
        self.masks[number] = tuple(numbers)

    def _check_lengths(self, rule: ClassRule) -> None:
        """A segment of another length is no variant, also where its one position would broadcast."""
        mine = {c: [(x.key, shape_of(_val(n))) for x, n in _anew(r)] for c, r in self.rules.items()}
        theirs = {x.key: shape_of(_val(node)) for x, node in _anew(rule)}
        if any(theirs.get(key, shape) != shape for found in mine.values() for key, shape in found):
            raise _CannotMergeError

    def _match(self, body: Body) -> list[tuple[Any, fx.Node]]:
        mine = [_token(row.target, row.args, row.kwargs, row.meta) for row in self.rows]
        theirs = [_token(node.target, node.args, node.kwargs, node.meta) for node in body.nodes]
        matcher = difflib.SequenceMatcher(None, mine, theirs, autojunk=False)
        return [
            (self.rows[a + i], body.nodes[b + i])
            for a, b, n in matcher.get_matching_blocks()
            for i in range(n)
        ]

    def _bind(self, pairs: list[Any], body: Body, number: int, rule: ClassRule) -> dict[_Port, int]:
        """Which live-in of the new class stands at which placeholder, read off the matched operations."""
        index = {id(node): j for j, node in enumerate(body.live_ins)}
        bound: dict[_Port, int] = {}

        def visit(mine: Any, theirs: Any) -> None:
            if isinstance(theirs, fx.Node):
                if (
                    isinstance(mine, _Port)
                    and id(theirs) in index
                    and self._fits(mine, index[id(theirs)], number, rule)
                ):
                    bound.setdefault(mine, index[id(theirs)])
            elif isinstance(theirs, (list, tuple)):
                for a, b in zip(mine, theirs, strict=True):
                    visit(a, b)
            elif isinstance(theirs, dict):
                for key, item in theirs.items():
                    visit(mine[key], item)

        for row, node in pairs:
            visit(row.args, node.args)
            visit(row.kwargs, dict(node.kwargs))
        for j, source in enumerate(rule.sources):  # the same parameter or invariant is the same placeholder
            for port in self.ports:
                c, i = next(iter(port.index.items()))
                same = source.is_invariant and self.rules[c].sources[i].key == source.key
                if port not in bound and same and self._fits(port, j, number, rule):
                    bound[port] = j
        for j, source in enumerate(rule.sources):  # what travels the same way can share a lane
            for port in self.ports:
                c, i = next(iter(port.index.items()))
                same_way = self.rules[c].sources[i].key == source.key and not source.is_invariant
                is_free = j not in bound.values() and port not in bound
                if is_free and same_way and self._fits(port, j, number, rule):
                    bound[port] = j
        return bound

    def _fits(self, port: _Port, j: int, number: int, rule: ClassRule) -> bool:
        """Whether one lane, weight or invariant can serve both, in all layers of the kind: equal invariants,
        or a carry and what it holds at first."""
        c, i = next(iter(port.index.items()))
        start: Any = rule.body.live_ins[j]
        val = _val(start)
        layers = [(self.rules[c], rule), *((layer[c], layer[number]) for layer in self.others)]

        def fit(mine: LiveIn, theirs: LiveIn) -> bool:
            if mine.is_invariant:
                return theirs.is_invariant and mine.key == theirs.key
            if not _is_one_value(mine, theirs):
                return False
            if _is_fed_anew(mine):
                return mine.key == theirs.key and shape_of(val) == shape_of(port.val)
            return isinstance(val, torch.Tensor) and _fills(start, port.val, rule.body)

        return all(fit(mine.sources[i], theirs.sources[j]) for mine, theirs in layers)

    def finish(self) -> Merged:
        graph = fx.Graph()
        made: dict[int, fx.Node] = {}
        live_ins: dict[fx.Node, dict[int, int]] = {}
        for k, port in enumerate(self.ports):
            made[id(port)] = node = graph.placeholder(f"v{k}")
            node.meta.update(port.meta)
            node.meta["val"] = port.val
            live_ins[node] = {twin: j for c, j in port.index.items() for twin in self.twins[c]}
        masks: dict[int, fx.Node] = {}
        for number, numbers in self.masks.items():
            mask = graph.placeholder(f"is_{class_name(number)}")
            mask.meta["val"] = _mask_val(self.rows)
            made[number + _MASK] = mask
            masks.update(dict.fromkeys(numbers, mask))

        def resolve(value: Any) -> Any:
            if isinstance(value, (_Row, _Port)):
                return made[id(value)]
            if isinstance(value, _Mask):
                return made[value.number + _MASK]
            if isinstance(value, (list, tuple)):
                return type(value)(map(resolve, value))
            if isinstance(value, dict):
                return {k: resolve(v) for k, v in value.items()}
            return value

        for row in self.rows:
            made[id(row)] = node = graph.call_function(row.target, resolve(row.args), resolve(row.kwargs))
            node.meta.update(row.meta)
        values = {
            twin: [made[id(row)] for row in self.values[c]] for c in self.values for twin in self.twins[c]
        }
        return Merged(graph, live_ins, values, masks)


_MASK = 1 << 62  # keys of masks in `made`, apart from ids of rows


@dataclass(frozen=True)
class _Mask:
    number: int


def class_name(number: int) -> str:
    """`first`, `second`, ... from the front, `last` from the end."""
    if number < 0:
        return "last" if number == -1 else f"last{-number}"
    return "first" if number == 0 else f"segment{number}"


def _select(number: int, theirs: Any, mine: Any, rows: list[Any]) -> _Row:
    """where(is_class, theirs, mine), appended to the rows."""
    a, b = _row_val(theirs), _row_val(mine)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    meta = {
        k: v for k, v in (mine.meta if isinstance(mine, _Row) else {}).items() if k in ("scope", "source")
    }
    with b.fake_mode:
        meta["val"] = torch.empty(shape, dtype=b.dtype, device=b.device)
    row = _Row(aten.where.self, (_Mask(number), theirs, mine), {}, meta)
    rows.append(row)
    return row


def _row_val(value: Any) -> Any:
    return value.meta.get("val") if isinstance(value, _Row) else value.val


def _is_one_value(mine: LiveIn, theirs: LiveIn) -> bool:
    """Whether what comes the same way is the same value of the cell it comes from, as far as both classes
    show."""
    a, b = mine.steady, theirs.steady
    if not isinstance(a, Source) or not isinstance(b, Source) or a.way != b.way:
        return True
    known = dict(a.nodes)
    return all(known.get(number, node) == node for number, node in b.nodes)


def _fills(start: fx.Node, lane: Any, body: Body) -> bool:
    """Whether a first value can be stored in the lane: same dtype and device, and the same shape or one that
    is expanded to it unseen."""
    val = start.meta["val"]
    if not isinstance(lane, torch.Tensor) or (val.dtype, val.device) != (lane.dtype, lane.device):
        return False
    if val.shape == lane.shape:
        return True
    readers = [node for node in body.nodes if start in node.all_input_nodes]
    return val.dim() == lane.dim() and all(_hides(node, val.shape, lane.shape) for node in readers)


def _hides(node: Any, shape: Sequence[int], wide: Sequence[int]) -> bool:
    """Whether an operation gives the same result if an operand of this shape is expanded to `wide` before: it
    broadcasts where it is expanded, and its result has all of `wide` already. A sum, say, would count more
    summands."""
    result = node.meta.get("val")
    if not isinstance(result, torch.Tensor) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in (aten.matmul.default, aten.bmm.default, aten.baddbmm.default):
        if min(len(shape), len(wide)) < 3 or shape[-2:] != wide[-2:]:
            return False
        shape, wide, covered = shape[:-2], wide[:-2], result.shape[:-2]
    elif torch.Tag.pointwise in node.target.tags:
        covered = result.shape
    else:
        return False
    return _broadcast(shape, wide) == wide and _broadcast(wide, covered) == covered


def _broadcast(a: Sequence[int], b: Sequence[int]) -> Sequence[int] | None:
    try:
        return torch.broadcast_shapes(a, b)
    except RuntimeError:
        return None


def _check_selection(theirs: Any, mine: Any, reader: fx.Node) -> None:
    """A selection has one type, and its reader must not see that the smaller operand was expanded."""
    if not isinstance(theirs, torch.Tensor) or not isinstance(mine, torch.Tensor):
        raise _CannotMergeError
    if (theirs.dtype, theirs.device) != (mine.dtype, mine.device):
        raise _CannotMergeError
    if theirs.shape != mine.shape:
        wide = _broadcast(theirs.shape, mine.shape)
        if wide is None or not all(
            v.shape == wide or _hides(reader, v.shape, wide) for v in (theirs, mine)
        ):
            raise _CannotMergeError


def _check_worth(pairs: list[Any], rows: Sequence[Any], body: Body) -> None:
    """Merging pays where most operations are shared."""
    if len(pairs) < 0.5 * min(len(rows), len(body.nodes)):
        raise _CannotMergeError


def _token(target: Any, args: Any, kwargs: Any, meta: dict[str, Any]) -> Any:
    """What two operations must have in common to be one: the operation, its constants, its result's type, its
    context."""

    def skeleton(value: Any) -> Any:
        if isinstance(value, (fx.Node, _Row, _Port)):
            return "value"
        if isinstance(value, (list, tuple)):
            return ("list", *map(skeleton, value))
        if isinstance(value, dict):
            return ("dict", *((k, skeleton(v)) for k, v in value.items()))
        return (type(value).__name__, repr(value))

    return (target, skeleton(args), skeleton(kwargs), shape_of(meta.get("val")), meta.get("context", ()))


def _mask_val(rows: Sequence[Any]) -> Any:
    val = next(v for row in rows if isinstance(v := row.meta.get("val"), torch.Tensor))
    with val.fake_mode:  # type: ignore[attr-defined]
        return torch.empty((), dtype=torch.bool, device=val.device)


def _kept_meta(node: Any) -> dict[str, Any]:
    return {k: v for k, v in node.meta.items() if k in ("scope", "source")}


def _map(value: Any, values: Mapping[fx.Node, Any]) -> Any:
    return _map_with(value, values.__getitem__)


def _map_with(value: Any, get: Any) -> Any:
    if isinstance(value, fx.Node):
        return get(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map_with(v, get) for v in value)
    if isinstance(value, dict):
        return {k: _map_with(v, get) for k, v in value.items()}
    return value


def _rename(value: Any, renamed: Mapping[int, _Row]) -> Any:
    if isinstance(value, _Row):
        return renamed.get(id(value), value)
    if isinstance(value, (list, tuple)):
        return type(value)(_rename(v, renamed) for v in value)
    if isinstance(value, dict):
        return {k: _rename(v, renamed) for k, v in value.items()}
    return value
