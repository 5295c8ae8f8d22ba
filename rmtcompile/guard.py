"""Guards: what a compiled program took for granted, and whether it still holds.

Two parts. The *key* of a call is what its inputs and the ambient modes fix (types, shapes up to the number of
segments, gradients, autocast); calls with different keys have different programs. The *watch* is what the
captured forward read of the modules' Python state before writing it: flags, counters, names, submodules,
hooks. A changed watch means another program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rmtcompile.probe import Segmentation
from rmtcompile.state import _ATOMS, Snapshot

_tracked: dict[type, type] = {}


class ReadTracker:
    """Notes which attributes of which modules are read before they are written while a forward runs."""

    def __init__(self) -> None:
        self.reads: set[tuple[int, str]] = set()
        self.written: set[tuple[int, str]] = set()

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


_listeners: dict[int, ReadTracker] = {}


def _subclass(cls: type[nn.Module]) -> type:
    if cls in _tracked:
        return _tracked[cls]

    def __getattribute__(self: Any, name: str) -> Any:
        tracker = _listeners.get(id(self))
        if tracker is not None and (id(self), name) not in tracker.written:
            tracker.reads.add((id(self), name))
        return cls.__getattribute__(self, name)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        tracker = _listeners.get(id(self))
        if tracker is not None:
            tracker.written.add((id(self), name))
        cls.__setattr__(self, name, value)

    body = {"__getattribute__": __getattribute__, "__setattr__": __setattr__, "__module__": cls.__module__,
            "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    kind: type[type] = type(cls)
    _tracked[cls] = kind(cls.__name__, (cls,), body)
    return _tracked[cls]


Watch = list[tuple[Callable[[], Any], Any, str]]


class ModuleGuard:
    """The Python state that a captured forward depends on.

    Args:
        snapshot: the modules' state before the forward.
        reads: (id of module, attribute) pairs read before written.
        roots: modules by name.
    """

    def __init__(self, snapshot: Snapshot, reads: set[tuple[int, str]], roots: dict[str, nn.Module]) -> None:
        self._atoms: list[tuple[Any, Any, Any, str]] = []  # (namespace, key, value, name)
        self._structures: list[tuple[dict[Any, Any], list[Any], str]] = []
        reached: set[int] = set()
        for holder, copy in snapshot.holders():
            if isinstance(holder, nn.Module):
                for key, value in copy.items():
                    if (id(holder), key) not in reads:
                        continue
                    if isinstance(value, _ATOMS):
                        self._atoms.append((holder.__dict__, key, value, f"{type(holder).__name__}.{key}"))
                    else:
                        _reach(value, reached)
        for holder, copy in snapshot.holders():
            if isinstance(holder, nn.Module) or id(holder) not in reached:
                continue
            space = holder if isinstance(holder, (dict, list)) else holder.__dict__
            for key, value in copy.items() if isinstance(copy, dict) else enumerate(copy):
                if isinstance(value, _ATOMS):
                    self._atoms.append((space, key, value, f"{type(holder).__name__}[{key!r}]"))
        for name, root in roots.items():
            for path, module in root.named_modules():
                for space in _structures(module):
                    self._structures.append((space, list(space.items()), f"{name}.{path}".strip(".")))

    def settle(self) -> None:
        """Take the hooks that are registered now for those of the capture: the forward itself has registered
        them."""
        self._structures = [(space, list(space.items()), name) for space, _, name in self._structures]

    def broken(self) -> str | None:
        """What changed since capture, in words, or None."""
        for space, key, value, name in self._atoms:
            try:
                now = space[key]
            except (KeyError, IndexError):
                return f"{name} is gone"
            if now is not value and (type(now) is not type(value) or now != value):
                return f"{name} was {value!r} and is {now!r}"
        for space, items, name in self._structures:
            if (space or items) and list(space.items()) != items:
                return f"submodules or hooks of {name or 'the model'} changed"
        return None


def _structures(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    """The namespaces that hold a module's children and hooks."""
    return (module._modules, module._forward_hooks, module._forward_pre_hooks)


def _reach(value: Any, reached: set[int]) -> None:
    """Ids of plain containers and objects below a value that was read."""
    if id(value) in reached or isinstance(value, (torch.Tensor, nn.Module, type, *_ATOMS)):
        return
    reached.add(id(value))
    if isinstance(value, dict):
        for item in value.values():
            _reach(item, reached)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _reach(item, reached)
    elif isinstance(getattr(value, "__dict__", None), dict):
        for item in value.__dict__.values():
            _reach(item, reached)


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


def _static(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, value.device, value.dim(), value.requires_grad)
    if isinstance(value, _ATOMS):
        return (type(value).__name__, value)
    return (type(value).__name__, id(value))


def _modes() -> tuple[Any, ...]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in sorted({"cpu", device})
    )
    return (torch.is_grad_enabled(), torch.get_default_dtype(), autocast)
