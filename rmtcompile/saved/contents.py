"""Contents: values of a model in words that are equal in two processes where the values are.

    2.0                        float 2.0
    self.act                   function torch.tanh
    Config(width=64)           object model.Config {'width': int 64}
    a tensor of a global       tensor float32[4] 91ab...

Objects that the model itself keeps are told by their way from a module, since what they hold is watched entry
by entry. What C code keeps where nothing leads to cannot be told, and refuses the program.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import re
import threading
import types
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from rmtcompile.binding.objects import (
    ATOMS,
    DELETED,
    OPAQUE,
    SETS,
    Opaque,
    base_of,
    is_fixed,
    is_sealed,
    parts,
)
from rmtcompile.errors import UnsupportedError
from rmtcompile.saved.code import WRAPPED, Code, digest

_BY_REPR = (
    range, slice, re.Pattern, types.GenericAlias, types.EllipsisType, torch.layout, torch.memory_format,
    np.dtype,
)  # fmt: skip
"""Objects of C code whose `repr` says all."""


_NO_CONTENTS = (weakref.ref, types.MappingProxyType, type(threading.Lock()), type(threading.RLock()))
"""Objects of C code that hold nothing besides what `parts` gives."""


class Contents:
    """Tells values.

    Args:
        names: of objects that the model keeps, by identity: modules, and what lies in them.
        seen: functions and objects in which what code names is watched in another way.
    """

    def __init__(self, names: Mapping[int, str], seen: Mapping[int, Any]) -> None:
        self.code = Code(self.text, seen)
        self._names, self._seen = names, seen
        self._told: dict[int, tuple[str, Any]] = {}

    def text(self, value: Any, key: str) -> str:
        """A value in words.

        Args:
            key: what the value is called, for those that are met again.

        Raises:
            UnsupportedError: its contents cannot be seen.
        """
        if isinstance(value, ATOMS):
            return f"{type(value).__name__} {value!r}"
        if value is DELETED or isinstance(value, Opaque):
            return "nothing" if value is DELETED else "a program of rmtcompile"
        if isinstance(value, nn.Module):
            place = self._names.get(id(value))
            return f"module {_elsewhere(value) if place is None else place}: {kind_of(value)}"
        if isinstance(value, torch.Tensor):
            place = self._names.get(id(value))
            return f"tensor {tensor_text(value) if place is None else place}"
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, *WRAPPED)):
            return self._callable(value, key)
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, enum.Enum):
            self.code.visit(type(value))
            told = repr(value.value) if isinstance(value.value, ATOMS) else ""
            return f"{kind_of(value)}.{value.name} {told}"
        if isinstance(value, (logging.Logger, logging.Handler)):
            return f"logger {value.name}"
        if id(value) in self._names:
            return f"{kind_of(value)} at {self._names[id(value)]}{self._sealed(value, key)}"
        if id(value) in self._told:
            return f"the same as {self._told[id(value)][0]}"
        self._told[id(value)] = key, value
        if id(value) in self._seen and not is_fixed(value) and base_of(type(value)) not in SETS:
            return kind_of(value)  # what code names in it is watched entry by entry
        return f"{kind_of(value)}{self._sealed(value, key)} {{{self._inside(value, key)}}}"

    def _callable(self, value: Any, key: str) -> str:
        self.code.visit(value)
        if isinstance(value, type):
            return f"class {value.__module__}.{value.__qualname__}"
        if isinstance(value, types.FunctionType):
            return f"function {value.__module__}.{value.__qualname__} {digest(value.__code__)}"
        if isinstance(value, types.MethodType):
            bound = value.__self__
            owner = (
                self._names.get(id(bound))
                if isinstance(bound, nn.Module)
                else self.text(bound, f"{key}'s self")
            )
            return f"method {value.__func__.__qualname__} of {owner}"
        if hasattr(value, "func") and hasattr(value, "keywords"):  # a partial
            given = [*value.args, *sorted(value.keywords.items())]
            inner = (self.text(x, f"{key}({i})") for i, x in enumerate([value.func, *given]))
            return f"partial {', '.join(inner)}"
        name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
        return f"{type(value).__name__} {getattr(value, '__module__', '')}.{name}"

    def _sealed(self, value: Any, key: str) -> str:
        """What C code keeps in an object, in words."""
        if isinstance(value, _BY_REPR):
            return f" {value!r}"
        if isinstance(value, _NO_CONTENTS) or not (is_sealed(value) or isinstance(value, OPAQUE)):
            return ""
        if isinstance(value, (np.ndarray, np.generic)):
            return f" {value.dtype}{value.shape} {_digest(value.tobytes())}"
        raise UnsupportedError(
            "the forward depends on an object whose contents another process could not compare",
            [f"{key}: {kind_of(value)}"],
            "keep numbers, strings, lists, dicts or plain objects in its place",
        )

    def _inside(self, value: Any, key: str) -> str:
        if base_of(type(value)) in SETS:
            return ", ".join(sorted(self.text(item, f"{key}{{}}") for item in value))
        return ", ".join(
            f"{self.text(step[1], key) if not isinstance(step[1], str) else step[1]!r}: "
            f"{self.text(item, f'{key}[{step[1]!r}]')}"
            for step, item in parts(value).items()
        )


def _elsewhere(module: nn.Module) -> str:
    """A module that is no part of the model, by the plain values in it."""
    found = (
        f"{path}.{name} {value!r}"
        for path, inner in module.named_modules()
        for name, value in vars(inner).items()
        if isinstance(value, ATOMS)
    )
    return f"elsewhere with {', '.join(found)}"


def kind_of(value: Any) -> str:
    """The full name of a value's class."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def tensor_kind(tensor: torch.Tensor) -> str:
    """`float32[4, 8] on cpu`."""
    sizes = ", ".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')}[{sizes}] on {tensor.device.type}"


def tensor_text(tensor: torch.Tensor) -> str:
    """A tensor with a digest of its contents."""
    with torch.inference_mode(False), torch.no_grad():
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return f"{tensor_kind(tensor)} {_digest(content.numpy().tobytes())}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


__all__ = ["Contents", "kind_of", "tensor_kind", "tensor_text"]
