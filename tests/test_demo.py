"""rmtcompile demo: what it prints, what it writes, and that its numbers are those of the run."""

from __future__ import annotations

import ast
import json
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from rmtcompile.cli.demo import DemoResult, read_bytes, run_demo, verdict
from rmtcompile.cli.target import Sizes
from rmtcompile.commandline import UsageError, telling

SMALL = Sizes(layers=3, hidden=32, heads=2, segment=16, segments=5, memory=4, d_mem=4)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, list[str], Path]:
    said: list[str] = []
    folder = tmp_path_factory.mktemp("demo")
    result = run_demo(SMALL, out=folder, repeats=2, say=said.append)
    return result, said, folder


def test_both_orders_agree(ran: tuple[DemoResult, list[str], Path]) -> None:
    result, _, _ = ran
    assert result.difference < 1e-5 * max(1, result.magnitude)
    assert result.same_bytes > 0.9
    assert max(result.errors) < 1e-5
    assert result.magnitude > 0.01
    assert result.sequential > 0 and result.diagonal > 0 and result.capture > result.diagonal
    assert (result.layers, result.segments, result.levels, result.width) == (3, 5, 7, 3)


def test_it_says_what_it_does(ran: tuple[DemoResult, list[str], Path]) -> None:
    result, said, _ = ran
    text = "\n".join(said)
    for piece in (
        "1/5  model     ARMT around a Llama: 3 layers of width 32",
        "constitution.txt: 80 bytes as tokens, segments of 16",
        "s  capture, 2 segments",
        "schedule  7 levels, width 3, 15 cells in 7 grouped calls",
        f"largest difference {result.difference:.1e}",
        "the model as it is, eager (median of 2)",
        "on a CPU the gain is what fewer and larger calls save",
    ):
        assert piece in text, piece
    assert max(map(len, said[:4])) <= 120


def test_it_writes_picture_viewer_and_code(ran: tuple[DemoResult, list[str], Path]) -> None:
    result, _, folder = ran
    assert [Path(name).name for name in result.files] == ["schedule.svg", "viewer.html", "generated.py"]
    assert ElementTree.parse(folder / "schedule.svg").getroot().tag.endswith("svg")
    assert "<!doctype html>" in (folder / "viewer.html").read_text().lower()
    functions = {
        n.name
        for n in ast.parse((folder / "generated.py").read_text()).body
        if isinstance(n, ast.FunctionDef)
    }
    assert {"init", "prologue", "epilogue", "level", "forward"} <= functions


def test_the_viewer_shows_the_times_that_are_said(ran: tuple[DemoResult, list[str], Path]) -> None:
    result, said, folder = ran
    page = (folder / "viewer.html").read_text()
    start = page.index('"profile":{') + len('"profile":')
    shown = json.JSONDecoder().raw_decode(page[start:])[0]
    assert shown["sequentialUs"] == pytest.approx(1e6 * result.sequential, abs=0.01)
    assert sum(shown["levelUs"]) + shown["outsideUs"] == pytest.approx(1e6 * result.diagonal, abs=0.1)
    assert said[-1].startswith(f"open {folder / 'viewer.html'} in a browser")


def test_it_says_what_takes_long() -> None:
    said: list[str] = []
    with telling(said.append, "thinking", after=0.05):
        time.sleep(0.5)
    with telling(said.append, "nothing much", after=60):
        pass
    assert said == ["               ... thinking"]


def test_a_slower_diagonal_is_said_as_it_is(ran: tuple[DemoResult, list[str], Path]) -> None:
    import dataclasses

    slow = dataclasses.replace(ran[0], sequential=0.1, diagonal=0.2, same_bytes=0.5, errors=(1e-7, 1e-2))
    lines = verdict(slow, 3)
    assert "at 50.00% of the places" in lines[0]
    assert "MORE than rounding" in lines[1]
    assert "0.50 x as fast" in lines[3]


def test_texts_are_read_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\xff\n")
    name, tokens = read_bytes(str(path), 3)
    assert name == "a.txt"
    assert torch.equal(tokens, torch.tensor([[97, 98, 255]]))


def test_missing_and_empty_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_bytes(str(tmp_path / "none.txt"), 3)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UsageError, match="is empty"):
        read_bytes(str(tmp_path / "empty.txt"), 3)
