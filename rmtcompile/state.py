"""What a forward leaves behind in the modules it runs: snapshot, difference, restoration, replay.

Models keep state in plain attributes, lists, dicts, buffers and cache objects, and count in Python integers.
Tracing runs the forward on fake tensors, so every one of them must be put back afterwards; and what the
forward would have left behind is part of the program's result, so it has to be described well enough to be
left again by the compiled program.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

Path = tuple[tuple[str, Any], ...]  # (("attr" | "item", key), ...) from an object down to one value

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_OPAQUE = (
    type,
    types.FunctionType,
    types.MethodType,
    types.ModuleType,
    types.BuiltinFunctionType,
    torch.Generator,
)


def _fields(value: object) -> dict[str, Any] | None:
    """The mutable namespace of an object that may hold state, or None where there is nothing to look into."""
    if isinstance(value, (torch.Tensor, *_ATOMS, *_OPAQUE)) or value is None:
        return None
    fields = getattr(value, "__dict__", None)
    return fields if isinstance(fields, dict) else None


@dataclass
class _Record:
    """One container as it was: the object itself, a shallow copy of what it held, and the module that holds
    it."""

    target: Any
    path: Path
    copy: Any
    module: nn.Module

    @property
    def is_replaceable(self) -> bool:
        """Whether it sits in an attribute, where a forward may put another one in its place."""
        return len(self.path) > 1 and self.path[1][1] not in ("_parameters", "_buffers", "_modules")


class Held(NamedTuple):
    """A tensor that a module keeps, and where: `holder[key]` or `holder.key`, or `way` from a module on,
    through containers that a forward may replace."""

    tensor: torch.Tensor
    name: str
    holder: Any
    key: Any
    way: Path


class Snapshot:
    """The state of a set of modules, taken before a forward, to be compared with and put back after it.

    Args:
        roots: modules by the name under which their paths are reported ("" for the model itself).
    """

    MAX_DEPTH = 6

    def __init__(self, roots: dict[str, nn.Module]) -> None:
        self._records: dict[int, _Record] = {}
        for name, module in roots.items():
            self.add(name, module)

    def add(self, name: str, root: nn.Module) -> None:
        """Record `root` and everything below it that is not recorded yet."""
        for path, module in root.named_modules():
            full = f"{name}.{path}" if name and path else name or path
            self._record(module, ((("module", full)),), 0, module)

    def _record(self, value: Any, path: Path, depth: int, module: nn.Module) -> None:
        if id(value) in self._records or depth > self.MAX_DEPTH:
            return
        if isinstance(value, nn.Module) and depth > 0:
            return  # modules are recorded by `add`, under their own path
        if isinstance(value, (dict, list)):
            self._records[id(value)] = _Record(value, path, value.copy(), module)
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                self._record(item, (*path, ("item", key)), depth + 1, module)
        elif isinstance(value, tuple):
            for key, item in enumerate(value):
                self._record(item, (*path, ("item", key)), depth + 1, module)
        elif (fields := _fields(value)) is not None:
            self._records[id(value)] = _Record(value, path, fields.copy(), module)
            for key, item in fields.items():
                self._record(item, (*path, ("attr", key)), depth + 1, module)

    def restore(self) -> None:
        """Put every recorded container back as it was, value by value, keeping the containers' identity."""
        for record in self._records.values():
            target = record.target
            if isinstance(target, list):
                target[:] = record.copy
            else:
                fields = target if isinstance(target, dict) else target.__dict__
                fields.clear()
                fields.update(record.copy)

    def changes(self, written: Collection[tuple[int, str]] = ()) -> list[Change]:
        """What differs now from the snapshot, one entry a value, in a deterministic order.

        Args:
            written: (id of module, attribute) pairs that were assigned; a flag or counter among them counts
                as changed also where it was assigned the value it had.
        """
        found: list[Change] = []
        for record in self._records.values():
            target = record.target
            if isinstance(target, list):
                if len(target) == len(record.copy):
                    pairs = [
                        (i, old, new) for i, (old, new) in enumerate(zip(record.copy, target, strict=True))
                    ]
                    found += [Change(record, ("item", i), new) for i, old, new in pairs if _differs(old, new)]
                else:
                    found.append(Change(record, ("all", None), list(target)))
                continue
            kind, fields = ("item", target) if isinstance(target, dict) else ("attr", target.__dict__)
            for key, new in fields.items():
                again = isinstance(new, _ATOMS) and (id(target), key) in written
                if key not in record.copy or again or _differs(record.copy[key], new):
                    found.append(Change(record, (kind, key), new))
            found += [Change(record, (kind, key), DELETED) for key in record.copy if key not in fields]
        return found

    def atoms(self) -> dict[tuple[int, Any], Any]:
        """Every recorded Python atom (flags, counters, names): what the forward may have branched on."""
        return {
            (key, name): value
            for key, record in self._records.items()
            for name, value in _entries(record.copy)
            if isinstance(value, _ATOMS)
        }

    def holders(self) -> Iterator[tuple[Any, Any]]:
        """(container, copy of its content) of every record."""
        for record in self._records.values():
            yield record.target, record.copy

    def tensors(self) -> Iterator[Held]:
        """Every recorded tensor, and where it is held."""
        for record in self._records.values():
            kind = "item" if isinstance(record.target, (dict, list)) else "attr"
            for key, value in _entries(record.copy):
                if isinstance(value, torch.Tensor):
                    name = path_name((*record.path, ("item", key)))
                    way = (*record.path[1:], (kind, key)) if record.is_replaceable else ()
                    yield Held(value, name, record.module if way else record.target, key, way)


