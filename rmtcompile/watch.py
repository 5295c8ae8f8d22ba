"""Watch: the Python state that a captured forward has read, and whether it is still the same.

    what was read                          what is watched
    layer.scale, self.act, self.config     the slot holds the same object, or an equal number or string
    a list, dict or object behind it       its entries likewise, and how many there are
    a name that the instance had not       that it still has none, and what its class has under that name
    children and hooks of every module     entries, and how many there are
    a slot that the forward refills        the structure of what it holds
    closure and globals of a callable      as slots

A check of everything takes a fraction of a millisecond: identities and sizes are compared in bulk, and only
what differs there is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import call, is_, itemgetter
from typing import Any

import torch
from torch import nn

from rmtcompile.state import _ATOMS, Snapshot
from rmtcompile.surroundings import _MISSING, Slot, Surroundings, is_same

_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


NAMESPACES = frozenset(nn.Module().__dict__.keys() - {"training"})
"""Where nn.Module keeps what is watched in another way."""


class ModuleGuard:
    """The Python state that a captured forward depends on.

    Args:
        snapshot: the modules' state before the forward.
        reads: (id of module, attribute) pairs read before written.
        roots: modules by name.
        changed: (id of container, key) pairs that the forward leaves different.
        around: what a callable that is no module refers to.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        reads: set[tuple[int, str]],
        roots: dict[str, nn.Module],
        changed: frozenset[tuple[int, Any]] = frozenset(),
        around: Surroundings | None = None,
    ) -> None:
        self._slots: list[Slot] = list(around.slots) if around is not None else []
        self._cells = list(around.cells) if around is not None else []
        self._refilled: list[tuple[Slot, Any]] = []  # and the structure of what they hold
        self._closed: list[tuple[Any, str]] = []  # containers whose number of entries is fixed
        self._open: list[tuple[Any, set[str], str]] = []  # namespaces in which these names are missing
        self._children: list[tuple[dict[str, Any], tuple[Any, ...], str]] = []
        self._hooks = [(getattr(nn.modules.module, key), "all modules") for key in _GLOBAL_HOOKS]
        self._changed = changed
        self._copies = {id(holder): (holder, copy) for holder, copy in snapshot.holders()}
        if around is not None:
            self._closed += [(container, f"entries of {name}") for container, _, name in around.containers]
        names: dict[int, set[str]] = {}
        for owner, name in reads:
            names.setdefault(owner, set()).add(name)
        reached: set[int] = set()
        for name, root in roots.items():
            for path, module in root.named_modules():
                if id(module) in self._copies and id(module) not in reached:
                    reached.add(id(module))
                    label = f"{name}.{path}".strip(".") or type(module).__name__
                    self._module(module, names.get(id(module), set()), label, reached)
        self._classes([m for root in roots.values() for m in root.modules()], names)
        del self._copies
        self._freeze()

    # ---- what is watched -----------------------------------------------------------------------------------

    def _module(self, module: nn.Module, names: set[str], label: str, reached: set[int]) -> None:
        kept = self._copies[id(module)][1]
        kind = type(module).__name__
        missing = names - kept.keys()
        for key in sorted(names & kept.keys() - NAMESPACES):
            self._entry(Slot(module.__dict__, key, kept[key], f"{kind}.{key}", module), reached)
        for space in (module._parameters, module._buffers):
            self._slots += [Slot(space, k, None, f"{kind}.{k}") for k, v in space.items() if v is None]
            self._open.append((space, missing.difference(space.keys()), label))
        self._open.append((module.__dict__, missing, label))
        self._closed.append((module._modules, f"submodules of {label}"))
        if isinstance(module._modules, dict):  # those of a ScriptModule are fixed
            self._children.append((module._modules, tuple(module._modules.values()), label))
        self._hooks += [(module.__dict__[key], label) for key in _CALL_HOOKS if key in module.__dict__]

    def _entry(self, slot: Slot, reached: set[int]) -> None:
        """Watch one entry of a namespace, and what is behind it."""
        value = slot.value
        if isinstance(value, torch.Tensor):
            return  # the executor looks at tensors
        plain = isinstance(value, _ATOMS)
        if isinstance(value, (set, frozenset)) or (not plain and (id(slot.owner), slot.key) in self._changed):
            self._refilled.append((slot, template(value)))
            return
        self._slots.append(slot)
        if not plain and not isinstance(value, nn.Module):
            self._reach(value, slot.name, reached)

    def _reach(self, value: Any, name: str, reached: set[int]) -> None:
        """Watch the entries of the containers and plain objects at a value that was read."""
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                self._reach(item, f"{name}[{i}]", reached)
        elif id(value) in self._copies and id(value) not in reached:
            reached.add(id(value))
            copy = self._copies[id(value)][1]
            space = value if isinstance(value, (dict, list)) else value.__dict__
            self._closed.append((space, f"entries of {name}"))
            for key, item in copy.items() if isinstance(copy, dict) else enumerate(copy):
                self._entry(Slot(space, key, item, f"{name}[{key!r}]", value), reached)

    def _classes(self, modules: list[nn.Module], names: dict[int, set[str]]) -> None:
        """Class attributes and methods that were read through instances, for classes that are not torch's."""
        found = {
            (type(module), name)
            for module in modules
            for name in names.get(id(module), ())
            if name not in module.__dict__
        }
        spaces: dict[type, Any] = {}
        for kind, name in sorted(found, key=lambda item: (item[0].__qualname__, item[1])):
            owner = next((c for c in kind.__mro__ if name in c.__dict__), None)
            if owner is not None and owner.__module__.split(".")[0] not in ("torch", "builtins"):
                space = spaces.setdefault(owner, owner.__dict__)
                self._slots.append(Slot(space, name, space[name], f"{owner.__name__}.{name}"))

    # ---- checking ------------------------------------------------------------------------------------------

    def _freeze(self) -> None:
        """Arrange what is watched for the quick check."""
        by_space: dict[int, list[Slot]] = {}
        for slot in self._slots:
            by_space.setdefault(id(slot.space), []).append(slot)
        self._getters: list[Callable[[Any], Any]] = []
        self._values: list[Any] = []
        for slots in by_space.values():
            twice = slots * 2 if len(slots) == 1 else slots  # itemgetter of one key gives no tuple
            self._getters.append(itemgetter(*(slot.key for slot in twice)))
            self._values += [slot.value for slot in twice]
        self._spaces = [slots[0].space for slots in by_space.values()]
        parents = [(space, values) for space, values, _ in self._children if values]
        self._parents = [space for space, _ in parents]
        self._members = [value for _, values in parents for value in values]
        self._filled = [(hooks, list(hooks.items()), name) for hooks, name in self._hooks if hooks]
        containers = [space for space, *_ in (*self._closed, *self._open)]
        self._sizes = list(map(len, containers))
        self._empty = [space for space in (*containers, *(hooks for hooks, _ in self._hooks)) if not space]
        self._sized = list(filter(None, containers))
        self._lengths = list(map(len, self._sized))

    def settle(self) -> None:
        """Take the hooks that are registered now for those of the capture: the forward itself has registered
        them."""
        self._freeze()

    def broken(self) -> str | None:
        """What changed since capture, in words, or None."""
        if self._holds():
            return None
        found = self._look()
        if found is None:
            self._freeze()
        return found

    def _holds(self) -> bool:
        """Whether all objects are the very same; where not, `_look` looks closer."""
        try:
            if any(self._empty) or list(map(len, self._sized)) != self._lengths:
                return False
            members = chain.from_iterable(map(dict.values, self._parents))
            values = chain.from_iterable(map(call, self._getters, self._spaces))
            if not all(map(is_, members, self._members)) or not all(map(is_, values, self._values)):
                return False
        except LookupError:
            return False
        return (
            all(list(hooks.items()) == items for hooks, items, _ in self._filled)
            and all(cell.cell_contents is value for cell, value, _ in self._cells)
            and all(template(slot.now) == expected for slot, expected in self._refilled)
        )

    def _look(self) -> str | None:
        for i, slot in enumerate(self._slots):
            now = slot.now
            if now is _MISSING:
                return f"{slot.name} is gone"
            if not is_same(slot.value, now):
                return f"{slot.name} was {_short(slot.value)} and is {_short(now)}"
            self._slots[i] = slot._replace(value=now)
        for i, (cell, value, name) in enumerate(self._cells):
            if not is_same(value, cell.cell_contents):
                return f"{name} was {_short(value)} and is {_short(cell.cell_contents)}"
            self._cells[i] = (cell, cell.cell_contents, name)
        for slot, expected in self._refilled:
            if template(slot.now) != expected:
                return f"what {slot.name} holds has another structure"
        for (space, name), size in zip(self._closed, self._sizes, strict=False):
            if len(space) != size:
                return f"the number of {name} changed"
        for space, values, name in self._children:
            if not all(map(is_, space.values(), values)):
                return f"submodules of {name} changed"
        for space, missing, name in self._open:
            if new := missing & space.keys():
                return f"{name}.{min(new)} is new"
        before = {id(hooks): items for hooks, items, _ in self._filled}
        for hooks, name in self._hooks:
            if list(hooks.items()) != before.get(id(hooks), []):
                return f"hooks of {name} changed"
        return None


def template(value: Any, depth: int = 4) -> Any:
    """Equal for values that differ in nothing but the contents of their tensors."""
    if isinstance(value, torch.Tensor):
        return torch.Tensor
    if isinstance(value, _ATOMS):
        return type(value), value
    if depth and isinstance(value, (list, tuple)):
        return type(value), [template(item, depth - 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(value)
    fields = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    opaque = isinstance(value, (nn.Module, type)) or callable(value)
    if depth and isinstance(fields, dict) and not opaque:
        return type(value), [(key, template(item, depth - 1)) for key, item in fields.items()]
    return type(value), id(value)


def _short(value: Any) -> str:
    if isinstance(value, (torch.Tensor, nn.Module)):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
