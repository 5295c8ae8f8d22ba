"""Bodies of regions: what is computed in a function of its own, and what the caller does around it.

    prologue(s):  x = embeds[:, 8 * s : 8 * s + 8]     before   views taken by sizes: no work for the device
                  h = cat([x, memory])                 body     no integer of it depends on s or S
                  all = cat([*each segment's h, h])    after    reads a list over segments

The body is one function for all segments and lengths, so it can be compiled once and recorded into graphs;
what is before and after it is work of the host.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from rmtcompile.passes.emit.text import Named, Writer, call, literal, plain_name, source_comment
from rmtcompile.passes.grid.reroll import ClassRule

SEGMENT, COUNT = "i", "n"
"""Names of a segment and of how many there are, counted from the start of the input (`counted.py`)."""

_WORTH = 2
"""Operations that compute something, from which on a body is compiled."""


@dataclass(frozen=True)
class Parts:
    """The operations of a region that are needed, in order.

    Attributes:
        before: views of live-ins and ranges whose place depends on s or S, taken by the caller.
        body: what the region's function does.
        after: what reads sizes or lists over segments and is no view of a live-in.
        shown: values that other parts read, or that are results.
        compiled: whether the body has enough work in it to be worth a compiled form (`run.region`).
    """

    before: tuple[fx.Node, ...]
    body: tuple[fx.Node, ...]
    after: tuple[fx.Node, ...]
    compiled: bool
    shown: frozenset[fx.Node] = frozenset()

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What the body reads from outside: live-ins (nodes, lists of nodes) and views taken before."""
        return _read_from_outside(self.body)

    @property
    def views(self) -> tuple[fx.Node, ...]:
        """The views taken before that anything else reads, or that are results."""
        return tuple(node for node in self.before if node in self.shown)

    @property
    def rest_inputs(self) -> tuple[Any, ...]:
        """What the operations after the body read."""
        return _read_from_outside(self.after)

    def outputs(self, results: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """Values of the body that are read behind it: by the caller's operations, or as results."""
        read = {x for node in self.after for x in node.all_input_nodes} | set(results)
        return tuple(node for node in self.body if node in read)


def _read_from_outside(nodes: Sequence[fx.Node]) -> tuple[Any, ...]:
    made = set(nodes)
    return tuple(dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in made))


def parts_of(rule: ClassRule, results: list[fx.Node], whole: bool = False) -> Parts:
    """Divide what `results` need.

    Args:
        rule: the region's body and rules, of one class.
        results: values that are read outside.
        whole: leave everything in one function.
    """
    needed = _needed(rule.body.nodes, results)
    nodes = tuple(node for node in rule.body.nodes if node in needed)
    if whole:
        return Parts((), nodes, (), False)
    ints, inside = rule.integers(), set(rule.body.nodes)
    sized = {node for node in nodes if not all(a.is_constant for a in ints[node])}
    sized |= {node for node in nodes if any(_is_list(x) for x in node.all_input_nodes if x not in inside)}
    lists = [set(live_in) for live_in in rule.body.live_ins if isinstance(live_in, tuple)]
    views = _views_of_live_ins(nodes, rule)
    before = {node for node in views if node in sized or _reads_varying(node, rule)}
    for node in reversed(nodes):  # what those views are taken of
        if node in views and any(user in before for user in node.users):
            before.add(node)
    after: set[fx.Node] = set()
    for node in nodes:
        reads_list = any(set(node.all_input_nodes) & values for values in lists)
        follows = any(operand in after for operand in node.all_input_nodes)
        if node not in before and (node in sized or reads_list or follows):
            after.add(node)
    body = tuple(node for node in nodes if node not in before and node not in after)
    is_worth = sum(not is_view(node) for node in body) >= _WORTH
    read = {x for node in (*body, *after) for x in node.all_input_nodes}
    in_order = lambda chosen: tuple(node for node in nodes if node in chosen)  # noqa: E731
    return Parts(in_order(before), body, in_order(after), is_worth, frozenset(read | set(results)))


def write_operations(
    writer: Writer,
    nodes: tuple[fx.Node, ...],
    rule: ClassRule,
    names: Mapping[Any, str],
    inner: Collection[fx.Node] = (),
) -> None:
    """One line an operation.

    Args:
        names: the source of what the operations read.
        inner: those that count segments from the start of the input.
    """
    ints = rule.integers()
    for node in nodes:
        context = node.meta.get("context", ())
        if context:
            writer.line(f"with {', '.join(context)}:")
        variables = (SEGMENT, COUNT) if node in inner else ("s", "S")
        text = _operation(node, [a.text(*variables) for a in ints[node]], names, rule)
        writer.line("    " * bool(context) + f"{node.name} = {text}" + source_comment(node))


def _operation(
    node: fx.Node, ints: Sequence[str], names: Mapping[Any, str], rule: ClassRule
) -> str:
    remaining = iter(ints)

    def show(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return Named(names.get(value, value.name))
        if isinstance(value, (list, tuple)):
            if value and all(isinstance(v, fx.Node) for v in value):
                for values, turned in ((tuple(value), ""), (tuple(value[::-1]), "[::-1]")):
                    if values in names:
                        return Named(f"{_each(values, names, rule)}{turned}")
            return type(value)(show(item) for item in value)
        if isinstance(value, dict):
            return {k: show(v) for k, v in value.items()}
        return Named(next(remaining)) if type(value) is int else value

    args, kwargs = show(node.args), show(dict(node.kwargs))
    if node.target is operator.getitem:
        return f"{literal(args[0], plain_name)}[{literal(args[1], plain_name)}]"
    parts = [literal(arg, plain_name) for arg in args]
    parts += [f"{k}={literal(v, plain_name)}" for k, v in kwargs.items()]
    return call(node.target, parts)


def _each(values: tuple[fx.Node, ...], names: Mapping[Any, str], rule: ClassRule) -> str:
    """A list over segments; the last one may be made by this region itself."""
    own = values[-1]
    return f"[*{names[values]}, {own.name}]" if own in rule.body.nodes else names[values]


def _needed(nodes: tuple[fx.Node, ...], results: list[fx.Node]) -> set[fx.Node]:
    inside = set(nodes)
    pending = list(results)
    needed: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += [operand for operand in node.all_input_nodes if operand in inside]
    return needed


def _views_of_live_ins(nodes: tuple[fx.Node, ...], rule: ClassRule) -> set[fx.Node]:
    """Views of single live-ins, ranges that read nothing, and views of those."""
    found = {live_in for live_in in rule.body.live_ins if isinstance(live_in, fx.Node)}
    for node in nodes:
        if not node.all_input_nodes or (is_view(node) and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found & set(nodes)


def _reads_varying(node: fx.Node, rule: ClassRule) -> bool:
    """Whether an operation reads a value whose shape depends on s or S."""
    return any(rule.varying.get(x) for x in node.all_input_nodes)


def is_view(node: fx.Node) -> bool:
    """Whether an operation gives another view of what it reads."""
    if node.target is operator.getitem:
        return is_view(node.all_input_nodes[0])
    schema = getattr(node.target, "_schema", None)
    returns = schema.returns if schema is not None else ()
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _is_list(node: fx.Node) -> bool:
    """Whether a value is a list of tensors, which may be as long as there are segments."""
    return isinstance(node.meta.get("val"), (list, tuple))
