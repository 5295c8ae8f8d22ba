"""rmtcompile bench --map, --generate: a queue of documents in each way, and a text continued in each way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmtcompile.bench import main
from rmtcompile.bench.cli import parser, serving_of

TINY = (
    "--preset", "tiny", "--hidden", "32", "--layers", "2", "--segment", "8", "--memory", "2", "--rounds", "1",
    "--option", "backend=eager",
)  # fmt: skip


def test_flags() -> None:
    settings = serving_of(parser().parse_args([*TINY, "--map", "5", "--max-segments", "3"]), ("x",))
    assert (settings.documents, settings.tokens, settings.max_segments) == (5, (), 3)
    settings = serving_of(parser().parse_args([*TINY, "--generate", "5", "--no-own"]), ())
    assert settings.tokens == (128, 256) and settings.new_tokens == 5 and not settings.opponents
    with pytest.raises(ValueError, match="segments of one length"):
        serving_of(parser().parse_args([*TINY, "--segment", "8", "16", "--map", "3"]), ())
    with pytest.raises(ValueError, match="not negative"):
        serving_of(parser().parse_args([*TINY, "--map", "-3"]), ())


def test_a_queue_and_a_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    flags = ["--map", "4", "--generate", "3", "--tokens", "24", "--padded", "2", "--out", str(out)]
    assert main([*TINY, *flags]) == 0
    record = json.loads(out.read_text())
    assert record["lengths"] == [24] * 4 and not record["failed"]
    assert [one["name"] for one in record["queue"]] == [
        "one at a time", "one wavefront", "batches of 2, padded", "the model as it is",
    ]  # fmt: skip
    assert len(record["generation"]) == 4
    assert all(one["first_token_s"] > 0 and "token_s" in one for one in record["generation"])
    said = capsys.readouterr().out
    assert "a queue of documents, segments of 8" in said and "generation, segments of 8" in said
