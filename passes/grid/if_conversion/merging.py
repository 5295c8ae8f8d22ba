"""Merging: one more class is folded into a program row by row, a selection wherever an operand differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from rmtcompile.passes.grid.if_conversion.matching import Binding, Rules, check_lengths, matched
from rmtcompile.passes.grid.if_conversion.rows import (
    CannotMergeError,
    Mask,
    Port,
    Row,
    mask_val,
    port_of,
    renamed,
    resolved,
    row_of,
    selection,
)
from rmtcompile.passes.grid.if_conversion.selection import check_selection
from rmtcompile.passes.grid.reroll import ClassRule


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


def class_name(number: int) -> str:
    """`first`, `second`, ... from the front, `last` from the end."""
    if number < 0:
        return "last" if number == -1 else f"last{-number}"
    return "first" if number == 0 else f"segment{number}"


class Merging:
    """A program that classes are folded into one by one.

    Args:
        numbers: the classes of the first body.
        rules: all classes.
        others: those of the other layers of the kind.

    Attributes:
        values: the row of each operation of a class, by class.
        masks: the classes that a mask stands for, by the first of them.
        twins: all classes of one body, by the first of them.
    """

    def __init__(self, numbers: list[int], rules: Rules, others: Sequence[Rules]) -> None:
        number, rule = numbers[0], rules[numbers[0]]
        live_ins = cast("tuple[fx.Node, ...]", rule.body.live_ins)
        self.all, self.others = rules, others
        self.rules = {number: rule}
        self.ports = [port_of(node, number, j) for j, node in enumerate(live_ins)]
        self.rows: list[Row] = []
        values: dict[fx.Node, Row | Port] = dict(zip(live_ins, self.ports, strict=True))
        ints = rule.integers() if rule.grows else {}
        for node in rule.body.nodes:
            values[node] = row = row_of(node, values.__getitem__, ints.get(node))
            self.rows.append(row)
        for node, dims in rule.varying.items():
            if dims:
                values[node].meta["grows"] = tuple(sorted(dims))
        self.values: dict[int, list[Row]] = {number: list(self.rows)}
        self.masks: dict[int, tuple[int, ...]] = {}
        self.twins: dict[int, tuple[int, ...]] = {number: tuple(numbers)}

    def fold(self, numbers: list[int]) -> None:
        """Merge one more class in, or raise `CannotMergeError` and leave the program as it was."""
        number, rule = numbers[0], self.all[numbers[0]]
        if any(known.grows for known in self.rules.values()):
            raise CannotMergeError
        check_lengths(self.rules, rule)
        pairs = matched(self.rows, rule.body)
        twins = {**self.twins, number: tuple(numbers)}
        bound = Binding(self.ports, self.all, twins, number, self.others).find(pairs)
        folded = _Folding(number, rule, bound)
        folded.run(self.rows, dict(pairs))
        for port, j in bound.items():
            port.index[number] = j
        self.ports = self.ports + folded.ports
        self.rows = folded.rows
        self.values = {c: [folded.new[row] for row in found] for c, found in self.values.items()}
        self.values[number] = [folded.values[node] for node in rule.body.nodes]
        self.twins[number] = self.masks[number] = tuple(numbers)
        self.rules[number] = rule

    def finish(self) -> Merged:
        """The program as a graph."""
        graph = fx.Graph()
        made: dict[Row | Port | Mask, fx.Node] = {}
        live_ins: dict[fx.Node, dict[int, int]] = {}
        for k, port in enumerate(self.ports):
            made[port] = node = graph.placeholder(f"v{k}")
            node.meta.update(port.meta, val=port.val)
            live_ins[node] = {twin: j for c, j in port.index.items() for twin in self.twins[c]}
        masks: dict[int, fx.Node] = {}
        for number, numbers in self.masks.items():
            made[Mask(number)] = mask = graph.placeholder(f"is_{class_name(number)}")
            mask.meta["val"] = mask_val(self.rows)
            masks.update(dict.fromkeys(numbers, mask))
        for row in self.rows:
            args, kwargs = resolved(row.args, made), resolved(row.kwargs, made)
            made[row] = node = graph.call_function(row.target, args, kwargs)
            node.meta.update(row.meta)
        values = {twin: [made[row] for row in self.values[c]] for c in self.values for twin in self.twins[c]}
        return Merged(graph, live_ins, values, masks)


class _Folding:
    """The rows of a program with those of one more class among them.

    Attributes:
        rows: the result, in order.
        ports: new ports, for live-ins that no port serves.
        new: what stands for each row there was, its operands selected.
        values: the row of each operation of the class.
    """

    def __init__(self, number: int, rule: ClassRule, bound: Mapping[Port, int]) -> None:
        self.number, self.body, self.bound = number, rule.body, bound
        self.rows: list[Row] = []
        self.ports: list[Port] = []
        self.new: dict[Row, Row] = {}
        self.values: dict[fx.Node, Row] = {}
        self._index = {node: j for j, node in enumerate(rule.body.live_ins)}
        self._port_at: dict[int, Port] = {}
        for port, j in bound.items():
            self._port_at.setdefault(j, port)
        self._selections: dict[tuple[Row | Port, Row | Port], Row] = {}
        self._pending = iter(rule.body.nodes)

    def run(self, rows: Sequence[Row], matches: Mapping[Row, fx.Node]) -> None:
        """Go through both programs at once."""
        for old in rows:
            args, kwargs = renamed(old.args, self.new), renamed(old.kwargs, self.new)
            node = matches.get(old)
            if node is not None:
                self._advance(node)
                args = self._selected(args, node.args, node)
                kwargs = self._selected(kwargs, dict(node.kwargs), node)
            self.new[old] = row = Row(old.target, args, kwargs, old.meta)
            if node is not None:
                self.values[node] = row
            self.rows.append(row)
        self._advance(None)

    def _advance(self, until: fx.Node | None) -> None:
        """Append the operations of the class that come before `until`: nothing matches them."""
        for node in self._pending:
            if node is until:
                return
            self.values[node] = row = row_of(node, self._value)
            self.rows.append(row)

    def _value(self, node: fx.Node) -> Row | Port:
        if node in self.values:
            return self.values[node]
        j = self._index[node]
        if j not in self._port_at:
            self._port_at[j] = port_of(node, self.number, j)
            self.ports.append(self._port_at[j])
        return self._port_at[j]

    def _selected(self, mine: Any, theirs: Any, reader: fx.Node) -> Any:
        """The arguments of a row that serves both."""
        if isinstance(theirs, fx.Node):
            return self._operand(mine, theirs, reader)
        if isinstance(theirs, (list, tuple)):
            return type(theirs)(self._selected(a, b, reader) for a, b in zip(mine, theirs, strict=True))
        if isinstance(theirs, dict):
            return {k: self._selected(mine[k], v, reader) for k, v in theirs.items()}
        return mine

    def _operand(self, mine: Row | Port, theirs: fx.Node, reader: fx.Node) -> Row | Port:
        if isinstance(mine, Port) and theirs in self._index and self.bound.get(mine) == self._index[theirs]:
            return mine
        other = self._value(theirs)
        if mine is other:
            return mine
        check_selection(other.val, mine.val, reader)
        if (mine, other) not in self._selections:
            self._selections[mine, other] = row = selection(self.number, other, mine)
            self.rows.append(row)
        return self._selections[mine, other]
