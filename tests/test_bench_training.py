"""rmtcompile bench --train: steps of the program and of the model itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from rmtcompile.bench import main, training
from rmtcompile.bench.cli import parser, training_of

TINY = (
    "--preset", "tiny", "--hidden", "32", "--layers", "2", "--segment", "8", "--memory", "2", "--train",
)  # fmt: skip


def test_flags() -> None:
    args = parser().parse_args([*TINY, "--tokens", "16", "32", "--recompute", "level", "3", "--no-own"])
    (steps,) = training_of(args, ("x",)).models
    assert (steps.programs, steps.own) == ({"level": (16, 32), 3: (16, 32)}, [])
    with pytest.raises(ValueError, match="segments of one length"):
        training_of(parser().parse_args([*TINY, "--segment", "8", "16", "--tokens", "16"]), ())
    for wrong in ("levels", "0"):
        with pytest.raises(SystemExit):
            parser().parse_args([*TINY, "--recompute", wrong])


def test_the_table_is_of_several_models() -> None:
    """One command for all: each row has shape, segment and lengths of its own."""
    settings = training_of(parser().parse_args(["--preset", "1b", "--train", "table"]), ())
    cases = [(steps.case.shape.layers, steps.case.segment, steps.case.memory) for steps in settings.models]
    assert cases == [(16, 1024, 128), (12, 1024, 128), (12, 256, 128)]
    for steps in settings.models:
        lengths = {n for of_one in steps.programs.values() for n in of_one}
        assert {*steps.own} <= lengths and all(n % steps.case.segment == 0 for n in lengths)
    with pytest.raises(ValueError, match="of its own"):
        training_of(parser().parse_args(["--train", "table", "--tokens", "4096"]), ())


def test_models_follow_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A table of two models: gradients are compared with those of the model that they belong to."""
    rows = [("tiny", segment, {"none": (32,)}, (32,)) for segment in (8, 16)]
    monkeypatch.setattr(training, "TABLE", rows)
    monkeypatch.setattr(nn.Module, "compile", lambda _: None)
    out = tmp_path / "run.json"
    flags = ["--train", "table", "--rounds", "1", "--option", "backend=eager", "--out", str(out)]
    assert main([*TINY[:6], *flags]) == 2, "a preset would be without effect"
    assert main([*TINY[2:6], *flags]) == 0
    steps = json.loads(out.read_text())["steps"]
    assert [step["segment"] for step in steps] == [8] * 3 + [16] * 3
    assert all(max(step["difference"]) < 1e-3 for step in steps if "difference" in step)
    assert sum("difference" in step for step in steps) == 4


def test_steps_are_timed_and_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    flags = ["--tokens", "16", "32", "--rounds", "1", "--option", "backend=eager", "--out", str(out)]
    assert main([*TINY, *flags, "--recompute", "none", "2", "--no-own"]) == 0
    record = json.loads(out.read_text())
    assert [(step["name"], step["tokens"]) for step in record["steps"]] == [
        (f"rmtcompile, {how} recomputed", tokens) for how in ("none", 2) for tokens in (16, 32)
    ]
    none, again = (step["gradients"] for step in (record["steps"][0], record["steps"][2]))
    assert none == pytest.approx(again, rel=1e-4), "recomputation changes no gradient"
    assert any(none), "a loss without gradients measures nothing"
    assert "training steps" in capsys.readouterr().out
