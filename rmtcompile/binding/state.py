"""What a forward leaves behind in the modules it runs: snapshot, difference, restoration, replay.

Models keep state in plain attributes, containers, buffers and cache objects, and count in Python integers.
Tracing runs the forward on fake tensors, so every one of them must be put back afterwards; and what the
forward would have left behind is part of the program's result, so it has to be described well enough to be
left again by the compiled program.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from rmtcompile.binding.code import globals_in
from rmtcompile.binding.objects import (
    ATOMS,
    DELETED,
    LIMIT,
    Path,
    Step,
    base_of,
    closed_over,
    contains_tensor,
    held,
    is_fixed,
    is_leaf,
    is_same,
    items_of,
    now,
    parts,
    path_name,
    put,
    put_items,
    too_large,
    walk,
)

_NAMESPACES = ("_parameters", "_buffers", "_modules")
_WHOLE: Step = ("all", None)


class Was:
    """One object as it was: the object itself, the path to it, and what it held.

    Attributes:
        items: its items where it is a container that can be filled anew.
    """

    def __init__(self, target: Any, path: Path) -> None:
        self.target, self.path = target, path
        self.copy = held(target) if isinstance(target, nn.Module) else parts(target)
        can_fill = base_of(type(target)) is not object and not is_fixed(target)
        self.items = items_of(target) if can_fill else None

    @property
    def is_changed(self) -> bool:
        """Whether it holds anything else now."""
        held_now = held(self.target)
        if held_now.keys() != self.copy.keys():
            return True
        return not all(is_same(value, held_now[step]) for step, value in self.copy.items())

    def restore(self) -> None:
        """Put back what it held, where that is not there any more."""
        target, held_now = self.target, held(self.target)
        if self.items is not None and _other_items(self.items, items_of(target)):
            put_items(target, self.items)
        for step in held_now.keys() - self.copy.keys():
            if not _is_item(step):
                put(target, step, DELETED)
        for step, value in self.copy.items():
            if now(target, step) is not value:
                put(target, step, value)


class _Record(Was):
    """An object that a module holds.

    Attributes:
        routes: further ways to it, from modules.
    """

    def __init__(self, target: Any, path: Path, module: nn.Module) -> None:
        super().__init__(target, path)
        self.module = module
        self.routes: list[tuple[nn.Module, Path]] = []

    @property
    def way(self) -> Path | None:
        """From the module on, or None for the namespaces that torch keeps in every module: no forward puts
        another dict in their place."""
        return None if len(self.path) > 1 and self.path[1][1] in _NAMESPACES else self.path[1:]


class Held(NamedTuple):
    """A tensor that a module keeps, and where: `holder[key]` or `holder.key`, or `way` from a module on,
    through containers that a forward may replace; `path` is the whole way, from the module's name on."""

    tensor: torch.Tensor
    name: str
    holder: Any
    key: Any
    way: Path
    path: Path = ()


