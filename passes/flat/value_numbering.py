"""Value numbering: nodes that compute the same value become one node.

    cos = rotary(arange)   # layer 0, segment 0        cos = rotary(arange)   # scopes {layer 0, layer 1}
    cos_1 = rotary(arange) # layer 1, segment 0    ->
    cos_2 = rotary(arange) # layer 0, segment 1

Requires: a functional graph (no node mutates its operands). Ensures: same outputs, bit for bit; meta `scopes`
of a node that stands for several lists the scopes of all of them, so that a later pass can see that it
belongs to no single layer.
Reference: global value numbering by hashing, as in any optimising compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from rmtcompile.ir.randomness import is_random


def is_numberable(node: fx.Node) -> bool:
    """Whether two such nodes with equal operands have equal values."""
    if node.op != "call_function":
        return False
    if is_random(node):
        return False
    schema = getattr(node.target, "_schema", None)
    return schema is None or not schema.is_mutable


def key_of(value: Any) -> Any:
    """A hashable stand-in for an argument; nodes stand for themselves, numbers keep their type (1, 1.0 and
    True differ)."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(key_of, value))
    if isinstance(value, dict):
        return ("dict", *((k, key_of(v)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", key_of(value.start), key_of(value.stop), key_of(value.step))
    if isinstance(value, float) and value != value:
        return ("float", "nan")
    return (type(value).__name__, value)


def number_values(
    module: fx.GraphModule, inside: Callable[[fx.Node], bool] = lambda node: False
) -> fx.GraphModule:
    """Merge equal nodes of a functional graph, in place of the given module's graph; see the module
    docstring.

    Args:
        inside: whether a node belongs to a layer's call.  What a layer computes of its segment and what is
            computed once more outside stay two: in the last segment the first may be dead code, and segments
            have to look alike.
    """
    graph = module.graph
    first: dict[Any, fx.Node] = {}
    from_input: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op == "placeholder" or any(operand in from_input for operand in node.all_input_nodes):
            from_input.add(node)
        if node.op == "get_attr":
            key: Any = ("get_attr", node.target)
        elif is_numberable(node):
            place = node in from_input and inside(node)
            arguments = (key_of(node.args), key_of(node.kwargs))
            key = (node.target, *arguments, node.meta.get("context", ()), place)
        else:
            continue
        kept = first.setdefault(key, node)
        if kept is not node:
            scopes = kept.meta.setdefault("scopes", {kept.meta.get("scope", ())})
            scopes.add(node.meta.get("scope", ()))
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
    return module
