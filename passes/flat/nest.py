"""Nested joins: a join that begins with what an earlier one holds reads that join instead of all its parts.

    m1 = stack([a], 1)                     m1 = stack([a], 1)
    m2 = stack([a, b], 1)          ->      m2 = cat([m1, unsqueeze(b, 1)], 1)
    m3 = stack([a, b, c], 1)               m3 = cat([m2, unsqueeze(c, 1)], 1)

A list that layers keep of all earlier segments and join whenever they read it is then a value that goes from
segment to segment and grows at its end, as a cache is that is joined once a segment.

Requires: a value-numbered graph with meta `val`. Ensures: the same bits. What does not lie inside of layers
stays as it is. A list of the last few segments looks the same until it is full, so the pipeline calls this
pass only where nothing else gives rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from rmtcompile.passes.flat.functionalise import Values, bind, overload_name
from rmtcompile.passes.flat.store_forwarding.nodes import is_static_tensor, shape_of, val_of

aten = torch.ops.aten
Extensions = list[tuple[fx.Node, fx.Node, list[fx.Node]]]

NESTED = "nested"
"""The form of joins that this pass gives."""


def grows(graph: fx.Graph, inside: Callable[[fx.Node], bool]) -> bool:
    """Whether there is a list that layers join again and again, each time with more behind it.

    Args:
        inside: whether a node belongs to a layer's call.
    """
    longest = max((len(bind(join)["tensors"]) for join, _, _ in extensions(graph, inside)), default=0)
    return longest > 2


def slides(graph: fx.Graph) -> bool:
    """Whether there is a window: what an earlier join holds comes nearer to the start of a later one."""
    known: dict[Any, int] = {}
    held: dict[fx.Node, tuple[Any, list[tuple[fx.Node, int]]]] = {}
    for node in graph.nodes:
        if overload_name(node) not in ("cat", "stack") or not is_static_tensor(node):
            continue
        arguments = bind(node)
        dim, is_stack = arguments["dim"] % len(shape_of(node)), overload_name(node) == "stack"
        parts: list[tuple[fx.Node, int]] = []
        offset = 0
        for part in arguments["tensors"]:
            within = held.get(part, (None, []))
            inner = within[1] if within[0] == (is_stack, dim) and not is_stack else [(part, 0)]
            parts += [(one, offset + at) for one, at in inner]
            offset += 1 if is_stack else shape_of(part)[dim] if len(shape_of(part)) > dim else 0
        held[node] = ((is_stack, dim), parts)
        for part, at in parts:
            if at < known.setdefault((is_stack, dim, part), at):
                return True
    return False


def nest(module: fx.GraphModule, inside: Callable[[fx.Node], bool]) -> fx.GraphModule:
    """Rewrite every such join; the same object where there is none."""
    found = extensions(module.graph, inside)
    if not found:
        return module
    values = Values(module.graph)
    written: dict[fx.Node, fx.Node] = {}
    for join, before, rest in found:
        written[join] = _rewritten(values, join, written.get(before, before), rest)
    module.recompile()
    return module


def extensions(graph: fx.Graph, inside: Callable[[fx.Node], bool]) -> Extensions:
    """(join, the earlier join that it begins with, the parts behind that) of the longest such beginning."""
    known: dict[Any, fx.Node] = {}
    found: Extensions = []
    for node in graph.nodes:
        if overload_name(node) not in ("cat", "stack") or not inside(node) or not is_static_tensor(node):
            continue
        arguments = bind(node)
        parts = tuple(arguments["tensors"])
        if any(not is_static_tensor(p) or val_of(p).dtype != val_of(node).dtype for p in parts):
            continue
        kind = (overload_name(node), arguments["dim"] % len(shape_of(node)))
        for count in _beginnings(kind[0], len(parts)):
            if (before := known.get((kind, parts[:count]))) is not None:
                found.append((node, before, list(parts[count:])))
                break
        known.setdefault((kind, parts), node)
    return found


def _beginnings(name: str, count: int) -> Iterator[int]:
    """Lengths of the beginnings of a list, the longest first; one part of a `cat` is no join."""
    return iter(range(count - 1, 0 if name == "stack" else 1, -1))


def _rewritten(values: Values, join: fx.Node, before: fx.Node, rest: list[fx.Node]) -> fx.Node:
    """What stands for a join now."""
    dim = bind(join)["dim"] % len(shape_of(join))
    if overload_name(join) == "stack":
        rest = [_emit(values, join, aten.unsqueeze.default, part, dim) for part in rest]
    whole = _emit(values, join, aten.cat.default, [before, *rest], dim)
    join.replace_all_uses_with(whole)
    join.graph.erase_node(join)
    return whole


def _emit(values: Values, join: fx.Node, target: torch._ops.OpOverload, *args: Any) -> fx.Node:
    with join.graph.inserting_before(join):
        made = join.graph.create_node("call_function", target, args)
    made.meta = {k: v for k, v in join.meta.items() if k != "val"}
    made.meta["val"] = values.run(target, args, {})
    return made
