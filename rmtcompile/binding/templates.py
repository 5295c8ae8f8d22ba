"""Templates: what two values that hold tensors have in common, but for the contents of these."""

from __future__ import annotations

from typing import Any

import torch

from rmtcompile.binding.objects import ATOMS, DELETED, SETS, Step, base_of, is_leaf, is_sealed, parts


def template(value: Any) -> list[Any]:
    """Equal for values that differ in nothing but the contents of their tensors: the same structure, the same
    objects in several places."""
    found: list[Any] = []
    numbers: dict[int, int] = {}
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, ATOMS):
            found.append((type(value), value))
        elif id(value) in numbers:
            found.append(numbers[id(value)])
        elif isinstance(value, torch.Tensor):
            numbers[id(value)] = len(numbers)
            found.append(torch.Tensor)
        elif is_leaf(value) or value is DELETED or (is_sealed(value) and not parts(value)):
            found.append((type(value), id(value)))
        elif base_of(type(value)) in SETS:
            elements = frozenset(item if isinstance(item, ATOMS) else id(item) for item in value)
            found.append((type(value), elements))
        else:
            numbers[id(value)] = len(numbers)
            inner = parts(value)
            found.append((type(value), _comparable(inner)))
            stack += reversed(inner.values())
    return found


def _comparable(steps: dict[Step, Any]) -> list[Any]:
    return [(kind, id(key) if isinstance(key, torch.Tensor) else key) for kind, key in steps]


def is_number(entry: Any) -> bool:
    """Whether an entry of a template is a number that may count something."""
    return isinstance(entry, tuple) and entry[0] in (int, float)


__all__ = ["is_number", "template"]
