"""Emitted source as Python modules."""

from __future__ import annotations

import functools
import itertools
import linecache
import sys
import types
from collections import Counter
from collections.abc import Mapping

SOURCE, SIZES = "__source__", "__sizes__"
"""Names in a module under which its source and its free sizes stand: what `linecache` holds may be dropped by
others."""

_numbers = itertools.count(1)
_users: Counter[str] = Counter()  # modules by the file that their code is said to be of


def load(source: str, sizes: Mapping[str, int] | None = None) -> types.ModuleType:
    """Import emitted source, under a name that torch can import and that tracebacks and debuggers can read.

    The module stays until `unload`.

    Args:
        sizes: values of the module's free sizes, instead of those that stand in it.
    """
    module = types.ModuleType(f"rmtcompile_program_{next(_numbers)}")
    code = _code(source)
    file = module.__file__ = code.co_filename
    _users[file] += 1
    if file not in linecache.cache:
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    sys.modules[module.__name__] = module
    exec(_copied(code), module.__dict__)  # our own emitted module
    module.__dict__.update(sizes or {}, **{SOURCE: source, SIZES: dict(sizes or {})})
    return module


@functools.lru_cache(maxsize=32)
def _code(source: str) -> types.CodeType:
    return compile(source, f"<rmtcompile_source_{next(_numbers)}>", "exec")


def _copied(code: types.CodeType) -> types.CodeType:
    """Code of its own: what is compiled for a code object belongs to the module that it was compiled in."""
    inner = tuple(_copied(x) if isinstance(x, types.CodeType) else x for x in code.co_consts)
    return code.replace(co_consts=inner)


def unload(name: str) -> None:
    """Forget an emitted module."""
    module = sys.modules.pop(name, None)
    file = getattr(module, "__file__", None)
    if file is not None:
        _users[file] -= 1
        if not _users[file]:
            del _users[file]
            linecache.cache.pop(file, None)
