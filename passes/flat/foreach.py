"""Foreach: an operation over lists of tensors becomes one operation for each of their places.

    _foreach_mul([a, b], 0.5)              ->   mul(a, 0.5), mul(b, 0.5)
    _foreach_addcmul_([a], [b], [c], [2])  ->   addcmul_(a, b, c, value=2)

torch's own names say which one: `_foreach_` and the name of the operation.

Requires: a graph with meta `val`, with writes in place or without. Ensures: the same values; results that
nobody reads are not taken out of their tuple or list.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from rmtcompile.passes.flat.decompose import inline

aten = torch.ops.aten

_PREFIX = "_foreach_"
_NAMES = {"norm": "linalg_vector_norm", "zero": "zeros_like"}
_BOUNDS = {"maximum": "clamp_min", "minimum": "clamp_max"}  # of a number
_SCALED = ("addcmul", "addcdiv")


def foreach(module: fx.GraphModule) -> fx.GraphModule:
    """Rewrite every such node; the same object where there is none."""
    changed = False
    for node in reversed(list(module.graph.nodes)):
        if node.target is operator.getitem and not node.users:
            module.graph.erase_node(node)
            changed = True
    for node in list(module.graph.nodes):
        way = part_by_part(node.target) if node.op == "call_function" else None
        if way is not None:
            inline(node, way)
            changed = True
    if changed:
        module.recompile()
    return module


def part_by_part(op: Any) -> Callable[..., Any] | None:
    """What computes such an operation part by part, or None where it is no such operation, or an unknown
    one."""
    name = getattr(op, "_opname", "")
    if getattr(op, "namespace", "") != "aten" or not name.startswith(_PREFIX):
        return None
    name = name.removeprefix(_PREFIX)
    given = {argument.name: str(argument.type) for argument in op._schema.arguments}
    end = "_" if name.endswith("_") else ""
    name = name.removesuffix("_")
    if name in _BOUNDS and (end or any("Tensor" not in kind for kind in given.values())):
        name = _BOUNDS[name]
    if name in _SCALED and given.get("scalars") == "Tensor":
        return None
    part = getattr(aten, name + end if end else _NAMES.get(name, name), None)
    if part is None:
        return None
    lists = {key for key, kind in given.items() if kind.startswith("List[")}
    names = list(given)

    def run(*args: Any, **kwargs: Any) -> list[Any] | None:
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        count = next(len(value) for key, value in call.items() if key in lists)
        positional = [key for key in call if key not in kwargs]
        results = []
        for i in range(count):
            values = {key: value[i] if key in lists else value for key, value in call.items()}
            options = {key: values[key] for key in kwargs}
            if name in _SCALED and len(positional) > 3:
                options["value"] = values[positional[3]]
            used = positional[:3] if name in _SCALED else positional
            results.append(part(*(values[key] for key in used), **options))
        return None if end else results

    return run
