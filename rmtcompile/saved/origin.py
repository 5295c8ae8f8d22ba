"""Origin: what a program depends on, told so that another process can find it again and compare.

A watch (`binding/watch.py`) is made of live objects, so it is never written. What was read, what is changed
and what is kept has names; from these the watch is made anew, by its own code, on the model of the other
process. Then both are told in words, entry by entry, and have to be equal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rmtcompile.binding.captured import Capture, Effect, Leaf
from rmtcompile.binding.objects import ATOMS, BASES, OPAQUE, Path, path_name, walk
from rmtcompile.binding.state import roots_of
from rmtcompile.binding.surroundings import Slot, is_library
from rmtcompile.binding.values import Values
from rmtcompile.binding.watch import ModuleGuard
from rmtcompile.errors import UnsupportedError
from rmtcompile.saved.contents import Contents, kind_of, tensor_text
from rmtcompile.saved.encode import decode, encode
from rmtcompile.saved.fingerprint import fingerprint
from rmtcompile.saved.moment import Moment, digest_of, read, written


@dataclass(frozen=True)
class Origin:
    """What a capture depends on, and names of what it ties to the model; JSON but for `places`.

    Attributes:
        fingerprint: what has to be the same, in sections.
        reads: (module, attribute) pairs that the forward has read.
        changed: (way to an object, key) pairs that it leaves different.
        kept: ways to objects that it leaves somewhere as they are.
        dropped: names of what is not watched, though the code names it.
        state: the watch in words, by entry.
        leaves: by name, the ways to a tensor, the name that code has for it, or the device of one that the
            forward writes out.
        values: the tensors that numbers were read from, with digests of their contents, and where they are.
        places: ways to objects of the model, by identity.
    """

    fingerprint: Mapping[str, Mapping[str, str]]
    reads: list[Any]
    changed: list[Any]
    kept: list[Any]
    dropped: list[str]
    state: dict[str, str]
    leaves: dict[str, Any]
    values: dict[str, Any]
    places: dict[int, Any] = field(default_factory=dict)


def origin_of(
    fn: Callable[..., Any], capture: Capture, leaves: Mapping[str, Leaf], values: Values, options: Any
) -> Origin:
    """Tell what a capture depends on. The model has to be in the state in which it was captured.

    Raises:
        UnsupportedError: something has no name, or contents that cannot be compared.
    """
    unseen = capture.roots.keys() - roots_of(fn).keys()
    if unseen:
        names = sorted(f"{name}: {type(capture.roots[name]).__name__}" for name in unseen)
        raise UnsupportedError("the forward reaches modules by ways that have no name", names)
    moment, guard = Moment(fn), capture.guard
    kept = [moment.places[x] for x in guard.kept if x in moment.places]
    changed = [(moment.places[x], key) for x, key in guard.changed if x in moment.places]
    reads = sorted((moment.labels[x], name) for x, name in guard.reads if x in moment.labels)
    dropped = sorted(_dropped(guard, moment))
    again = _guard(moment, reads, changed, kept, dropped)
    return Origin(
        fingerprint(moment, options),
        [list(pair) for pair in reads],
        sorted(([written(path), encode(key)] for path, key in changed), key=repr),
        sorted((written(path) for path in kept), key=repr),
        dropped,
        told(again, moment),
        {name: _leaf_place(leaf, moment) for name, leaf in leaves.items()},
        {leaf.name: [tensor_text(leaf.fetch()), _leaf_place(leaf, moment)] for leaf in values.leaves},
        _places(moment),
    )


def guard_from(data: Mapping[str, Any], moment: Moment) -> ModuleGuard:
    """The watch of a saved program, on the model of now.

    Raises:
        LookupError: something that the forward has read is not there.
    """
    reads = [(label, name) for label, name in data["reads"]]
    changed = [(read(path), decode(key)) for path, key in data["changed"]]
    return _guard(moment, reads, changed, [read(path) for path in data["kept"]], data["dropped"])


def _guard(moment: Moment, reads: Any, changed: Any, kept: Any, dropped: Any) -> ModuleGuard:
    around, gone = copy.copy(moment.around), set(dropped)
    around.slots = [slot for slot in around.slots if _mark(slot.owner, slot.name) not in gone]
    around.containers = [one for one in around.containers if _mark(one[0], one[2]) not in gone]
    ids = {(id(moment.modules[label]), name) for label, name in reads}
    places = frozenset((id(moment.records[path].target), key) for path, key in changed)
    objects = frozenset(id(moment.records[path].target) for path in kept)
    return ModuleGuard(moment.snapshot, ids, moment.roots, places, around, objects)


def _dropped(guard: ModuleGuard, moment: Moment) -> Iterator[str]:
    """What code names and the watch leaves out, since the forward fills it."""
    entries = guard.entries()
    slots = {(id(slot.owner), slot.step) for slot in entries["slots"]}
    closed = {id(space) for space, _ in entries["closed"]}
    unseen = [(s.owner, s.name) for s in moment.around.slots if (id(s.owner), s.step) not in slots]
    unseen += [(owner, name) for owner, _, name in moment.around.containers if id(owner) not in closed]
    yield from (_mark(owner, name) for owner, name in unseen)


def _mark(owner: Any, name: str) -> str:
    """The name of a slot, with what it is in."""
    where = owner.get("__name__", "") if type(owner) is dict else getattr(owner, "__qualname__", "")
    return f"{where or kind_of(owner)}: {name}"


def _leaf_place(leaf: Leaf, moment: Moment) -> Any:
    """Where another process finds a tensor; for one that the forward writes out, on which device it is."""
    now = leaf.fetch()
    if not leaf.is_constant:
        return {"ways": [written(held.path) for held in moment.owners[id(now)]]}
    found = next((name for name, value in moment.surrounding.items() if value is now), None)
    if found is not None:
        return {"named": found}
    if not leaf.name.startswith("constant_"):  # no literal
        raise UnsupportedError(
            "the forward reads a tensor that is kept where no name leads",
            [f"{leaf.name}: {tensor_text(now)}"],
            "register it as a buffer of a module",
        )
    return {"written": str(now.device)}


def _places(moment: Moment) -> dict[int, Any]:
    """The ways to all objects of the model."""
    return {key: written(path) for key, path in moment.places.items() if _can_be_written(path)}


def _can_be_written(path: Path) -> bool:
    return all(isinstance(key, ATOMS) for _, key in path)


def place_of(origin: Origin, effect: Effect) -> Any:
    """Where an effect leaves its value.

    Raises:
        UnsupportedError: there is no name for it.
    """
    assert effect.change is not None
    place = origin.places.get(id(effect.change.record.target))
    if place is None or effect.change.is_hook:
        raise UnsupportedError(
            "what the forward leaves has no name that another process could find", [effect.name]
        )
    return [place, written((effect.change.step,))[0]]


# ---- in words ----------------------------------------------------------------------------------------------


def told(guard: ModuleGuard, moment: Moment) -> dict[str, str]:
    """A watch in words, by entry."""
    found: dict[str, str] = {}
    contents = moment.told()
    for name, words in _told(guard, moment, contents):
        key, number = name, 2
        while key in found:
            key, number = f"{name} #{number}", number + 1
        found[key] = words
    found["the code of what is read"] = digest_of(contents.code.found)
    return found


def _told(guard: ModuleGuard, moment: Moment, contents: Contents) -> Iterator[tuple[str, str]]:
    entries, text = guard.entries(), contents.text
    for slot in entries["slots"]:
        is_theirs = id(slot.owner) not in moment.places and _is_of_library(slot)
        yield slot.name, kind_of(slot.value) if is_theirs else text(slot.value, slot.name)
    for _, value, name in entries["cells"]:
        yield name, text(value, name)
    for slot in entries["refilled"]:
        yield slot.name, _structure(slot.value, slot.name, contents)
    for slot, shape in entries["tensors"]:
        yield slot.name, f"a tensor of {list(shape) if shape is not None else 'any shape'}"
    for space, name in entries["closed"]:
        yield name, str(len(space))
    for space, missing, label in entries["open"]:
        yield f"names that {label} has not", ", ".join(sorted(missing & space.keys())) or "none"
    for space, children, label in entries["children"]:
        names = (f"{key} {moment.labels.get(id(x), '')}" for key, x in zip(space, children, strict=True))
        yield f"submodules of {label}, by name", ", ".join(names)
    for number, (hooks, label) in enumerate(entries["hooks"]):
        if hooks:
            hooked = ", ".join(text(hook, f"a hook of {label}") for hook in hooks.values())
            yield f"hooks of {label} ({number})", hooked
    for ways in entries["shared"]:
        words = (f"{moment.labels.get(id(module), '?')}: {path_name(way)}" for module, way in ways)
        yield "an object that lies in several places", "; ".join(words)


def _is_of_library(slot: Slot) -> bool:
    """Whether it is an object of an installed package's own, for which its version stands."""
    owner = slot.owner.get("__name__", "?") if type(slot.owner) is dict else type(slot.owner).__module__
    if not is_library(str(owner).split(".")[0]):
        return False
    return not isinstance(slot.value, (*ATOMS, *OPAQUE, *BASES[:-1], torch.Tensor)) and not callable(
        slot.value
    )


def _structure(value: Any, name: str, contents: Contents) -> str:
    """What a slot holds that the forward fills anew, but for the contents of its tensors."""
    said = []
    for path, item in walk(value):
        if isinstance(item, torch.Tensor):
            words = "a tensor"
        elif isinstance(item, (*ATOMS, nn.Module)) or callable(item):
            words = contents.text(item, name)
        else:
            words = type(item).__qualname__
        said.append(f"{path_name(path)} {words}")
    return "; ".join(sorted(said))


__all__ = ["Origin", "guard_from", "origin_of", "place_of", "told"]
