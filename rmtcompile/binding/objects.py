"""Objects: the one way through graphs of Python objects.

    value                                    steps from it
    list, tuple, named tuple, deque          ("item", 0), ("item", 1), ...
    dict, OrderedDict, defaultdict           ("item", key), ...
    set, frozenset                           ("member", element), ...
    an object, a dataclass                   ("attr", name) for its __dict__, ("slot", name) for its __slots__
    a weak reference or proxy                ("referent", None)

A list that is an instance of a class of its own has items and attributes. Graphs may be nested in any depth
and have cycles; they are walked without recursion. What C code keeps (an iterator, say) is not looked into,
except to see whether a tensor is in there.
"""

from __future__ import annotations

import enum
import functools
import gc
import io
import logging
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from rmtcompile.errors import CaptureError

Step = tuple[str, Any]
Path = tuple[Step, ...]  # from an object down to one value

ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
"""Values that are compared with `==`."""

OPAQUE = (
    type,
    types.FunctionType,
    types.MethodType,
    types.ModuleType,
    types.BuiltinFunctionType,
    torch.Generator,
    enum.Enum,
    logging.Logger,
    logging.Handler,
    io.IOBase,
    slice,
)
"""Values that keep no state of a model."""

SEQUENCES: tuple[type, ...] = (list, deque, tuple)
SETS: tuple[type, ...] = (set, frozenset)
BASES: tuple[type, ...] = (OrderedDict, defaultdict, dict, *SEQUENCES, *SETS, object)
_REFERENCES = (weakref.ref, weakref.ProxyType, weakref.CallableProxyType)


_T = TypeVar("_T")


def _cached(fn: Callable[[Any], _T]) -> Callable[[Any], _T]:
    return functools.cache(fn)


class _Mark:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name

    def __copy__(self) -> _Mark:
        return self

    def __deepcopy__(self, _: Any) -> _Mark:
        return self


DELETED = _Mark("DELETED")
"""Stands for a value that is not there any more."""


class Opaque:
    """Base of our own objects that a user may put into a model: they are no state of it."""


def is_leaf(value: object) -> bool:
    """Whether there is nothing to look into; a module is looked into as the module that it is."""
    return isinstance(value, (*ATOMS, *OPAQUE, Opaque, torch.Tensor, nn.Module))


def is_same(before: Any, now: Any) -> bool:
    """The very same object, or an equal number or string of the same type."""
    return now is before or (isinstance(before, ATOMS) and type(now) is type(before) and now == before)


# ---- one object --------------------------------------------------------------------------------------------


@_cached
def base_of(kind: Any) -> type:
    """What holds the items of instances: a container of Python's own, or `object` where there are none."""
    return next(base for base in BASES if issubclass(kind, base))


@_cached
def _slots(kind: Any) -> dict[str, Any]:
    """The `__slots__` of a class and its bases: descriptors by name, the nearest one of a name."""
    found: dict[str, Any] = {}
    for owner in kind.__mro__:
        for name, member in vars(owner).items():
            if isinstance(member, types.MemberDescriptorType) and not name.startswith("__"):
                found.setdefault(name, member)
    return found


def fields_of(value: object) -> dict[str, Any] | None:
    """The `__dict__` of an object, or None."""
    if type(value).__dictoffset__ == 0:  # a proxy gives that of another object
        return None
    fields = getattr(value, "__dict__", None)
    return fields if isinstance(fields, dict) else None


def _members(value: Any, base: Any) -> list[Any]:
    """The items of a set, those that have an order of their own in that: its own depends on its history."""
    items = list(base.__iter__(value))
    is_plain = all(isinstance(item, ATOMS) for item in items)
    return sorted(items, key=lambda item: (type(item).__name__, repr(item))) if is_plain else items


def parts(value: Any) -> dict[Step, Any]:
    """What an object holds, by the step that leads there, in its order; nothing for leaves."""
    if is_leaf(value):
        return {}
    return held(value)


