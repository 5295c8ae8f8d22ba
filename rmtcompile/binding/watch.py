"""Watch: the Python state that a captured forward has read, and whether it is still the same.

    what was read                          what is watched
    layer.scale, self.act, self.config     the slot holds the same object, or an equal number or string
    a container or object behind it        its entries likewise, in any depth, and how many there are
    a name that the instance had not       that it still has none, and what its class has under that name
    children and hooks of every module     entries, and how many there are
    an integer that the forward counts on  that it is the one which is asked for
    a slot that the forward refills        the structure of what it holds
    an object in several places            that it still lies in all of them
    closure and globals of a callable      as slots

A check of everything takes a fraction of a millisecond: identities and sizes are compared in bulk, and only
what differs there is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from operator import call, is_, itemgetter
from typing import Any

import torch
from torch import nn

from rmtcompile.binding.objects import (
    ATOMS,
    DELETED,
    SETS,
    Opaque,
    Path,
    base_of,
    contains_tensor,
    fields_of,
    get,
    is_fixed,
    is_iterator,
    is_leaf,
    is_same,
    is_sealed,
    parts,
)
from rmtcompile.binding.state import CALL_HOOKS, Snapshot
from rmtcompile.binding.surroundings import Slot, Surroundings
from rmtcompile.binding.templates import is_number, template
from rmtcompile.errors import CaptureError

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
        kept: identities of objects that the forward leaves somewhere as they are.
        sums: (id of module, attribute) pairs of integers of which the forward makes nothing but sums.

    Attributes:
        counters: names of the slots whose numbers the forward reads and leaves different: its next call goes
            on from them.
        numbers: the integers among these that lie in a slot of their own, as they were at the capture. A
            program may be for others of them; see `broken`.
        are_sums: for each of `numbers`, whether the forward makes nothing but sums of it.
        reads, changed, kept: as given.

    Raises:
        CaptureError: the forward has read what cannot be watched.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        reads: set[tuple[int, str]],
        roots: dict[str, nn.Module],
        changed: frozenset[tuple[int, Any]] = frozenset(),
        around: Surroundings | None = None,
        kept: frozenset[int] = frozenset(),
        sums: Collection[tuple[int, str]] = (),
    ) -> None:
        self._slots: list[Slot] = list(around.slots) if around is not None else []
        self._cells = list(around.cells) if around is not None else []
        self._refilled: list[Slot] = []
        self._counting: list[Slot] = []  # numbers that the forward leaves different
        self._numbers: list[Slot] = []  # the integers among these
        self._tensors: list[tuple[Slot, torch.Size | None]] = []  # None where the forward leaves another one
        self._closed: list[tuple[Any, str]] = []  # containers whose number of entries is fixed
        self._open: list[tuple[Any, set[str], str]] = []  # namespaces in which these names are missing
        self._children: list[tuple[dict[str, Any], tuple[Any, ...], str]] = []
        self._hooks = [(getattr(nn.modules.module, key), "all modules") for key in _GLOBAL_HOOKS]
        self.reads, self.changed, self.kept = reads, changed, kept
        self._outer = around.outer if around is not None else None
        self._copies = {id(holder): copy for holder, copy in snapshot.holders()}
        self._shared = list(snapshot.shared())
        if around is not None:
            self._closed += [(owner, f"entries of {name}") for owner, _, name in around.containers]
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
        self._structure = template([slot.value for slot in self._refilled])
        self.numbers: tuple[int, ...] = tuple(slot.value for slot in self._numbers)
        self.are_sums = tuple((id(slot.owner), slot.step[1]) in sums for slot in self._numbers)
        self.counters = tuple(slot.name for slot in self._counting) + tuple(
            slot.name for slot in self._refilled if any(map(is_number, template(slot.value)))
        )
        self._freeze()

    # ---- what is watched -----------------------------------------------------------------------------------

    def _module(self, module: nn.Module, names: set[str], label: str, reached: set[int]) -> None:
        kept = {key: value for (_, key), value in self._copies[id(module)].items()}
        kind = type(module).__name__
        missing = names - kept.keys()
        for key in sorted(names & kept.keys() - NAMESPACES):
            self._reach(Slot(module, ("attr", key), kept[key], f"{kind}.{key}"), reached)
        for space in (module._parameters, module._buffers):
            absent = [key for key, value in space.items() if value is None]
            self._slots += [Slot(space, ("item", key), None, f"{kind}.{key}") for key in absent]
            self._open.append((space, missing.difference(space.keys()), label))
        self._open.append((module.__dict__, missing, label))
        self._closed.append((module._modules, f"submodules of {label}"))
        if isinstance(module._modules, dict):  # those of a ScriptModule are fixed
            self._children.append((module._modules, tuple(module._modules.values()), label))
        stand_ins = [child for child in module._modules.values() if isinstance(child, Opaque)]
        own = () if module is self._outer else (module,)
        for called in (*own, *stand_ins):  # a stand-in has hooks of its own
            self._hooks += [(called.__dict__[key], label) for key in CALL_HOOKS if key in called.__dict__]

    def _reach(self, slot: Slot, reached: set[int]) -> None:
        """Watch one entry, and all that is behind it."""
        stack = [slot]
        while stack:
            slot = stack.pop()
            value = slot.value
            if not self._watch(slot) or id(value) in reached:
                continue
            reached.add(id(value))
            if is_iterator(value) or (is_sealed(value) and contains_tensor(value) and not parts(value)):
                raise _unwatchable(slot)
            copy = self._copies.get(id(value), {})
            if not is_fixed(value):
                self._closed += [(space, f"entries of {slot.name}") for space in spaces_of(value)]
            stack += [
                Slot(value, step, item, f"{slot.name}[{step[1]!r}]") for step, item in reversed(copy.items())
            ]

    def _watch(self, slot: Slot) -> bool:
        """Watch one entry; whether what is behind it is to be watched, too."""
        value = slot.value
        is_changed = (id(slot.owner), slot.step[1]) in self.changed
        if isinstance(value, torch.Tensor):  # the executor looks at those that the graph reads
            if not isinstance(slot.owner, (tuple, *SETS)):
                self._tensors.append((slot, None if is_changed else value.shape))
            return False
        if is_changed and type(value) in (int, float):
            self._counting.append(slot)
        is_free = not isinstance(value, ATOMS) and is_changed
        if base_of(type(value)) in SETS or (is_free and id(value) not in self.kept):
            self._refilled.append(slot)
            return False
        if slot.step[0] != "member" and not isinstance(slot.owner, (tuple, *SETS)):
            (self._numbers if is_changed and type(value) is int else self._slots).append(slot)
        return not is_leaf(value)

    def _classes(self, modules: list[nn.Module], names: dict[int, set[str]]) -> None:
        """Class attributes and methods that were read through instances, for classes that are not torch's."""
        found = {
            (type(module), name)
            for module in modules
            for name in names.get(id(module), ())
            if name not in module.__dict__
        }
        for kind, name in sorted(found, key=lambda item: (item[0].__qualname__, item[1])):
            owner = next((c for c in kind.__mro__ if name in c.__dict__), None)
            if owner is not None and owner.__module__.split(".")[0] not in ("torch", "builtins"):
                value = owner.__dict__[name]
                self._slots.append(Slot(owner, ("attr", name), value, f"{owner.__name__}.{name}"))

    # ---- checking ------------------------------------------------------------------------------------------

    def _freeze(self) -> None:
        """Arrange what is watched for the quick check."""
        self._getters, self._spaces, slots = _getters(self._slots)
        self._values = [slot.value for slot in slots]
        shapes = {id(slot): shape for slot, shape in self._tensors}
        self._tensor_getters, self._tensor_spaces, slots = _getters([slot for slot, _ in self._tensors])
        self._shapes = [shapes[id(slot)] for slot in slots]
        parents = [(space, values) for space, values, _ in self._children if values]
        self._parents = [space for space, _ in parents]
        self._members = [value for _, values in parents for value in values]
        self._filled = [(hooks, list(hooks.items()), name) for hooks, name in self._hooks if hooks]
        containers = [space for space, *_ in (*self._closed, *self._open)]
        self._sizes = list(map(len, containers))
        self._empty = [space for space in (*containers, *(hooks for hooks, _ in self._hooks)) if not space]
        self._sized = list(filter(None, containers))
        self._lengths = list(map(len, self._sized))

    def entries(self) -> dict[str, Any]:
        """All that is watched, by kind, for descriptions that another process can compare."""
        return {
            "slots": self._slots + self._numbers,
            "cells": self._cells, "refilled": self._refilled, "tensors": self._tensors,
            "closed": self._closed, "open": self._open, "children": self._children, "hooks": self._hooks,
            "shared": self._shared,
        }  # fmt: skip

    def settle(self) -> None:
        """Take the hooks that are registered now for those of the capture: the forward itself has registered
        them."""
        self._freeze()

    @property
    def number_names(self) -> tuple[str, ...]:
        """Of the slots of `numbers`."""
        return tuple(slot.name for slot in self._numbers)

    def number_places(self) -> list[tuple[nn.Module, str]]:
        """Those that are attributes of modules."""
        return [(slot.owner, slot.step[1]) for slot in self._numbers if isinstance(slot.owner, nn.Module)]

    def numbers_now(self) -> tuple[Any, ...]:
        """What lies where `numbers` lay."""
        return tuple(slot.now for slot in self._numbers)

    def broken(self, numbers: Sequence[Any] | None = None) -> str | None:
        """What changed since capture, in words, or None.

        Args:
            numbers: what is to lie where `numbers` lay; those themselves if None.
        """
        expected = self.numbers if numbers is None else numbers
        for slot, number in zip(self._numbers, expected, strict=True):
            if type(slot.now) is not type(number) or slot.now != number:
                return f"{slot.name} was {number} and is {_short(slot.now)}"
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
            and self._are_tensors()
            and self._refilled_alike()
            and all(map(_lie_together, self._shared))
        )

    def _are_tensors(self) -> bool:
        """Whether tensors are where some were, though the graph may have read no more than their shapes."""
        found = list(chain.from_iterable(map(call, self._tensor_getters, self._tensor_spaces)))
        if not all(isinstance(value, torch.Tensor) for value in found):
            return False
        return all(value.shape == shape for value, shape in zip(found, self._shapes, strict=True) if shape)

    def _refilled_alike(self) -> bool:
        return not self._refilled or template([slot.now for slot in self._refilled]) == self._structure

    def _look(self) -> str | None:
        for i, slot in enumerate(self._slots):
            now = slot.now
            if now is DELETED:
                return f"{slot.name} is gone"
            if not is_same(slot.value, now):
                return f"{slot.name} was {_short(slot.value)} and is {_short(now)}"
            self._slots[i] = slot._replace(value=now)
        for i, (cell, value, name) in enumerate(self._cells):
            if not is_same(value, cell.cell_contents):
                return f"{name} was {_short(value)} and is {_short(cell.cell_contents)}"
            self._cells[i] = (cell, cell.cell_contents, name)
        for slot, shape in self._tensors:
            if not isinstance(slot.now, torch.Tensor) or (shape and slot.now.shape != shape):
                return f"{slot.name} was a tensor of another shape, or is none any more"
        if not self._refilled_alike():
            return f"what {self._refilled[0].name} or another slot holds has another structure"
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
        if not all(map(_lie_together, self._shared)):
            return "an object that lay in several places does not any more"
        return None


