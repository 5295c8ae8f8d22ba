"""rmtcompile bench --train: steps of the program and of the model itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmtcompile.bench import main
from rmtcompile.bench.cli import parser, training_of

TINY = (
    "--preset", "tiny", "--hidden", "32", "--layers", "2", "--segment", "8", "--memory", "2", "--train",
)  # fmt: skip


def test_flags() -> None:
    args = parser().parse_args([*TINY, "--tokens", "16", "32", "--recompute", "level", "3", "--no-own"])
    settings = training_of(args, ("x",))
    assert (settings.tokens, settings.recompute, settings.opponents) == ((16, 32), ["level", 3], False)
    with pytest.raises(ValueError, match="segments of one length"):
        training_of(parser().parse_args([*TINY, "--segment", "8", "16", "--tokens", "16"]), ())
    for wrong in ("levels", "0"):
        with pytest.raises(SystemExit):
            parser().parse_args([*TINY, "--recompute", wrong])


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
    assert "training steps, segments of 8" in capsys.readouterr().out