def held(value: Any) -> dict[Step, Any]:
    """What any object holds, as `parts`; of a module, its attributes."""
    kind = type(value)
    if kind in _REFERENCES or isinstance(value, weakref.ref):
        referent = _referent(value)
        return {} if referent is None else {("referent", None): referent}
    found: dict[Step, Any] = {}
    base: Any = base_of(kind)
    if issubclass(base, dict):
        found.update((("item", key), base.__getitem__(value, key)) for key in base.__iter__(value))
    elif base in SEQUENCES:
        found.update((("item", i), item) for i, item in enumerate(base.__iter__(value)))
    elif base in SETS:
        found.update((("member", item), item) for item in _members(value, base))
    elif isinstance(value, types.MappingProxyType):
        found.update((("item", key), item) for key, item in value.items())
    for name, item in (fields_of(value) or {}).items():
        found["attr", name] = item
    for name, member in _slots(kind).items():
        try:
            found["slot", name] = member.__get__(value, kind)
        except AttributeError:  # a slot that holds nothing
            continue
    return found


def _referent(value: Any) -> Any:
    if isinstance(value, weakref.ref):
        return value()
    try:
        return value.__init__.__self__
    except ReferenceError:
        return None


def get(value: Any, step: Step) -> Any:
    """What lies one step from an object.

    Raises:
        LookupError: there is no such thing.
    """
    kind, key = step
    if kind == "attr":
        return value.__dict__[key]
    if kind == "item":
        base: Any = base_of(type(value))
        if issubclass(base, dict) and not dict.__contains__(value, key):
            raise LookupError(key)  # a defaultdict would make an entry
        return value[key] if base is object else base.__getitem__(value, key)
    if kind == "slot":
        try:
            return _slots(type(value))[key].__get__(value, type(value))
        except AttributeError:
            raise LookupError(key) from None
    if kind == "referent":
        found = _referent(value)
    else:
        found = next((item for item in value if item is key or item == key), None)
    if found is None:
        raise LookupError(key)
    return found


def now(value: Any, step: Step) -> Any:
    """What lies one step from an object, or DELETED."""
    try:
        return get(value, step)
    except LookupError:
        return DELETED


def put(value: Any, step: Step, new: Any) -> None:
    """Set what lies one step from an object, past setters of its class; DELETED takes it away."""
    kind, key = step
    base: Any = base_of(type(value))
    if kind == "attr":
        if new is DELETED:
            value.__dict__.pop(key, None)
        else:
            value.__dict__[key] = new
    elif kind == "slot":
        member = _slots(type(value))[key]
        if new is not DELETED:
            member.__set__(value, new)
        elif now(value, step) is not DELETED:
            member.__delete__(value)
    elif kind == "item" and new is DELETED:
        base.pop(value, key, None)
    elif kind == "item":
        base.__setitem__(value, key, new)
    else:
        raise AssertionError(step)


def put_items(value: Any, items: Any) -> None:
    """Give a list, deque, set or dict other items; what it has besides them stays."""
    base: Any = base_of(type(value))
    base.clear(value)
    if issubclass(base, dict):
        for key, item in items.items():
            base.__setitem__(value, key, item)
    elif base is set:
        base.update(value, items)
    else:
        base.extend(value, items)


def items_of(value: Any) -> Any:
    """A copy of a container's items: a dict, list or set."""
    base: Any = base_of(type(value))
    if issubclass(base, dict):
        return {key: base.__getitem__(value, key) for key in base.__iter__(value)}
    return set(base.__iter__(value)) if base in SETS else list(base.__iter__(value))


def is_fixed(value: Any) -> bool:
    """Whether what it holds cannot be replaced: a tuple, a frozen set, a reference."""
    fixed = (tuple, frozenset, types.MappingProxyType, functools.partial)
    return type(value) in _REFERENCES or isinstance(value, (*fixed, weakref.ref))


