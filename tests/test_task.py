"""benchmarks/trained_on_a_task.py: training on diagonals learns what sequential training learns."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.transformers, pytest.mark.slow]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    name = "trained_on_a_task"
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures(example: ModuleType) -> dict[str, Any]:
    """A short training of both models, and what the one on diagonals reads then."""
    small = example.PRESETS["small"]
    task = replace(small.tasks["needle"], both=((2, 30, 1), (3, 10, 1)), longer=((4, 2, 1),))
    preset = replace(small, tasks={"needle": task}, texts=16, read_up_to=20 * 6, sequential_up_to=16 * 6)
    fast, found = example.compare(preset, "needle", 0, "cpu", torch.float64)
    found["reading"] = [*example.read(fast, preset, "needle", 0, "cpu", 60.0)]
    return found


def test_losses_are_the_same_step_by_step(figures: dict[str, Any]) -> None:
    sequential, diagonal = figures["sequential"]["loss"], figures["diagonal"]["loss"]
    assert len(sequential) == len(diagonal) == 40
    assert figures["largest_difference_of_losses"] < 1e-8
    assert figures["difference_of_gradients"] < 1e-10
    assert sequential[29] < 0.5 * sequential[0]


def test_both_have_learned_the_same(figures: dict[str, Any]) -> None:
    sequential, diagonal = figures["sequential"]["accuracy"], figures["diagonal"]["accuracy"]
    assert sequential == diagonal
    assert diagonal > 2 * figures["chance"]


def test_reading_in_parts_gives_what_the_model_gives(figures: dict[str, Any]) -> None:
    table = figures["reading"]
    assert [row["tokens"] for row in table] == [24, 48, 96, 120]
    for row in table[:3]:
        assert row["agreement"] == 1.0
        assert row["difference"] < 1e-9
    assert "agreement" not in table[3]  # longer than what the model itself was to read


@pytest.mark.parametrize("name", ["retrieval", "needle"])
@pytest.mark.parametrize("preset", ["small", "full"])
def test_the_answer_is_the_latest_value_of_the_name_asked_for(
    example: ModuleType, name: str, preset: str
) -> None:
    sizes = example.PRESETS[preset]
    task, segment = sizes.tasks[name], sizes.memory["segment_size"]
    story = example.Story(task, segment, 5, 3, "cpu")
    ids = torch.cat([story.go_on(story.facts(n)) for n in (3, 6)] + [story.question()], 1)
    assert ids.shape == (5, 10 * segment)
    assert ids.min() >= 0 and ids.max() < example.vocabulary(task)
    for row in ids.tolist():
        told = {}
        for at, token in enumerate(row[: 9 * segment]):
            if token < task.names:
                told[token] = row[at + 1 + task.verb]
        assert row[-1] == told[row[-2]]


def test_command_writes_figures(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = example.PRESETS["small"]
    task = replace(small.tasks["retrieval"], both=((2, 2, 1),), longer=((3, 1, 1),))
    monkeypatch.setitem(example.PRESETS, "small", replace(small, tasks={"retrieval": task}, batch=2, texts=2))
    file = tmp_path / "figures.json"
    options = ["--task", "retrieval", "--preset", "small", "--device", "cpu", "--read-up-to", "48"]
    example.main(*options, "--json", str(file))
    text = file.read_text()
    found = json.loads(text)
    assert str(tmp_path) not in text
    assert found["command"].endswith("--json figures.json")
    assert found["device"] == "CPU" and found["torch"] == torch.__version__
    assert len(found["tasks"]["retrieval"]["diagonal"]["loss"]) == 2
    assert [row["tokens"] for row in found["tasks"]["retrieval"]["reading"]] == [24, 48]
    assert "largest difference of the losses" in capsys.readouterr().out
