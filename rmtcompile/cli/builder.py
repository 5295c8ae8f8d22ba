"""The user's own function that makes a model: found, called, and what to say where it does not work."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import linecache
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from rmtcompile.commandline import BuilderError, UsageError

_OTHERS = tuple(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib"))
_OURS = str(Path(__file__).resolve().parents[1])


def made_by(spec: str) -> Any:
    """What the function that `spec` names gives, `package.module:function` or `file.py:function`.

    Raises:
        UsageError: there is no such function, or it needs arguments.
        BuilderError: it raises.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise UsageError(f"{spec!r} names no function: write package.module:function or file.py:function")
    function = getattr(_module(where), name, None)
    if function is None:
        raise UsageError(f"{where} has no {name!r}")
    if not callable(function) or isinstance(function, nn.Module):
        return function
    needed = _needed(function)
    if needed:
        several = "arguments" if len(needed) > 1 else "an argument"
        raise UsageError(
            f"{spec} needs {several}, {', '.join(needed)}, and is called without arguments: give "
            f"{'them defaults' if len(needed) > 1 else 'it a default'}, or name a function that takes none"
        )
    try:
        return function()
    except Exception as error:  # whatever it is, it is the user's
        raise BuilderError(_said(spec, error)) from error


def _needed(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that have no default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of C code
        return []
    optional = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def _module(where: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # the folder that the command runs in, as `python -m` has it
    try:
        if where.endswith(".py"):
            path = Path(where)
            if not path.exists():
                raise UsageError(f"there is no file {where}")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = module
            spec.loader.exec_module(module)
            return module
        return importlib.import_module(where)
    except UsageError:
        raise
    except ModuleNotFoundError as error:
        raise UsageError(f"cannot import {where}: {error}") from error
    except Exception as error:  # whatever it is, it is the user's
        raise BuilderError(_said(where, error)) from error


def _said(spec: str, error: Exception) -> str:
    """The exception, and the last line of the user's that led to it."""
    lines = [f"{spec} raised {type(error).__name__}: {error}".rstrip(": ")]
    if isinstance(error, SyntaxError):
        lines = [f"{spec} raised {type(error).__name__}: {error.msg}"]
        place, line = f"{error.filename}:{error.lineno}", error.text or ""
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if _is_users(frame.filename)]
        if not own:
            return lines[0]
        last = own[-1]
        place = f"{last.filename}:{last.lineno}, in {last.name}"
        line = linecache.getline(last.filename, last.lineno or 0)
    return "\n".join([*lines, f"  {place}", *([f"    {line.strip()}"] if line.strip() else [])])


def _is_users(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    path = str(Path(filename).resolve())
    return not path.startswith((_OURS, *_OTHERS))
