"""Aliases: one name for each operation.

    a & b               __and__(a, b)     ->   bitwise_and(a, b)
    torch.concat(x)     concat(x)         ->   cat(x)
    torch.multiply      multiply(a, b)    ->   mul(a, b)

Requires: nodes with meta `val`. Ensures: the same operations; passes know them by one name.
"""

from __future__ import annotations

import torch
from torch import fx

from rmtcompile.passes.flat.functionalise import overload_name

_NAMES = {
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor",
    "__lshift__": "bitwise_left_shift", "__rshift__": "bitwise_right_shift",
    "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "negative": "neg",
    "absolute": "abs", "fix": "trunc", "clip": "clamp",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    "concat": "cat", "concatenate": "cat",
}  # fmt: skip


def aliases(module: fx.GraphModule) -> fx.GraphModule:
    """Rename every operation that has another name; the same object where there is none."""
    changed = False
    for node in module.graph.nodes:
        named = _NAMES.get(overload_name(node))
        known = getattr(torch.ops.aten, named, None) if named else None
        if known is None or node.target._overloadname not in known.overloads():
            continue
        target = getattr(known, node.target._overloadname)
        if _shape(target._schema) == _shape(node.target._schema):
            node.target, changed = target, True
    if changed:
        module.recompile()
    return module


def _shape(schema: torch.FunctionSchema) -> list[tuple[str, str]]:
    return [(str(argument.type), argument.name) for argument in schema.arguments]
