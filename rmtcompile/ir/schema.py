"""Schemas: the arguments of an operator's call by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx


def bound(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of an operator by schema name, defaults filled in."""
    found: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(args) and not argument.kwarg_only:
            found[argument.name] = args[position]
        elif argument.name in kwargs:
            found[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node that calls an operator, likewise."""
    return bound(node.target, node.args, node.kwargs)


__all__ = ["bind", "bound"]
