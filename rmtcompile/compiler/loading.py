"""Emitted source as Python modules."""

from __future__ import annotations

import itertools
import linecache
import sys
import types
from collections.abc import Mapping

_numbers = itertools.count(1)


def load(source: str, sizes: Mapping[str, int] | None = None) -> types.ModuleType:
    """Import emitted source, under a name that torch can import and that tracebacks and debuggers can read.

    The module stays until `unload`.

    Args:
        sizes: values of the module's free sizes, instead of those that stand in it.
    """
    name = f"rmtcompile_program_{next(_numbers)}"
    module = types.ModuleType(name)
    module.__file__ = f"<{name}>"
    linecache.cache[module.__file__] = (len(source), None, source.splitlines(keepends=True), module.__file__)
    sys.modules[name] = module
    exec(compile(source, module.__file__, "exec"), module.__dict__)  # our own emitted module
    module.__dict__.update(sizes or {})
    return module


def unload(name: str) -> None:
    """Forget an emitted module."""
    sys.modules.pop(name, None)
    linecache.cache.pop(f"<{name}>", None)
