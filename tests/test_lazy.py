"""The public names of the package: imported when they are asked for, and all there."""

from __future__ import annotations

import ast
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import rmtcompile

HOME = Path(rmtcompile.__file__).parent


def run(code: str, *arguments: str) -> str:
    """What Python prints for some code, in a process of its own."""
    path = {**os.environ, "PYTHONPATH": str(HOME.parent)}  # -W is read before packages are found otherwise
    command = [sys.executable, *arguments, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HOME.parent, env=path)
    return done.stdout


def test_help_and_version_import_no_torch() -> None:
    out = run(
        "import sys\n"
        "from rmtcompile.cli import main\n"
        "for line in ('--help', '--version', 'explain --help', 'bench --help', 'bench my:build --help',\n"
        "             'view -o', 'bench --rounds x'):\n"
        "    main(line.split())\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    assert out.splitlines()[-1] == "[]"


def test_each_name_is_there_however_it_is_imported() -> None:
    out = run(
        "import rmtcompile\n"
        "assert set(rmtcompile.__all__) <= set(dir(rmtcompile))\n"
        "print(rmtcompile.passes.grid.__name__, rmtcompile.models.__name__)\n"
        "from rmtcompile import *\n"
        "from rmtcompile import optimize as again, errors, Schedule\n"
        "assert all(name in globals() for name in rmtcompile.__all__)\n"
        "print(again is optimize is rmtcompile.optimize, rmtcompile.schedule.Schedule is Schedule)\n"
    )
    assert out.splitlines() == ["rmtcompile.passes.grid rmtcompile.models", "True True"]


def test_warnings_are_filtered_by_their_names() -> None:
    code = "import warnings; print(warnings.filters[0][2].__module__)"
    assert run(code, "-W", "error::rmtcompile.FallbackWarning").strip() == "rmtcompile.errors"


def test_what_type_checkers_read_is_what_is_there() -> None:
    tree = ast.parse(Path(rmtcompile.__file__).read_text())
    found = {
        name.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("rmtcompile.")
        for name in node.names
    }
    assert sorted(found) == sorted(rmtcompile.__all__)
    for name, module in found.items():
        assert getattr(sys.modules.get(module) or __import__(module, fromlist=["x"]), name) is getattr(
            rmtcompile, name
        )


def test_all_rooms_are_attributes() -> None:
    there = {path.stem for path in HOME.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(rmtcompile._ROOMS) == (there | {"passes"}) - {"__init__", "__main__"}
    assert all(inspect.ismodule(getattr(rmtcompile, name)) for name in rmtcompile._ROOMS)


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(AttributeError, match="module 'rmtcompile' has no attribute 'optimise'"):
        _ = rmtcompile.optimise  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        from rmtcompile import optimise  # type: ignore[attr-defined] # noqa: F401


def test_public_classes_are_pickled() -> None:
    for name in rmtcompile.__all__:
        assert pickle.loads(pickle.dumps(getattr(rmtcompile, name))) is getattr(rmtcompile, name)