# ---- many objects ------------------------------------------------------------------------------------------

LIMIT = 1_000_000
"""Objects that are looked at in one walk."""


def walk(root: Any, into: Callable[[Any], dict[Step, Any]] = parts) -> Iterator[tuple[Path, Any]]:
    """Every value that can be reached from one, itself first, depth first; each object once, with the first
    path to it.

    Args:
        into: what a value holds.

    Raises:
        CaptureError: there are too many.
    """
    seen: dict[int, Any] = {}
    stack: list[tuple[Path, Any]] = [((), root)]
    while stack:
        path, value = stack.pop()
        if id(value) in seen:
            continue
        if not isinstance(value, ATOMS):
            seen[id(value)] = value
        yield path, value
        inner = into(value)
        if inner and len(seen) > LIMIT:
            raise too_large(path)
        stack += [((*path, step), item) for step, item in reversed(inner.items())]


def too_large(path: Path) -> CaptureError:
    return CaptureError(
        f"the model keeps more than {LIMIT} objects, which are too many to look into",
        [f"at {path_name(path)}"],
        "keep what the forward does not need outside of its modules",
    )


def contains_tensor(value: Any) -> bool:
    """Whether `value` holds a tensor somewhere inside: in containers, attributes, what a function closes
    over, what C code keeps. Modules hold theirs for themselves."""
    return any(isinstance(item, torch.Tensor) for _, item in walk(value, into=_everything))


def _everything(value: Any) -> dict[Step, Any]:
    if isinstance(value, types.MethodType):
        return {("attr", "__self__"): value.__self__, ("attr", "__func__"): value.__func__}
    if isinstance(value, types.FunctionType):
        return closed_over(value)
    return {**parts(value), **_hidden(value)}


def closed_over(fn: types.FunctionType) -> dict[Step, Any]:
    """The variables of outer functions that a function uses, and its defaults."""
    found: dict[Step, Any] = {}
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            found["attr", name] = cell.cell_contents
        except ValueError:  # a cell that is not filled yet
            continue
    found.update((("attr", f"default{i}"), item) for i, item in enumerate(fn.__defaults__ or ()))
    found.update((("attr", name), item) for name, item in (fn.__kwdefaults__ or {}).items())
    return found


def _hidden(value: Any) -> dict[Step, Any]:
    """What an object of C code refers to, as far as the garbage collector knows."""
    if is_leaf(value) or not is_sealed(value):
        return {}
    found = gc.get_referents(value)
    skipped = (*OPAQUE, types.CodeType, types.FrameType)
    return {("hidden", i): item for i, item in enumerate(found) if not isinstance(item, skipped)}


@_cached
def _is_sealed(kind: Any) -> bool:
    base = base_of(kind)
    if base is not object:
        return False
    own = sum(8 for offset in (kind.__dictoffset__, kind.__weakrefoffset__) if offset > 0)
    return kind.__itemsize__ > 0 or kind.__basicsize__ > object.__basicsize__ + own + 8 * len(_slots(kind))


def is_sealed(value: Any) -> bool:
    """Whether C code keeps something in it that no step leads to."""
    return _is_sealed(type(value))


def is_iterator(value: Any) -> bool:
    """Whether to use it changes it: a generator, an iterator."""
    return is_sealed(value) and hasattr(type(value), "__next__") and not isinstance(value, io.IOBase)


def path_name(path: Path) -> str:
    """`memory_cell.layers.0.W_mem` from a path; the namespaces in which torch keeps parameters and buffers
    are left out."""
    found: list[str] = []
    for kind, key in path:
        if kind in ("all", "referent") or (isinstance(key, str) and key in ("_parameters", "_buffers", "")):
            continue
        if kind == "member":
            found.append("{...}")
        elif kind in ("item", "hidden") and not isinstance(key, str):
            found.append(f"[{key!r}]")
        else:
            found.append(f"{'.' if found else ''}{key}")
    return "".join(found)
