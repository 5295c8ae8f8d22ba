"""Surroundings: what a callable that is no module refers to: its closure, globals, defaults, bound object.

    scale = 2.0
    fast = optimize(lambda ids: model(ids).logits[:, -1] * scale)      # surroundings: `scale` and `model`

They decide what the callable computes, so that they are watched; a forward that changes them keeps state
where no program could leave it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from rmtcompile.state import _ATOMS, _fields, contains_tensor

_MISSING = object()
_STATIC = (types.ModuleType, types.BuiltinFunctionType, type)


class Slot(NamedTuple):
    """One entry of a namespace (a dict, a list, the fields of `holder`) and what it held."""

    space: Any
    key: Any
    value: Any
    name: str
    holder: Any = None

    @property
    def owner(self) -> Any:
        """The container or object."""
        return self.space if self.holder is None else self.holder

    @property
    def now(self) -> Any:
        """What it holds now, or MISSING."""
        try:
            return self.space[self.key]
        except LookupError:
            return _MISSING


def is_same(before: Any, now: Any) -> bool:
    """The very same object, or an equal number or string of the same type."""
    return now is before or (isinstance(before, _ATOMS) and type(now) is type(before) and now == before)


class Surroundings:
    """The slots and cells that a callable can see, except modules' insides.

    Attributes:
        slots: entries of globals, containers and objects that it names.
        cells: (cell of a closure, its content, name).
        containers: (list or dict, copy, name).
    """

    MAX_DEPTH = 4

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.slots: list[Slot] = []
        self.cells: list[tuple[types.CellType, Any, str]] = []
        self.containers: list[tuple[Any, Any, str]] = []
        self._seen: set[int] = set()
        if not isinstance(fn, nn.Module):
            self._visit("", fn, frozenset(), 0)

    def _visit(self, name: str, value: Any, names: frozenset[str], depth: int) -> None:
        if depth > self.MAX_DEPTH or isinstance(value, (nn.Module, *_ATOMS, *_STATIC)):
            return
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, types.FunctionType):
            self._function(value, depth)
        elif isinstance(value, types.MethodType):
            if isinstance(value.__func__, types.FunctionType):
                self._function(value.__func__, depth)
                self._visit(name, value.__self__, _names(value.__func__.__code__), depth + 1)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._visit(name, part, names, depth + 1)
        elif isinstance(value, (list, dict)):
            self.containers.append((value, value.copy(), name))
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                self._slot(Slot(value, key, item, f"{name}[{key!r}]"), names, depth)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                self._visit(f"{name}[{i}]", item, names, depth + 1)
        elif type(value).__module__.split(".")[0] not in ("builtins", "torch"):
            fields = _fields(value) or {}
            for key in sorted(names & fields.keys()):
                self._slot(Slot(fields, key, fields[key], f"{name}.{key}"), names, depth)

    def _slot(self, slot: Slot, names: frozenset[str], depth: int) -> None:
        if not isinstance(slot.value, _STATIC):
            self.slots.append(slot)
            self._visit(slot.name, slot.value, names, depth + 1)

    def _function(self, fn: types.FunctionType, depth: int) -> None:
        names = _names(fn.__code__)
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # a cell that is not filled yet
                continue
            if not isinstance(value, _STATIC):
                self.cells.append((cell, value, name))
                self._visit(name, value, names, depth + 1)
        for name in sorted(names & fn.__globals__.keys()):
            self._slot(Slot(fn.__globals__, name, fn.__globals__[name], name), names, depth)
        for item in fn.__defaults__ or ():
            self._visit("default", item, names, depth + 1)

    def restore(self) -> list[str]:
        """Put back what a forward has changed; gives the names of that.

        Lists and dicts into which it has put no tensors (a log of its calls) stay as they are, and are not
        watched any more.
        """
        changed = []
        for container, copy, name in list(self.containers):
            entries, before = _entries(container), _entries(copy)
            if entries.keys() == before.keys() and all(is_same(before[key], entries[key]) for key in entries):
                continue
            if contains_tensor(list(entries.values())):
                changed.append(name)
                container.clear()
                container.update(copy) if isinstance(container, dict) else container.extend(copy)
            else:
                self.containers = [entry for entry in self.containers if entry[0] is not container]
                self.slots = [slot for slot in self.slots if slot.space is not container]
        for slot in self.slots:
            if not is_same(slot.value, slot.now):
                changed.append(slot.name)
                slot.space[slot.key] = slot.value
        for cell, value, name in self.cells:
            if not is_same(value, cell.cell_contents):
                changed.append(name)
                cell.cell_contents = value
        return changed


def _entries(container: Any) -> dict[Any, Any]:
    return dict(container) if isinstance(container, dict) else dict(enumerate(container))


def _names(code: types.CodeType) -> frozenset[str]:
    """Names that a function's code uses, functions inside it included."""
    inner = (_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return frozenset(code.co_names).union(*inner)
