"""Code: the source that a forward runs through, as digests that another process can compare.

    Layer.forward -> helper, tables.scale      Layer.forward 3f09..., helper 81aa..., tables.scale 2.0

From functions and classes on, all that their code names is followed: functions, classes, and what it takes
out of modules. Python, torch and installed packages stand for themselves by their versions; what is called
there is told by its own code alone, so that a function that was put in another's place is seen.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import sys
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

from rmtcompile.binding.code import globals_in, names_in
from rmtcompile.binding.objects import ATOMS
from rmtcompile.binding.surroundings import is_library

WRAPPED: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    types.MethodType: lambda x: (x.__func__, type(x.__self__)),
    staticmethod: lambda x: (x.__func__,),
    classmethod: lambda x: (x.__func__,),
    property: lambda x: (x.fget, x.fset, x.fdel),
    functools.cached_property: lambda x: (x.func,),
    functools._lru_cache_wrapper: lambda x: (x.__wrapped__,),
    functools.partial: lambda x: (x.func, *x.args, *x.keywords.values()),
}


class Code:
    """Digests of functions and classes, by name.

    Args:
        describe: the contents of a value that is no code, in words.
        seen: functions whose globals and closures are watched in another way.

    Attributes:
        found: digests and contents, by name.
        packages: versions of the packages that were met.
    """

    def __init__(self, describe: Callable[[Any, str], str], seen: Collection[int] = ()) -> None:
        self.found: dict[str, str] = {}
        self.packages: dict[str, str] = {}
        self._describe = describe
        self._watched = seen
        self._met: dict[int, Any] = {}
        self._modules: set[tuple[int, frozenset[str]]] = set()
        self._names: dict[int, tuple[str, Any]] = {}
        self._times: Counter[str] = Counter()

    def visit(self, value: Any) -> None:
        """Note a function, a class, or what wraps one, and all that its code names."""
        stack = [value]
        while stack:
            value = stack.pop()
            if id(value) in self._met:
                continue
            self._met[id(value)] = value
            if isinstance(value, types.FunctionType):
                stack += self._function(value)
            elif isinstance(value, type):
                stack += self._class(value)
            elif wrapped := next((get for kind, get in WRAPPED.items() if isinstance(value, kind)), None):
                stack += wrapped(value)

    def name(self, value: Any) -> str:
        """What a function or a class is called here; those of one name are numbered."""
        if id(value) not in self._names:
            plain = f"{value.__module__}.{value.__qualname__}"
            self._times[plain] += 1
            number = f" #{self._times[plain]}" if self._times[plain] > 1 else ""
            self._names[id(value)] = plain + number, value
        return self._names[id(value)][0]

    def _is_own(self, value: Any) -> bool:
        """Whether to look into it; else its package's version stands for it."""
        module = str(getattr(value, "__module__", None) or "")
        package = module.split(".")[0]
        is_ours = package == "rmtcompile" and not module.startswith("rmtcompile.models")
        if package in ("builtins", "torch") or package in sys.stdlib_module_names - {"__main__"}:
            return False
        if is_ours or is_library(package):
            self.packages.setdefault(package, version(package))
            return False
        return True

    def _function(self, fn: types.FunctionType) -> Iterator[Any]:
        if not self._is_own(fn):
            if not str(fn.__module__).startswith(("torch.", "rmtcompile.")):
                self.found[self.name(fn)] = digest(fn.__code__)
            return
        own = self.name(fn)
        self.found[own] = digest(fn.__code__)
        defaults = (*enumerate(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).items())
        for key, value in defaults:
            yield from self._value(value, f"{own}, default {key}")
        is_watched = id(fn) in self._watched
        names = names_in(fn.__code__)
        for key in sorted(globals_in(fn.__code__) & fn.__globals__.keys()):
            value = fn.__globals__[key]
            if isinstance(value, types.ModuleType):
                yield from self._module(value, names)
            elif is_watched:
                yield value
            else:
                yield from self._value(value, f"{fn.__module__}.{key}")
        for key, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # a cell that is not filled yet
                continue
            if is_watched:
                yield value
            else:
                yield from self._value(value, f"{own}, {key}")
        if names & {"environ", "getenv"}:
            asked = {x for x in _strings(fn.__code__) if x in os.environ}
            self.found.update((f"environment variable {x}", os.environ[x]) for x in sorted(asked))

    def _class(self, kind: type) -> Iterator[Any]:
        if not self._is_own(kind):
            return
        own = self.name(kind)
        self.found[own] = " ".join(base.__qualname__ for base in kind.__mro__)
        yield from kind.__mro__[1:]
        for key, value in vars(kind).items():
            if key.startswith("__") and isinstance(value, (*ATOMS, tuple, dict)):
                continue
            if isinstance(value, ATOMS):
                self.found[f"{own}.{key}"] = repr(value)
            yield value

    def _module(self, module: types.ModuleType, names: Collection[str]) -> Iterator[Any]:
        """What code that names a module takes out of it."""
        package = module.__name__.split(".")[0]
        if is_library(package):
            if package not in ("torch", "builtins") and package not in sys.stdlib_module_names:
                self.packages.setdefault(package, version(package))
            return
        key = id(module), frozenset(names)
        if key in self._modules:
            return
        self._modules.add(key)
        for name in sorted(set(names) & vars(module).keys()):
            value = vars(module)[name]
            if isinstance(value, types.ModuleType):
                yield from self._module(value, names)
            else:
                yield from self._value(value, f"{module.__name__}.{name}")

    def _value(self, value: Any, name: str) -> Iterator[Any]:
        """A value by its contents, or as code."""
        if isinstance(value, (types.FunctionType, type, *WRAPPED)):
            yield value
        else:
            self.found[name] = self._describe(value, name)


def digest(code: types.CodeType) -> str:
    """Equal for code that does the same in the same way, wherever it stands."""
    said = hashlib.sha256()
    said.update(code.co_code)
    said.update(repr([_constant(x) for x in code.co_consts]).encode())
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    said.update(repr((names, code.co_argcount, code.co_kwonlyargcount, code.co_flags)).encode())
    return said.hexdigest()[:16]


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return digest(value)
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    return (type(value).__name__, [_constant(x) for x in value] if isinstance(value, tuple) else repr(value))


def _strings(code: types.CodeType) -> Iterator[str]:
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _strings(const)
        elif isinstance(const, str):
            yield const


@functools.cache
def version(package: str) -> str:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "?"))


__all__ = ["Code", "digest", "version"]
