"""The three ways in (wheel, editable install, checkout on PYTHONPATH) and `rmtcompile.passes` in each."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROBE = """
import importlib.util, json, sys
from importlib.resources import files
import rmtcompile, rmtcompile.passes
print(json.dumps({
    "rmtcompile": rmtcompile.__file__,
    "passes": rmtcompile.passes.__file__,
    "loose": importlib.util.find_spec("passes") is not None,
    "missing": [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None],
    "text": (files("rmtcompile.data") / "constitution.txt").read_text(encoding="utf-8")[:13],
    "typed": (files("rmtcompile") / "py.typed").is_file(),
}))
"""
README = "import importlib.metadata as m; print(m.metadata('rmtcompile').get_payload())"


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=clean | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def packages() -> list[str]:
    """Import names of all folders with an __init__.py."""
    found = [*ROOT.glob("rmtcompile/**/__init__.py"), *ROOT.glob("passes/**/__init__.py")]
    names = [".".join(file.parent.relative_to(ROOT).parts) for file in found]
    return sorted(name if name.split(".")[0] == "rmtcompile" else f"rmtcompile.{name}" for name in names)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is packaged, so that nothing is built inside the tree under test."""
    copy = tmp_path / "checkout"
    for name in ("rmtcompile", "passes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A new environment that sees this one's packages (torch is large), but none of its editable installs."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    Path(site, "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, checkout: Path, *args: str | Path) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-deps", "--no-build-isolation", *args, cwd=checkout)


@pytest.mark.parametrize("way", ["wheel", "editable", "checkout"])
def test_passes_are_a_package_of_rmtcompile(way: str, checkout: Path, python: Path, tmp_path: Path) -> None:
    home, passes, env = checkout / "rmtcompile", checkout / "passes", {}
    if way == "wheel":
        install(python, checkout, ".")
        home = next((tmp_path / "env").glob("lib/python*/site-packages")) / "rmtcompile"
        passes = home / "passes"
    elif way == "editable":
        install(python, checkout, "-e", ".")
    else:
        env = {"PYTHONPATH": str(checkout)}

    seen = json.loads(run(python, "-c", PROBE, *packages(), cwd=tmp_path / "env", **env))

    assert Path(seen["rmtcompile"]) == home / "__init__.py"
    assert Path(seen["passes"]) == passes / "__init__.py"
    assert seen["missing"] == []
    assert seen["loose"] == (way == "checkout")  # nothing is installed under the generic name
    assert seen["text"] == "We the People"
    assert seen["typed"]
    if way != "checkout":
        readme = run(python, "-c", README, cwd=tmp_path / "env")
        assert "# rmtcompile\n" in readme
        assert re.findall(r"\]\((?!https://)", readme) == []  # links that a package index can follow
        assert (tmp_path / "env" / "bin" / "rmtcompile").exists()
