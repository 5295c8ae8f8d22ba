"""README.md: what it prints of the schedule and of the generated code is what the example gives."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import rmtcompile

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(after: str) -> list[str]:
    """The lines of the first code block below a heading."""
    part = README[README.index(after) :]
    found = re.search(r"^```\w*\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1].splitlines()


@pytest.fixture(scope="module")
def fast() -> rmtcompile.Optimized:
    """The model of the quickstart, prepared for eight segments."""
    path = ROOT / "examples" / "01_quickstart.py"
    spec = importlib.util.spec_from_file_location("readme_quickstart", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return rmtcompile.optimize(module.make_model()).prepare(torch.zeros(1, 8 * 32, dtype=torch.int64))


def test_the_schedule_is_the_one_that_is_printed(fast: rmtcompile.Optimized) -> None:
    lines = block("### The schedule")
    assert lines == str(fast.schedule).splitlines()[: len(lines)]
    assert (ROOT / "docs/img/schedule.svg").read_text(encoding="utf-8") == fast.schedule.to_svg()


def test_the_code_is_the_one_that_runs(fast: rmtcompile.Optimized) -> None:
    code = set(fast.code.splitlines())
    lines = [line for line in block("### The generated code") if line.strip()]
    shortened = [line for line in lines if "# shortened here" in line or line.strip() == "..."]
    assert len(lines) > 12 and len(shortened) < 4
    assert [line for line in lines if line not in code and line not in shortened] == []


def test_pictures_that_are_shown_exist_and_no_others() -> None:
    shown = set(re.findall(r"docs/img/[\w-]+\.\w+", README))
    assert shown == {f"docs/img/{path.name}" for path in (ROOT / "docs" / "img").iterdir()}
