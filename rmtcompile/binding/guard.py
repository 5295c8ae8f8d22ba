"""Guards: what decides whether an earlier program may run a call.

The *key* of a call is what its inputs and the ambient modes fix (types, shapes up to the number of segments,
gradients, autocast); calls with different keys have different programs. What the captured forward read of the
modules' Python state before writing it is noted here by `ReadTracker` and watched by `watch.py`; a changed
watch means another program.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rmtcompile.binding.objects import ATOMS, contains_tensor
from rmtcompile.binding.templates import template
from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.layouts import Layout, layout_of
from rmtcompile.ir.segmentation import Segmentation

_tracked: dict[type, type] = {}
_BODY: set[str] = set()
"""What such a subclass has of its own."""


class ReadTracker:
    """Notes which attributes of which modules are read before they are written while a forward runs."""

    def __init__(self) -> None:
        self.reads: set[tuple[int, str]] = set()
        self.written: set[tuple[int, str]] = set()
        self.outside: list[str] = []  # attributes that were set on a module's class

    @contextmanager
    def watching(self, roots: dict[str, nn.Module]) -> Iterator[None]:
        """Swap every module's class for a subclass that reports attribute access, and swap it back."""
        modules = {id(m): m for root in roots.values() for m in root.modules()}
        swapped: list[tuple[nn.Module, type]] = []
        try:
            for module in modules.values():
                cls = type(module)
                try:
                    module.__class__ = _subclass(cls)
                except TypeError:
                    self.reads.update((id(module), name) for name in module.__dict__)
                    continue
                swapped.append((module, cls))
                _listeners[id(module)] = self
            yield
        finally:
            for module, cls in swapped:
                _listeners.pop(id(module), None)
                module.__class__ = cls
                for name in vars(_tracked[cls]).keys() - _BODY:
                    delattr(_tracked[cls], name)
                    self.outside.append(f"{cls.__name__}.{name}")


_listeners: dict[int, ReadTracker] = {}


def _subclass(cls: type[nn.Module]) -> type:
    if cls in _tracked:
        return _tracked[cls]

    def __getattribute__(self: Any, name: str) -> Any:
        tracker = _listeners.get(id(self))
        if tracker is not None and (id(self), name) not in tracker.written:
            if name == "__dict__":
                reader = sys._getframe(1).f_globals.get("__name__", "")
                if not reader.startswith(("torch.", "rmtcompile.binding.objects")):
                    tracker.reads.update((id(self), key) for key in cls.__getattribute__(self, name))
            else:
                tracker.reads.add((id(self), name))
        return cls.__getattribute__(self, name)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        tracker = _listeners.get(id(self))
        if tracker is not None:
            tracker.written.add((id(self), name))
        cls.__setattr__(self, name, value)

    def __delattr__(self: Any, name: str) -> None:
        tracker = _listeners.get(id(self))
        if tracker is not None and (id(self), name) not in tracker.written:
            tracker.reads.add((id(self), name))  # it would fail if there were none
            tracker.written.add((id(self), name))
        cls.__delattr__(self, name)

    body: dict[str, Any] = {
        "__getattribute__": __getattribute__, "__setattr__": __setattr__, "__delattr__": __delattr__,
        "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__,
    }  # fmt: skip
    kind: type[type] = type(cls)
    _tracked[cls] = kind(cls.__name__, (cls,), body)
    _BODY.update(vars(_tracked[cls]))
    return _tracked[cls]


def layouts_of(args: Any, kwargs: Any) -> tuple[Layout, ...]:
    """How the tensors of a call that are no integers lie in memory."""
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    return tuple(layout_of(x) for x in tensors if x.is_floating_point() or x.is_complex())


def call_key(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """What decides whether an earlier segmentation fits: structure, types and static values, shapes left
    out."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    return (spec, tuple(_static(value) for value in flat), _modes())


def program_key(args: Any, kwargs: Any, segmentation: Segmentation) -> tuple[Any, ...]:
    """What decides which program runs a call: everything but the number of whole segments."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    shapes = [value.shape for value in flat if isinstance(value, torch.Tensor)]
    _, rest = segmentation.count(shapes)
    canonical = segmentation.shapes(shapes, 2)
    return (spec, tuple(_static(value) for value in flat), tuple(canonical), rest, _modes())


def structure_key(
    args: Any, kwargs: Any, segmentation: Segmentation, layouts: tuple[Layout, ...] = ()
) -> tuple[Any, ...]:
    """What calls have in common that differ in sizes only: all of `program_key` but the shapes, and whether
    there is an incomplete segment (of how many segments of the model, where several are one, or of how many
    parts, where one is cut).

    Args:
        layouts: of the inputs, where they decide what the forward does.
    """
    flat = pytree.tree_leaves((args, kwargs))
    _, rest = segmentation.count([value.shape for value in flat if isinstance(value, torch.Tensor)])
    begun = rest > 0 if segmentation.is_own else segmentation.pieces(rest)
    called = call_key(args, kwargs)
    return ((called, layouts) if layouts else called, segmentation, begun)


def _static(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, value.device, value.dim(), value.requires_grad)
    if isinstance(value, ATOMS):
        return (type(value).__name__, value)
    if contains_tensor(value):
        raise UnsupportedError(
            "an argument holds tensors inside an object",
            [f"{type(value).__module__}.{type(value).__qualname__}"],
            "pass the tensors themselves, alone or in lists, tuples and dicts, or register the class with "
            "torch.utils._pytree.register_pytree_node",
        )
    return _Object(value)


class _Object:
    """An argument that is no tensor, number or container: the same object with the same contents."""

    def __init__(self, value: Any) -> None:
        self.value = value  # kept, so that no other object gets its identity
        self.content = template(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and self.value is other.value and self.content == other.content

    def __hash__(self) -> int:
        return id(self.value)


def _modes() -> tuple[Any, ...]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in sorted({"cpu", device})
    )
    return (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(), autocast)