class Snapshot:
    """The state of a set of modules, taken before a forward, to be compared with and put back after it.

    Args:
        roots: modules by the name under which their paths are reported ("" for the model itself).
    """

    def __init__(self, roots: dict[str, nn.Module]) -> None:
        self._records: dict[int, _Record] = {}
        for name, module in roots.items():
            self.add(name, module)

    def add(self, name: str, root: nn.Module) -> None:
        """Record `root` and everything below it that is not recorded yet; modules under their own paths."""
        for path, module in root.named_modules():
            if id(module) not in self._records:
                self._record(module, f"{name}.{path}" if name and path else name or path)

    def _record(self, module: nn.Module, name: str) -> None:
        stack: list[tuple[Path, Any]] = [((("module", name),), module)]
        while stack:
            path, value = stack.pop()
            if is_leaf(value) and value is not module:
                continue
            known = self._records.get(id(value))
            if known is not None:
                if value is not module:
                    known.routes.append((module, path[1:]))
                continue
            record = self._records[id(value)] = _Record(value, path, module)
            if len(self._records) > LIMIT:
                raise too_large(path)
            stack += [((*path, step), item) for step, item in reversed(record.copy.items())]

    def knows(self, value: object) -> bool:
        """Whether it was there before the forward."""
        return id(value) in self._records

    def restore(self) -> None:
        """Put every recorded object back as it was, value by value, keeping the objects' identity."""
        for record in self._records.values():
            record.restore()

    def changes(self, written: Collection[tuple[int, str]] = ()) -> list[Change]:
        """What differs now from the snapshot, one entry a value, in a deterministic order.

        Args:
            written: (id of module, attribute) pairs that were assigned; a flag or counter among them counts
                as changed also where it was assigned the value it had.
        """
        found: list[Change] = []
        for record in self._records.values():
            before, after = record.copy, held(record.target)
            whole = record.items is not None and _is_new_whole(record.items, items_of(record.target))
            if whole:
                found.append(Change(record, _WHOLE, items_of(record.target)))
            for step, new in after.items():
                if whole and _is_item(step):
                    continue
                was_set = step[0] == "attr" and (id(record.target), step[1]) in written
                again = was_set and isinstance(new, ATOMS)
                if step not in before or again or not is_same(before[step], new):
                    found.append(Change(record, step, new))
            gone = (step for step in before if step not in after and not (whole and _is_item(step)))
            found += [Change(record, step, DELETED) for step in gone]
        return [change for change in found if change.step[0] not in ("referent", "member")]

    def records(self) -> Iterator[_Record]:
        """All that is recorded: an object, the path to it, and what it held."""
        return iter(self._records.values())

    def holders(self) -> Iterator[tuple[Any, dict[Step, Any]]]:
        """(object, what it held) of every record."""
        for record in self._records.values():
            yield record.target, record.copy

    def shared(self) -> Iterator[list[tuple[nn.Module, Path]]]:
        """The ways to each object with tensors inside that several ways lead to."""
        for record in self._records.values():
            if record.routes and record.way is not None and contains_tensor(record.target):
                yield [(record.module, record.way), *record.routes]

    def tensors(self) -> Iterator[Held]:
        """Every recorded tensor, and where it is held."""
        for record in self._records.values():
            for step, value in record.copy.items():
                if isinstance(value, torch.Tensor):
                    path = (*record.path, step)
                    name = path_name(path)
                    if record.way is None or record.target is record.module:
                        yield Held(value, name, record.target, step[1], (), path)
                    else:
                        yield Held(value, name, record.module, step[1], (*record.way, step), path)


def _is_item(step: Step) -> bool:
    return step[0] in ("item", "member")


def _is_key(key: Any, other: Any) -> bool:
    return key is other or (not isinstance(key, torch.Tensor) and type(key) is type(other) and key == other)


def _other_items(before: Any, after: Any) -> bool:
    """Whether a container has other items, or its keys another order."""
    if isinstance(before, set):
        return {id(item) for item in before} != {id(item) for item in after}
    if len(before) != len(after):
        return True
    if isinstance(before, dict) and not all(map(_is_key, before, after)):
        return True
    values = (before.values(), after.values()) if isinstance(before, dict) else (before, after)
    return any(a is not b for a, b in zip(*values, strict=True))


def _is_new_whole(before: Any, after: Any) -> bool:
    """Whether a container has so other items that they are left as a whole: a list of another length, a set
    of other elements, a dict whose keys have come into another order."""
    if isinstance(before, set):
        atoms = ({item for item in items if isinstance(item, ATOMS)} for items in (before, after))
        rest = ({id(item) for item in items if not isinstance(item, ATOMS)} for items in (before, after))
        return len({frozenset(found) for found in atoms}) > 1 or len({frozenset(found) for found in rest}) > 1
    if isinstance(before, list):
        return len(before) != len(after)
    kept = [key for key in before if key in after]
    return not all(map(_is_key, kept, after))  # new ones come last


