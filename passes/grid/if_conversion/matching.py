"""Matching: which operations of two classes are one, and which live-in of one stands at which port of the
other."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from rmtcompile.ir.program import Body, Source
from rmtcompile.passes.grid.if_conversion.rows import CannotMergeError, Port, Row
from rmtcompile.passes.grid.if_conversion.selection import can_fill
from rmtcompile.passes.grid.reroll import ClassRule, LiveIn, shape_of

Rules = Mapping[int, ClassRule]


def matched(rows: Sequence[Row], body: Body) -> list[tuple[Row, fx.Node]]:
    """Rows and the operations of a body that they can compute as well, in order.

    Raises:
        CannotMergeError: too few: merging pays where most operations are shared.
    """
    mine = [_token(row.target, row.args, row.kwargs, row.meta) for row in rows]
    theirs = [_token(node.target, node.args, node.kwargs, node.meta) for node in body.nodes]
    matcher = difflib.SequenceMatcher(None, mine, theirs, autojunk=False)
    pairs = [(rows[a + i], body.nodes[b + i]) for a, b, n in matcher.get_matching_blocks() for i in range(n)]
    if len(pairs) < 0.5 * min(len(rows), len(body.nodes)):
        raise CannotMergeError
    return pairs


def _token(target: Any, args: Any, kwargs: Any, meta: dict[str, Any]) -> Any:
    """What two operations must have in common to be one: the operation, its constants, its result's type, its
    context."""

    def skeleton(value: Any) -> Any:
        if isinstance(value, (fx.Node, Row, Port)):
            return "value"
        if isinstance(value, (list, tuple)):
            return ("list", *map(skeleton, value))
        if isinstance(value, dict):
            return ("dict", *((k, skeleton(v)) for k, v in value.items()))
        return (type(value).__name__, repr(value))

    return (target, skeleton(args), skeleton(kwargs), shape_of(meta.get("val")), meta.get("context", ()))


def check_lengths(rules: Rules, rule: ClassRule) -> None:
    """A segment of another length is no variant, also where its one position would broadcast."""
    mine = {c: [(x.key, shape_of(_val(n))) for x, n in _anew(r)] for c, r in rules.items()}
    theirs = {x.key: shape_of(_val(node)) for x, node in _anew(rule)}
    if any(theirs.get(key, shape) != shape for found in mine.values() for key, shape in found):
        raise CannotMergeError


def _anew(rule: ClassRule) -> list[tuple[LiveIn, Any]]:
    """The live-ins that every segment makes itself."""
    return [(x, node) for x, node in zip(rule.sources, rule.body.live_ins, strict=True) if _is_fed_anew(x)]


def _is_fed_anew(live_in: LiveIn) -> bool:
    """Whether every segment makes the value itself: it is no carry."""
    steady = live_in.steady
    return isinstance(steady, Source) and steady.relative and steady.segment == 0


def _val(node: Any) -> Any:
    return node.meta.get("val")


Twins = Mapping[int, Sequence[int]]
"""All classes of one body, by the first of them."""


class Binding:
    """Which live-in of one more class stands at which port.

    Attributes:
        ports: the ports there are.
        rules: all classes.
        twins: classes of one body, those that the ports serve and the one to be bound.
        number: the class to be bound, the first of its twins.
        others: the classes of the other layers of the kind.
    """

    def __init__(
        self, ports: Sequence[Port], rules: Rules, twins: Twins, number: int, others: Sequence[Rules]
    ) -> None:
        self.ports, self.rules, self.twins, self.number, self.others = ports, rules, twins, number, others
        self.rule = rule = rules[number]
        self._index = {node: j for j, node in enumerate(rule.body.live_ins)}
        self._bound: dict[Port, int] = {}

    def find(self, pairs: Sequence[tuple[Row, fx.Node]]) -> dict[Port, int]:
        """The live-in of each port that serves one, read off the matched operations first."""
        for row, node in pairs:
            self._visit(row.args, node.args)
            self._visit(row.kwargs, dict(node.kwargs))
        for j, source in enumerate(self.rule.sources):  # the same parameter or invariant is the same port
            for port in self.ports:
                same = source.is_invariant and self._source(port).key == source.key
                if port not in self._bound and same and self._fits(port, j):
                    self._bound[port] = j
        for j, source in enumerate(self.rule.sources):  # what travels the same way can share a lane
            for port in self.ports:
                same_way = self._source(port).key == source.key and not source.is_invariant
                is_free = j not in self._bound.values() and port not in self._bound
                if is_free and same_way and self._fits(port, j):
                    self._bound[port] = j
        return self._bound

    def _source(self, port: Port) -> LiveIn:
        number, i = next(iter(port.index.items()))
        return self.rules[number].sources[i]

    def _visit(self, mine: Any, theirs: Any) -> None:
        if isinstance(theirs, fx.Node):
            j = self._index.get(theirs)
            if isinstance(mine, Port) and j is not None and self._fits(mine, j):
                self._bound.setdefault(mine, j)
        elif isinstance(theirs, (list, tuple)):
            for a, b in zip(mine, theirs, strict=True):
                self._visit(a, b)
        elif isinstance(theirs, dict):
            for key, item in theirs.items():
                self._visit(mine[key], item)

    def _fits(self, port: Port, j: int) -> bool:
        """Whether one lane, weight or invariant can serve both, in all layers of the kind and in all classes
        of either body: equal invariants, or a carry and what it holds at first."""
        start = self.rule.body.live_ins[j]
        return all(
            self._fit(layer[c].sources[i], layer[number].sources[j], port.val, start)
            for first, i in port.index.items()
            for c in self.twins[first]
            for number in self.twins[self.number]
            for layer in (self.rules, *self.others)
        )

    def _fit(self, mine: LiveIn, theirs: LiveIn, lane: Any, start: Any) -> bool:
        if mine.is_invariant:
            return theirs.is_invariant and mine.key == theirs.key
        if not _is_one_value(mine, theirs):
            return False
        if _is_fed_anew(mine):
            return mine.key == theirs.key and shape_of(_val(start)) == shape_of(lane)
        return can_fill(start, lane, self.rule.body)


def are_twins(mine: ClassRule, theirs: ClassRule) -> bool:
    """Whether two classes of one body read the same invariants and values, each at its place."""
    pairs = zip(mine.sources, theirs.sources, strict=True)
    return all(
        a.key == b.key if a.is_invariant and b.is_invariant else _is_one_value(a, b) for a, b in pairs
    )


def _is_one_value(mine: LiveIn, theirs: LiveIn) -> bool:
    """Whether what comes the same way is the same value of the cell it comes from, as far as both classes
    show."""
    a, b = mine.steady, theirs.steady
    if not isinstance(a, Source) or not isinstance(b, Source) or a.way != b.way:
        return True
    known = dict(a.nodes)
    return all(known.get(number, node) == node for number, node in b.nodes)
