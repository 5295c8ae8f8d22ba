"""examples/: each one runs on a CPU and prints what it teaches."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def lines_of(name: str, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    load(name).main(*args)
    return capsys.readouterr().out


def test_there_is_one_for_each_lesson() -> None:
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06"]
    for name in NAMES:
        assert f"python examples/{name}.py" in (load(name).__doc__ or "")


def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    out = lines_of("01_quickstart", capsys)
    assert "same type: ARMTOutput" in out
    difference = re.search(r"largest difference: (\S+)", out)
    assert difference is not None and float(difference[1]) < 1e-5
    assert "32 cells in 11 levels, up to 4 at once" in out
    assert "other lengths need no new capture: 1 captured" in out
    assert "# steady state: full width" in out


def test_inspect_a_schedule(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = lines_of("02_inspect_a_schedule", capsys, str(tmp_path))
    assert "schedule  9 levels, width 4, 24 cells in 9 grouped calls" in out
    assert "memory: f32[1,1,32] offset (1,0)" in out
    assert "the longest dependence path has 9 cells" in out
    table = re.findall(r"level (\S+(?: \+ l)?) +(\d+) levels, width (\d+)", out)
    assert table == [("s + l", "9", "4"), ("2s + l", "14", "2"), ("s + l", "9", "4"), ("4s + l", "24", "1")]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"schedule.svg", "schedule.json", "schedule.trace.json", "schedule.dot", "viewer.html"}


def test_your_own_recurrent_model(capsys: pytest.CaptureFixture[str]) -> None:
    out = lines_of("03_your_own_recurrent_model", capsys)
    assert "offsets [(0, 1), (1, 0)], level s + l" in out
    assert "offsets [(0, 1), (1, -1)], level 2s + l" in out
    assert "24 cells in 9 levels" in out and "24 cells in 14 levels" in out
    assert all(float(d) < 1e-5 for d in re.findall(r"difference (\S+)", out))
    assert "examples/03_your_own_recurrent_model.py:" in out


def test_why_classic_rmt_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    out = lines_of("04_why_classic_rmt_cannot", capsys)
    classic, _, other = out.partition("memory in each layer")
    assert "offsets [(0, 1), (1, -3)]" in classic
    assert "plan    sequential: offset (1,-3): the top layer 3 of a segment feeds layer 0" in classic
    assert "warning no two cells can run together, the 4 layers run one after the other" in classic
    assert "refused: use plan='auto'" in classic
    assert "offsets [(0, 1), (1, 0)]" in other
    assert "plan    diagonal" in other


def test_long_text(capsys: pytest.CaptureFixture[str]) -> None:
    out = lines_of("05_long_text_on_a_gpu", capsys)
    assert out.startswith("device: ")
    rows = [line.split() for line in out.splitlines() if re.match(r" +[\d,]+ +\d+ +\d+ ", line)]
    assert [int(row[1]) for row in rows] == [2, 8, 32, 128]
    assert "captures: 1\n" in out
    assert re.search(r"carried from segment to segment, at any length: [\d,]+ bytes", out)


def test_several_devices(capsys: pytest.CaptureFixture[str]) -> None:
    out = lines_of("06_several_devices", capsys)
    assert "4 layers in 2 bands" in out and "0  layers 0..1 on " in out
    found = re.search(r"difference (\S+)", out)
    assert found is not None and float(found[1]) < 1e-2