class Contents:
    """Contents of the tensors of a snapshot, to be put back after a forward on fake tensors.

    A write that reads no input (`buffer.zero_()`, `count.add_(1)`) is made for real even then.
    Large parameters are not kept: a forward that writes one is refused.
    """

    SMALL = 1 << 16

    def __init__(self, snapshot: Snapshot) -> None:
        self._kept: list[tuple[torch.Tensor, int | None, torch.Tensor | None, str]] = []
        seen: set[int] = set()
        for tensor, name, *_ in snapshot.tensors():
            if isinstance(tensor, FakeTensor) or nn.parameter.is_lazy(tensor) or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            keep = tensor.numel() <= self.SMALL or not isinstance(tensor, nn.Parameter)
            content = tensor.detach().clone() if keep else None
            self._kept.append((tensor, _version(tensor), content, name))

    def restore(self) -> list[str]:
        """Put back what was written; gives the names of what was not kept."""
        lost = []
        with torch.no_grad():
            for tensor, version, content, name in self._kept:
                if version is None and content is not None:  # it does not count its writes
                    with torch.inference_mode():
                        tensor.copy_(content)
                if _version(tensor) == version:
                    continue
                if content is None:
                    lost.append(name)
                else:
                    tensor.copy_(content)
        return lost


def _version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written; None for those made in inference mode, which do not count."""
    try:
        return tensor._version
    except RuntimeError:
        return None


@dataclass(frozen=True)
class Change:
    """One value that a forward left different: where, and the new value."""

    record: _Record
    step: Step
    value: Any

    @property
    def is_hook(self) -> bool:
        """Whether the forward registered or removed a hook; hooks are numbered anew each time."""
        return any(isinstance(key, str) and key.endswith("_hooks") for _, key in self.record.path)

    @property
    def name(self) -> str:
        return path_name(self.record.path if self.is_hook else (*self.record.path, self.step))

    def now(self) -> Any:
        """What is there now: a value, a copy of all items, or DELETED."""
        return items_of(self.record.target) if self.step == _WHOLE else now(self.record.target, self.step)

    def apply(self, value: Any) -> None:
        """Leave `value` where the forward left its own."""
        if self.step == _WHOLE:
            put_items(self.record.target, value)
        else:
            put(self.record.target, self.step, value)


# ---- what a callable reaches -------------------------------------------------------------------------------


def roots_of(fn: Callable[..., Any]) -> dict[str, nn.Module]:
    """The modules that a callable can reach: itself, its bound object, its closure, its defaults, a partial's
    parts, and those that lie, registered nowhere, in the attributes of these.

    Returns:
        Modules by name: "" for a module itself, else the name under which the callable refers to it.
    """
    found: dict[str, nn.Module] = {}
    inside: set[int] = set()  # all that is below what was found

    def into(value: Any) -> dict[Step, Any]:
        return held(value) if isinstance(value, nn.Module) else _referred(value)

    for path, value in walk(fn, into=into):
        if isinstance(value, nn.Module) and id(value) not in inside:
            name = path_name(path)
            found[name if name not in found else f"{name} #{len(found)}"] = value
            inside |= {id(module) for module in value.modules()}
    return found


CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked_around(fn: Callable[..., Any]) -> Any:
    """The module whose hooks run around a callable, not inside of it: it is that module's own method."""
    return fn.__self__ if isinstance(fn, types.MethodType) else None


def _referred(value: Any) -> dict[Step, Any]:
    """What a function, a method or a plain object refers to."""
    if isinstance(value, types.MethodType):
        return {("attr", ""): value.__self__, ("item", ""): value.__func__}
    if isinstance(value, types.FunctionType):
        spaces = value.__globals__
        used = {("attr", name): spaces[name] for name in sorted(globals_in(value.__code__)) if name in spaces}
        return {**closed_over(value), **used}
    if type(value).__module__.split(".")[0] == "torch":
        return {}
    return parts(value)