def _getters(slots: Sequence[Slot]) -> tuple[list[Callable[[Any], Any]], list[Any], list[Slot]]:
    """What reads many slots at once: a getter for each namespace, the namespaces, the slots in that order."""
    by_space: dict[tuple[int, str], list[Slot]] = {}
    for slot in slots:
        by_space.setdefault((id(slot.owner), slot.step[0]), []).append(slot)
    # itemgetter of one key gives no tuple
    twice = [mine * 2 if len(mine) == 1 else mine for mine in by_space.values()]
    getters: list[Callable[[Any], Any]] = [itemgetter(*(slot.step[1] for slot in mine)) for mine in twice]
    spaces = [space_of(mine[0].owner, mine[0].step[0]) for mine in twice]
    return getters, spaces, list(chain.from_iterable(twice))


class View:
    """The slots, or the referent, of an object, as a namespace."""

    def __init__(self, owner: Any, kind: str) -> None:
        self._owner, self._kind = owner, kind

    def __getitem__(self, key: Any) -> Any:
        return get(self._owner, (self._kind, key))

    def __len__(self) -> int:
        return sum(step[0] == self._kind for step in parts(self._owner))


def space_of(owner: Any, kind: str) -> Any:
    """What `space[key]` gives for steps of one kind, quickly."""
    return owner.__dict__ if kind == "attr" else owner if kind == "item" else View(owner, kind)


def spaces_of(value: Any) -> list[Any]:
    """All namespaces of an object."""
    kinds = dict.fromkeys(step[0] for step in parts(value))
    if fields_of(value) is not None:
        kinds["attr"] = None
    if base_of(type(value)) is not object:
        kinds["item"] = None
    return [space_of(value, kind) for kind in kinds]


def _lie_together(ways: Sequence[tuple[nn.Module, Path]]) -> bool:
    """Whether all ways lead to one object."""
    found = [_follow(module, way) for module, way in ways]
    return all(other is found[0] for other in found)


def _follow(value: Any, way: Path) -> Any:
    try:
        for step in way:
            value = get(value, step)
    except (LookupError, AttributeError, TypeError):
        return DELETED
    return value


def _unwatchable(slot: Slot) -> CaptureError:
    kind = type(slot.value)
    return CaptureError(
        "the forward reads an object whose state cannot be seen",
        [f"{slot.name}: {kind.__module__}.{kind.__qualname__}"],
        "keep a list, or the tensors themselves, in its place",
    )


def _short(value: Any) -> str:
    if isinstance(value, (torch.Tensor, nn.Module)):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
