"""Surroundings: what the code of a forward refers to besides its modules' own state: closures, globals,
defaults, bound objects, classes.

    scale = 2.0
    fast = optimize(lambda ids: model(ids).logits[:, -1] * scale)      # surroundings: `scale` and `model`

They decide what the forward computes, so that they are watched; a forward that changes them keeps state
where no program could leave it. Which functions run is read from the names that their code uses, from
`forward` on: those of a method are looked for in every class that was met. Python, torch and installed
packages that no module comes from are taken to stay as they are.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from rmtcompile.binding.code import globals_in, names_in
from rmtcompile.binding.objects import (
    BASES,
    DELETED,
    Step,
    base_of,
    contains_tensor,
    is_fixed,
    is_leaf,
    is_same,
    items_of,
    now,
    parts,
    put,
    put_items,
    walk,
)
from rmtcompile.binding.state import CALL_HOOKS, hooked_around

_STATIC = (types.ModuleType, types.BuiltinFunctionType, type)
_OTHERS = frozenset({"torch", "builtins", "numpy", *sys.stdlib_module_names} - {"__main__"})
_BUILT_IN = frozenset(base for base in BASES if base is not object)
_LIBRARIES = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
_WRAPPERS = (staticmethod, classmethod, property, functools.cached_property)


class Slot(NamedTuple):
    """One step from an object, and what was there."""

    owner: Any
    step: Step
    value: Any
    name: str

    @property
    def now(self) -> Any:
        """What is there now, or DELETED."""
        return now(self.owner, self.step)


class Surroundings:
    """The slots and cells that the code of a callable can see, except modules' insides.

    Attributes:
        slots: entries of globals, classes, containers and objects that it names.
        cells: (cell of a closure, its content, name).
        containers: (container, copy of its items, name).
        outer: the module whose hooks run around the callable, or None.
    """

    def __init__(self, fn: Callable[..., Any], modules: dict[str, nn.Module] | None = None) -> None:
        self.slots: list[Slot] = []
        self.cells: list[tuple[types.CellType, Any, str]] = []
        self.containers: list[tuple[Any, Any, str]] = []
        self._names: set[str] = {"forward"}
        self._seen: dict[int, Any] = {}
        self._known: set[tuple[int, Step]] = set()  # slots
        self._classes: dict[type, None] = {}
        self._objects: list[tuple[Any, str]] = []
        self._caches: list[tuple[Any, int]] = []
        inside = [module for root in (modules or {}).values() for module in root.modules()]
        kinds = {type(module): None for module in inside}
        self._kinds = {base for kind in kinds for base in kind.__mro__}
        self._packages = {_package(kind) for kind in kinds} - _OTHERS
        self._visit("", fn)
        for kind in kinds:
            self._class(kind)
        self.outer = hooked_around(fn)
        for _, value in walk([self._attributes(module) for module in inside]):
            if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):  # hooks, too
                self._visit(value.__name__ if hasattr(value, "__name__") else "partial", value)
            elif not is_leaf(value):
                self._class(type(value))
        while self._by_names():
            pass

    # ---- what there is -------------------------------------------------------------------------------------

    @property
    def functions(self) -> dict[int, Any]:
        """The functions that were looked into, among other objects, by identity."""
        return self._seen

    @property
    def classes(self) -> list[type]:
        """The classes of objects that were met, but for those that are taken to stay as they are."""
        return list(self._classes)

    def _attributes(self, module: nn.Module) -> list[Any]:
        own = vars(module).items()
        return [value for key, value in own if module is not self.outer or key not in CALL_HOOKS]

    def _visit(self, name: str, root: Any) -> None:
        """Note what can be seen from a value; entries that code has to name wait in `_objects`."""
        stack = [(name, root)]
        while stack:
            name, value = stack.pop()
            if id(value) in self._seen:
                continue
            if isinstance(value, nn.Module):
                self._class(type(value))
            if isinstance(value, (types.FunctionType, types.MethodType)) or _cached(value) is not None:
                self._seen[id(value)] = value
                stack += self._callable(name, value)
            elif isinstance(value, type):
                if not is_library(_package(value)):  # of a library, those of objects that there are suffice
                    self._class(value)
            elif not is_leaf(value) and self._is_own(type(value)):
                self._seen[id(value)] = value
                self._class(type(value))
                self._objects.append((value, name))
                stack += self._entries(name, value)

    def _entries(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Items of a container, which need no name."""
        fixed = is_fixed(value)
        if not fixed and base_of(type(value)) is not object:
            self.containers.append((value, items_of(value), name))
        for step, item in parts(value).items():
            if step[0] in ("item", "member", "referent") or isinstance(value, functools.partial):
                inner = f"{name}[{step[1]!r}]" if step[0] == "item" else name
                if step[0] == "item" and not fixed:
                    self._slot(Slot(value, step, item, inner))
                yield inner, item

    def _registered(self, name: str, register: Any) -> Iterator[tuple[str, Any]]:
        """What a register of classes says of those of the modules."""
        if not isinstance(register, dict):
            return
        mine = self._kinds | {str(kind) for kind in self._kinds}
        for key, entry in register.items():
            if key in mine:
                self._slot(Slot(register, ("item", key), entry, f"{name}[{key!r}]"))
                yield f"{name}[{key!r}]", entry

    def _slot(self, slot: Slot) -> None:
        key = (id(slot.owner), slot.step)
        if key not in self._known and not isinstance(slot.value, _STATIC):
            self._known.add(key)
            self.slots.append(slot)

    def _callable(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        """What a function refers to."""
        if isinstance(value, types.MethodType):
            yield name, value.__self__
            yield name, value.__func__
        elif (cached := _cached(value)) is not None:
            self._caches.append((value, value.cache_info().misses))
            yield name, cached
        elif self._may_change(value):
            self._names |= names_in(value.__code__)
            for inner, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                try:
                    content = cell.cell_contents
                except ValueError:  # a cell that is not filled yet
                    continue
                if not isinstance(content, _STATIC):
                    self.cells.append((cell, content, inner))
                yield inner, content
            for inner in sorted(globals_in(value.__code__) & value.__globals__.keys()):
                item = value.__globals__[inner]
                if is_register(value, item):
                    yield from self._registered(inner, item)
                    continue
                self._slot(Slot(value.__globals__, ("item", inner), item, inner))
                yield inner, item
            for item in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                yield "default", item

    def _class(self, kind: type) -> None:
        self._classes.update(dict.fromkeys(owner for owner in kind.__mro__ if self._may_change(owner)))

    def _may_change(self, value: Any) -> bool:
        package = _package(value)
        return package in self._packages or not is_library(package)

    def _is_own(self, kind: type) -> bool:
        if kind in (types.SimpleNamespace, types.MappingProxyType, functools.partial) or kind in _BUILT_IN:
            return True
        return self._may_change(kind)

    def _by_names(self) -> bool:
        """Note what code names in classes and objects; whether anything was new."""
        before = len(self._known)
        for kind in list(self._classes):
            for key, value in list(vars(kind).items()):
                dunder = key.startswith("__") and key.endswith("__")
                fn = value.func if isinstance(value, functools.cached_property) else value
                fn = fn.fget if isinstance(fn, property) else getattr(fn, "__func__", fn)
                if (dunder and not isinstance(fn, types.FunctionType)) or key == "__init__":
                    continue
                if (key in self._names or dunder) and (id(kind), ("attr", key)) not in self._known:
                    self._slot(Slot(kind, ("attr", key), value, f"{kind.__name__}.{key}"))
                    self._known.add((id(kind), ("attr", key)))
                    if not isinstance(value, types.MemberDescriptorType):
                        self._visit(f"{kind.__name__}.{key}", fn)
        for value, name in list(self._objects):
            for step, item in parts(value).items():
                if step[0] in ("attr", "slot") and step[1] in self._names and not is_fixed(value):
                    if (id(value), step) not in self._known:
                        self._slot(Slot(value, step, item, f"{name}.{step[1]}"))
                        self._known.add((id(value), step))
                        self._visit(f"{name}.{step[1]}", item)
        return len(self._known) > before

    # ---- what a forward has done to it ---------------------------------------------------------------------

    def restore(self) -> list[str]:
        """Put back what a forward has changed; gives the names of that.

        Containers into which it has put no tensors (a log of its calls) stay as they are, and are not watched
        any more; so do slots that it has filled for good (a table of functions that is made when it is first
        needed).
        """
        changed = []
        for container, items, name in list(self.containers):
            if _alike(items, items_of(container)):
                continue
            if contains_tensor(list(parts(container).values())):
                changed.append(name)
                put_items(container, items)
            else:
                self.containers = [entry for entry in self.containers if entry[0] is not container]
                self.slots = [slot for slot in self.slots if slot.owner is not container]
        for i, slot in enumerate(self.slots):
            if is_same(slot.value, slot.now):
                continue
            if slot.value is None and slot.now is not DELETED and not contains_tensor(slot.now):
                self.slots[i] = slot._replace(value=slot.now)
                continue
            changed.append(slot.name)
            if isinstance(slot.owner, type):
                setattr(slot.owner, slot.step[1], slot.value)
            else:
                put(slot.owner, slot.step, slot.value)
        for cell, value, name in self.cells:
            if not is_same(value, cell.cell_contents):
                changed.append(name)
                cell.cell_contents = value
        for cache, misses in self._caches:
            if cache.cache_info().misses != misses and contains_tensor(cache):
                cache.cache_clear()  # its tensors are those of the tracing
        return changed


def _package(value: Any) -> str:
    """The package of a class or function."""
    return str(value.__module__ or "").split(".")[0]


def is_register(fn: types.FunctionType, value: Any) -> bool:
    """Whether a value that a library's function names is a set of classes, or says something of classes or of
    the `str` of them: it grows with what is imported and made, and code asks for those that it knows."""
    is_of_classes = isinstance(value, (set, dict)) and bool(value) and all(map(_is_class, value))
    return is_of_classes and is_library(_package(fn))


def _is_class(key: Any) -> bool:
    return isinstance(key, type) or (isinstance(key, str) and key.startswith("<class '"))


@functools.cache
def is_library(package: str) -> bool:
    """Whether a package is taken to stay as it is."""
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return package in _OTHERS or file.startswith(_LIBRARIES)


def _cached(value: Any) -> Any:
    """The function inside a `functools.lru_cache`."""
    return value.__wrapped__ if isinstance(value, functools._lru_cache_wrapper) else None


def _alike(before: Any, after: Any) -> bool:
    if isinstance(before, set):
        return before == after
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(is_same(before[key], after[key]) for key in after)
    return len(before) == len(after) and all(map(is_same, before, after))



