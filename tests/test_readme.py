"""README.md and docs/looking.md: what they print of the schedule and of the generated code is what the
example gives, the first steps run, and figures in README.md are those of the page on speed."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch

import rmtcompile

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOOKING = (ROOT / "docs/looking.md").read_text(encoding="utf-8")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def block(after: str) -> list[str]:
    """The lines of the first code block below a heading."""
    part = LOOKING[LOOKING.index(after) :]
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
    lines = block("## The schedule")
    assert lines == str(fast.schedule).splitlines()[: len(lines)]
    assert (ROOT / "docs/img/schedule.svg").read_text(encoding="utf-8") == fast.schedule.to_svg()


def test_the_code_is_the_one_that_runs(fast: rmtcompile.Optimized) -> None:
    code = set(fast.code.splitlines())
    lines = [line for line in block("## The generated code") if line.strip()]
    shortened = [line for line in lines if "# shortened here" in line or line.strip() == "..."]
    assert len(lines) > 12 and len(shortened) < 4
    assert [line for line in lines if line not in code and line not in shortened] == []


def test_the_first_steps_run_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten lines in a module of their own, and no other Python in README.md."""
    (steps,) = PYTHON.findall(README)
    assert sum(bool(line.strip()) for line in steps.splitlines()) == 10
    found: dict[str, object] = {}
    exec(compile(steps, "README.md", "exec"), found)
    model, ids, fast = found["model"], found["ids"], found["fast"]
    assert isinstance(fast, rmtcompile.Optimized) and isinstance(model, torch.nn.Module)
    assert str(fast.schedule) in capsys.readouterr().out
    assert (fast.schedule.n_cells, fast.schedule.n_levels) == (32, 11)  # as the picture's words say
    for name, parameter in model.named_parameters():
        if name.endswith("W_mv.weight"):  # zero in a fresh model: nothing would be remembered
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_figures_are_those_of_the_page_on_speed() -> None:
    """Each number of the table, and the commands and dates below it."""
    speed = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    start = README.index("Seven measurements")
    part = README[start : README.index("## Install")]
    rows = [line for line in part.splitlines() if re.match(r"\| [a-z\d]", line)]
    numbers = [n for row in rows for cell in row.split("|")[2:] for n in re.findall(r"[\d.,]*\d×?", cell)]
    assert len(rows) == 7 and len(numbers) > 16
    assert [n for n in numbers if n not in speed] == []
    assert set(re.findall(r"\d{4}-\d\d-\d\d|torch [\w.+]+", part)) == {
        "2026-11-25", "2026-11-29", "2026-11-30", "torch 2.11.0+cu130",
    }  # fmt: skip
    commands = re.findall(r"`rmtcompile (bench [^`]*)`", part)
    assert len(commands) == 7
    flags = {flag for command in commands for flag in command.split()}
    assert [flag for flag in flags if flag not in speed] == []


def test_pictures_that_are_shown_exist_and_no_others() -> None:
    pages = [(README, "docs/img/"), *((p.read_text("utf-8"), "img/") for p in (ROOT / "docs").glob("*.md"))]
    shown = {name for text, folder in pages for name in re.findall(rf"[(\"]{folder}([\w-]+\.\w+)", text)}
    assert shown == {path.name for path in (ROOT / "docs" / "img").iterdir()}


def test_links_into_the_repository_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", README)
    assert len(links) > 12
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_a_package_index_gets_no_relative_links() -> None:
    """As it is, and as it would be with the repository's address in pyproject.toml."""
    for_an_index = runpy.run_path(str(ROOT / "setup.py"))["for_an_index"]
    text = for_an_index(README, None)
    assert re.findall(r"\]\((?!https://)", text) == [] and "[training]" not in text and "(training)" in text
    text = for_an_index(README, "https://example.org/rmtcompile/")
    assert re.findall(r"\]\((?!https://)", text) == []
    assert "](https://example.org/rmtcompile/raw/HEAD/docs/img/schedule.svg)" in text
    assert "[training](https://example.org/rmtcompile/blob/HEAD/docs/training.md)" in text
