"""The tables in docs/ say what tests/handled.py says, and the tests that it names exist."""

from __future__ import annotations

import ast
from pathlib import Path

import handled
import pytest

TESTS = Path(__file__).parent


def rows() -> list[handled.Row]:
    return [row for _, found in handled.tables().values() for row in found]


def test_pages_hold_the_tables() -> None:
    assert set(handled.PAGES) == set(handled.tables())
    for name, page in handled.PAGES.items():
        text = (handled.ROOT / page).read_text(encoding="utf-8")
        assert handled.written(name, text) == text, f"{page}: run `make readme-tables`"
    assert "tried" not in "".join(str(row) for row in rows())


def functions(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_exists() -> None:
    missing = [
        test
        for row in rows()
        for test in row.ids
        if test.split("::")[1].split("[")[0] not in functions(test.split("::")[0])
    ]
    assert not missing


def test_every_test_is_collected(request: pytest.FixtureRequest) -> None:
    """Of the files that this run collects: parameters that are named are there, and nothing is expected to
    fail."""
    items = {item.nodeid.removeprefix("tests/"): item for item in request.session.items}
    files = {nodeid.split("::")[0] for nodeid in items}
    plain = {nodeid.split("[")[0] for nodeid in items}
    is_part = request.config.option.keyword or request.config.option.markexpr
    for row in rows():
        assert row.tests, row
        for test in row.ids:
            if test.split("::")[0] not in files or is_part:
                continue
            assert test in (items if "[" in test else plain), f"{test} is not collected"
            if test in items:
                assert not items[test].get_closest_marker("xfail"), f"{test} is expected to fail"


def test_a_missing_test_would_be_noticed() -> None:
    assert "test_not_there" not in functions("test_refusals.py")
    with pytest.raises(AssertionError, match="have different offsets"):
        handled.zoo("two", "skewed", "parallel_rmt")
    with pytest.raises(AssertionError, match="no <!-- models"):
        handled.written("models", "no tables")
    page = (handled.ROOT / handled.PAGES["models"]).read_text(encoding="utf-8")
    changed = page.replace("| ARMT, ", "| Another, ", 1)
    assert changed != page == handled.written("models", changed)
