"""Encode: values of a program as JSON, and back.

    Lane("h", (0, 1), None, ...)  ->  {"Lane": {"name": "h", "layers": {"tuple": [0, 1]}, ...}}

Dataclasses that are known here are written field by field. Graphs are not written: what runs is the emitted
source. Classes and functions are written by the name under which they are imported. What belongs to the model
is written by whoever knows a name for it (`refer`).
"""

from __future__ import annotations

import enum
import importlib
import types
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import fx

from rmtcompile.binding.captured import Out
from rmtcompile.binding.objects import DELETED
from rmtcompile.binding.trees import Again, Kept, Keys
from rmtcompile.compiler.results import Family, Node
from rmtcompile.compiler.stages import Stage
from rmtcompile.errors import RMTCompileError, UnsupportedError
from rmtcompile.ir.bands import Division, LayerCosts
from rmtcompile.ir.program import (
    Affine,
    Each,
    Feed,
    Group,
    Lane,
    LaneEntry,
    Opened,
    Port,
    Program,
    Source,
    Tap,
    Value,
)
from rmtcompile.ir.segmentation import Axis, Segmentation
from rmtcompile.ir.size import Size
from rmtcompile.ir.weights import Rows, Weight
from rmtcompile.passes.emit.borders import Borders
from rmtcompile.passes.emit.carried import Carried, CarriedCell, CarriedTap, Refill
from rmtcompile.passes.emit.padding import Padding
from rmtcompile.passes.grid.dependence import Dependence
from rmtcompile.passes.grid.reroll import Classes
from rmtcompile.runtime.costs import Costs

_KNOWN: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Affine, Again, Axis, Borders, Carried, CarriedCell, CarriedTap, Classes, Costs, Dependence, Division,
        Each, Family, Feed, Group, Keys, Lane, LaneEntry, LayerCosts, Node, Opened, Out, Padding, Port,
        Program, Refill, Rows, Segmentation, Source, Stage, Tap, Value, Weight,
    )
}  # fmt: skip


class Unsaved:
    """Stands for a graph that was not saved."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._absent()

    def __getitem__(self, key: Any) -> Any:
        raise self._absent()

    def _absent(self) -> RMTCompileError:
        return RMTCompileError(
            f"{self._what} is not there, since this program was loaded from a folder: optimize the model "
            "without one to look at operations"
        )


_GRAPH: Any = Unsaved("the graph")


def know(*kinds: type) -> None:
    """Write instances of these dataclasses, too."""
    _KNOWN.update((kind.__name__, kind) for kind in kinds)


def _no_name(value: Any) -> Any:
    return None


def encode(value: Any, refer: Callable[[Any], Any] = _no_name) -> Any:
    """A value as JSON.

    Args:
        refer: gives the name (JSON) of an object of the model, or None.

    Raises:
        UnsupportedError: there is no way to write it.
    """
    kind = type(value)
    if isinstance(value, Size):
        return {"Size": [int(value), encode(value.terms)]}
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [encode(item, refer) for item in value]
    if kind is tuple or kind is torch.Size:
        return {"tuple" if kind is tuple else "shape": [encode(item, refer) for item in value]}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    if kind in (set, frozenset):
        return {kind.__name__: sorted((encode(item, refer) for item in value), key=repr)}
    if isinstance(value, (dict, types.MappingProxyType)) and kind in (dict, types.MappingProxyType):
        return {"dict": [[encode(key, refer), encode(item, refer)] for key, item in value.items()]}
    if value is DELETED:
        return {"deleted": 1}
    if kind in (torch.dtype, torch.device):
        return {kind.__name__: str(value)}
    if kind in (complex, bytes):
        return {kind.__name__: value.hex() if kind is bytes else repr(value)}
    if _KNOWN.get(kind.__name__) is kind:
        written = (field for field in fields(value) if field.init)
        return {
            kind.__name__: {
                field.name: None if isinstance(getattr(value, field.name), fx.Graph) else
                encode(getattr(value, field.name), refer)
                for field in written
            }
        }  # fmt: skip
    if isinstance(value, Kept):
        return {"Kept": [encode(value.value, refer), value.is_exact]}
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return {"global": named(value)}
    if isinstance(value, enum.Enum):
        return {"enum": [named(kind), value.name]}
    found = refer(value)
    if found is None:
        raise UnsupportedError(
            "an object that the program uses has no name that another process could find it by",
            [f"{kind.__module__}.{kind.__qualname__}: {value!r:.80}"],
        )
    return {"live": found}


def decode(data: Any, find: Callable[[Any], Any] = _no_name) -> Any:
    """The value of what `encode` has given.

    Args:
        find: gives the object of the model that has this name.

    Raises:
        LookupError: a class or an object is not there.
    """
    if not isinstance(data, dict):
        return [decode(item, find) for item in data] if isinstance(data, list) else data
    ((kind, inner),) = data.items()
    if kind in _KNOWN:
        made = {name: decode(item, find) for name, item in inner.items()}
        if kind == "Group":
            made["graph"] = _GRAPH
        return _KNOWN[kind](**made)
    return _DECODE[kind](inner, find)


def named(value: Any) -> str:
    """`module:qualname` of a class or function.

    Raises:
        UnsupportedError: it is not found under that name.
    """
    name = f"{value.__module__}:{value.__qualname__}"
    try:
        is_there = imported(name) is value
    except LookupError:
        is_there = False
    if not is_there:
        raise UnsupportedError(
            "a class or function that the program uses cannot be imported by its name",
            [name],
            "define it at the top level of a module",
        )
    return name


def imported(name: str) -> Any:
    """What has the name `module:qualname`.

    Raises:
        LookupError: nothing has.
    """
    module, _, path = name.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in path.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise LookupError(name) from error
    return value


def _several(make: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda inner, find: make([decode(item, find) for item in inner])


def _size(inner: Any, find: Any) -> Size:
    return Size(inner[0], decode(inner[1], find))


def _dict(inner: Any, find: Any) -> dict[Any, Any]:
    return {decode(key, find): decode(item, find) for key, item in inner}


_DECODE: dict[str, Callable[[Any, Any], Any]] = {
    "Size": _size,
    "tuple": _several(tuple),
    "shape": _several(torch.Size),
    "set": _several(set),
    "frozenset": _several(frozenset),
    "dict": _dict,
    "range": lambda inner, find: range(*inner),
    "deleted": lambda inner, find: DELETED,
    "dtype": lambda inner, find: getattr(torch, inner.removeprefix("torch.")),
    "device": lambda inner, find: torch.device(inner),
    "complex": lambda inner, find: complex(inner),
    "bytes": lambda inner, find: bytes.fromhex(inner),
    "Kept": lambda inner, find: Kept(decode(inner[0], find), inner[1]),
    "global": lambda inner, find: imported(inner),
    "enum": lambda inner, find: imported(inner[0])[inner[1]],
    "live": lambda inner, find: find(inner),
}

__all__ = ["Unsaved", "decode", "encode", "imported", "know", "named"]