class Contents:
    """Contents of the tensors of a snapshot, to be put back after a forward on fake tensors.

    A write that reads no input (`buffer.zero_()`, `count.add_(1)`) is made for real even then.
    Large parameters are not kept: a forward that writes one is refused.
    """

    SMALL = 1 << 16

    def __init__(self, snapshot: Snapshot) -> None:
        self._kept: list[tuple[torch.Tensor, int | None, torch.Tensor | None, str]] = []
        for tensor, name, *_ in snapshot.tensors():
            if isinstance(tensor, FakeTensor) or nn.parameter.is_lazy(tensor):
                continue
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


class _Deleted:
    def __repr__(self) -> str:
        return "DELETED"


DELETED = _Deleted()


def _entries(copy: Any) -> Iterator[tuple[Any, Any]]:
    yield from copy.items() if isinstance(copy, dict) else enumerate(copy)


def _differs(old: Any, new: Any) -> bool:
    if isinstance(old, _ATOMS) and isinstance(new, _ATOMS):
        return type(old) is not type(new) or old != new
    return old is not new


@dataclass(frozen=True)
class Change:
    """One value that a forward left different: where, and the new value."""

    record: _Record
    step: tuple[str, Any]
    value: Any

    @property
    def is_hook(self) -> bool:
        """Whether the forward registered or removed a hook; hooks are numbered anew each time."""
        return any(isinstance(key, str) and key.endswith("_hooks") for _, key in self.record.path)

    @property
    def name(self) -> str:
        return path_name(self.record.path if self.is_hook else (*self.record.path, self.step))

    def now(self) -> Any:
        """What is there now: a value, or DELETED."""
        kind, key = self.step
        target = self.record.target
        if kind == "all":
            return list(target)
        if isinstance(target, list):
            return target[key] if key < len(target) else DELETED
        fields = target if kind == "item" else target.__dict__
        return fields.get(key, DELETED)

    def apply(self, value: Any) -> None:
        """Leave `value` where the forward left its own."""
        put(self.record.target, self.step, value)


def put(target: Any, step: tuple[str, Any], value: Any) -> None:
    """Set one attribute or item, or a list's whole content."""
    kind, key = step
    if kind == "all":
        target[:] = value
    elif isinstance(target, nn.Module) and kind == "attr":
        target.__dict__[key] = value
    elif kind == "attr":
        object.__setattr__(target, key, value) if value is not DELETED else target.__dict__.pop(key, None)
    elif value is DELETED:
        target.pop(key, None)
    else:
        target[key] = value


def path_name(path: Path) -> str:
    """`memory_cell.layers.0.W_mem` from a path; the namespaces in which torch keeps parameters and buffers
    are left out."""
    parts: list[str] = []
    for kind, key in path:
        if kind == "all" or key in ("_parameters", "_buffers", ""):
            continue
        parts.append(
            f"[{key!r}]" if kind == "item" and not isinstance(key, str) else f"{'.' if parts else ''}{key}"
        )
    return "".join(parts)


def contains_tensor(value: Any, depth: int = 4) -> bool:
    """Whether `value` holds a tensor somewhere inside, attributes of plain objects included."""
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0 or isinstance(value, (*_ATOMS, *_OPAQUE, nn.Module)):
        return False
    if isinstance(value, dict):
        return any(contains_tensor(item, depth - 1) for item in value.values())
    if isinstance(value, (list, tuple, set)):
        return any(contains_tensor(item, depth - 1) for item in value)
    fields = _fields(value)
    return fields is not None and any(contains_tensor(item, depth - 1) for item in fields.values())


def roots_of(fn: Callable[..., Any]) -> dict[str, nn.Module]:
    """The modules that a callable can reach: itself, its bound object, its closure, its defaults, a partial's
    parts.

    Returns:
        Modules by name: "" for a module itself, else the name under which the callable refers to it.
    """
    if isinstance(fn, nn.Module):
        return {"": fn}
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(name: str, value: Any, depth: int) -> None:
        if id(value) in seen or depth > 4:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.setdefault(name, value)
        elif isinstance(value, types.MethodType):
            visit(name, value.__self__, depth + 1)
            visit(name, value.__func__, depth + 1)
        elif isinstance(value, types.FunctionType):
            names = set(value.__code__.co_names)
            for code in (c for c in value.__code__.co_consts if isinstance(c, types.CodeType)):
                names |= set(code.co_names)
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            for inner, cell in cells:
                try:
                    visit(inner, cell.cell_contents, depth + 1)
                except ValueError:  # a cell that is not filled yet
                    continue
            for inner in names & value.__globals__.keys():
                visit(inner, value.__globals__[inner], depth + 1)
            for inner, item in zip(("default",) * 99, value.__defaults__ or (), strict=False):
                visit(inner, item, depth + 1)
        elif isinstance(value, functools.partial):
            for item in (value.func, *value.args, *value.keywords.values()):
                visit(name, item, depth + 1)
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                visit(f"{name}[{i}]", item, depth + 1)
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(f"{name}[{key!r}]", item, depth + 1)
        elif type(value).__module__ not in ("builtins", "torch") and (fields := _fields(value)) is not None:
            for key, item in fields.items():
                visit(f"{name}.{key}", item, depth + 1)

    visit("", fn, 0)
    return found


def flatten_new(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Flatten a value that a forward left behind (a tensor, or a container of tensors)."""
    return pytree.tree_flatten(value)
