"""Causal masks: an attention mask that is exactly "no token sees a later one" becomes `is_causal=True`.

    mask = arange(T)[None] <= arange(T)[:, None]                            (computed before the segments)
    scaled_dot_product_attention(q, k, v, mask)   ->   scaled_dot_product_attention(q, k, v, is_causal=True)

Tracing makes models build the mask that they would skip otherwise, and the fastest attention kernels take no
mask.

Requires: a routed program. Fires where the mask is a value computed before the segments from constants alone,
equal to the lower triangle. Ensures: the same attention; kernels may round differently.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rmtcompile.ir.program import Group, Port, Program, Source
from rmtcompile.ir.randomness import drop_dead, is_random
from rmtcompile.passes.grid.partition import INIT
from rmtcompile.passes.grid.reroll import ClassRule

aten = torch.ops.aten


def causal(program: Program) -> Program:
    """Replace causal masks in all groups; the same object where there are none."""
    rule = program.rolled.rules[(INIT, -1)][0]
    known: dict[int, bool] = {}
    groups = tuple(_group(group, rule, known) for group in program.groups)
    if all(new is old for new, old in zip(groups, program.groups, strict=True)):
        return program
    return replace(program, groups=groups)


def is_lower_triangle(mask: torch.Tensor) -> bool:
    """Whether a mask, bool or additive, lets each position see itself and what is before it, and nothing
    else."""
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    if mask.dtype is not torch.bool:
        if not mask.is_floating_point() or not ((mask == 0) | (mask <= torch.finfo(mask.dtype).min)).all():
            return False
        mask = mask == 0
    lower = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return bool((mask == lower).all())


def _group(group: Group, rule: ClassRule, known: dict[int, bool]) -> Group:
    ports = {port.name: port for port in group.ports}
    found = [
        node
        for node in group.graph.nodes
        if node.target is aten.scaled_dot_product_attention.default
        and _has_causal_mask(node, ports, rule, known)
    ]
    if not found:
        return group
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(group.graph, copied))
    for node in found:
        new = copied[node]
        new.args = (*new.args[:3], None, _argument(new, 4, "dropout_p", 0.0), True)
        new.kwargs = {k: v for k, v in new.kwargs.items() if k not in ("attn_mask", "dropout_p", "is_causal")}
    drop_dead(graph)
    for node in [n for n in graph.nodes if n.op == "placeholder" and not n.users]:
        graph.erase_node(node)
    kept = {node.name for node in graph.nodes if node.op == "placeholder"}
    return replace(group, graph=graph, ports=tuple(port for port in group.ports if port.name in kept))


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _has_causal_mask(node: fx.Node, ports: dict[str, Port], rule: ClassRule, known: dict[int, bool]) -> bool:
    mask = _argument(node, 3, "attn_mask", None)
    while isinstance(mask, fx.Node) and mask.target is aten.expand.default:
        mask = mask.args[0]
    if not isinstance(mask, fx.Node) or mask.op != "placeholder" or _argument(node, 5, "is_causal", False):
        return False
    port = ports[mask.name]
    sources = port.sources
    if not sources or not all(isinstance(source, Source) and source.kind == INIT for source in sources):
        return False
    for source in sources:
        if source.node not in known:
            value = constant_value(rule, source.node)
            known[source.node] = isinstance(value, torch.Tensor) and is_lower_triangle(value)
    return all(known[source.node] for source in sources)


def constant_value(rule: ClassRule, index: int) -> Any:
    """The value of an init operation that depends on nothing but constants (no random number), or None."""
    inside = set(rule.body.nodes)
    varying = {node for node, ints in rule.integers().items() if not all(a.is_constant for a in ints)}
    values: dict[fx.Node, Any] = {}

    def value_of(node: fx.Node) -> Any:
        if node not in values:
            values[node] = node.target(  # type: ignore[operator]
                *fx.node.map_arg(node.args, value_of), **fx.node.map_arg(node.kwargs, value_of)
            )
        return values[node]

    pending, needed = [rule.body.nodes[index]], set()
    while pending:
        node = pending.pop()
        if node not in inside or node in varying or is_random(node):
            return None
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    with torch.no_grad():
        return value_of(rule.body.nodes[index])
