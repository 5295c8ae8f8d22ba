"""Documents of random lengths: what the first call of each length is said to cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rmtcompile.bench import documents, main
from rmtcompile.bench.cli import documents_of, parser
from rmtcompile.bench.shapes import SHAPES, Case

CASE = Case(SHAPES["tiny"], segment=16, memory=4, d_mem=8, batch=1, dtype=torch.float32)
FLAGS = ("--preset", "tiny", "--hidden", "32", "--layers", "2", "--segment", "8")


def document(tokens: int, first: float, **changed: Any) -> dict[str, Any]:
    """A document as it is recorded, of segments of ten tokens."""
    return {
        "tokens": tokens,
        "segments": tokens // 10,
        "rest": tokens % 10,
        "first_s": first,
        "is_new": True,
        "captures": 0,
        "compilations": 0,
        "stages": [],
        "followed_to": 8,
        "free_sizes": {},
        "cause": "nothing captured or compiled",
        **changed,
    }


# ---- lengths ----


def test_lengths_are_whole_segments_and_a_rest() -> None:
    lengths = documents.lengths_of(CASE, 2000, 40)
    assert {tokens // 16 for tokens in lengths} == set(range(1, 41))
    assert {tokens % 16 for tokens in lengths} == set(range(16))


def test_lengths_follow_the_seed() -> None:
    other = Case(SHAPES["tiny"], 16, 4, 8, 1, torch.float32, seed=1)
    assert documents.lengths_of(CASE, 9, 40) == documents.lengths_of(CASE, 9, 40)
    assert documents.lengths_of(CASE, 9, 40) != documents.lengths_of(other, 9, 40)


# ---- causes ----


def test_causes_are_named() -> None:
    first = document(23, 9.0, captures=1, compilations=3, stages=["capture, 2 segments", "number"])
    assert documents.cause_of(first, []) == (
        "1 program captured (capture, 2 segments), 3 graphs compiled, forward followed to 8 segments"
    )
    second = document(25, 1.0, free_sizes={"R": 5})
    third = document(27, 1.0, free_sizes={"R": 7})
    one = document(21, 1.0, free_sizes={"R": 1})
    rules = "first use of rules for free sizes, compared with the model"
    assert documents.cause_of(second, [first]) == rules
    assert documents.cause_of(third, [first, second]) == "nothing captured or compiled"
    assert documents.cause_of(one, [first, second, third]) == rules
    longer = document(207, 1.0, free_sizes={"R": 7}, followed_to=20)
    assert documents.cause_of(longer, [first, second]) == "forward followed to 20 segments"
    again = document(23, 1.0, is_new=False)
    assert documents.cause_of(again, [first]) == "length came before"


# ---- sums ----


def record_of(*found: dict[str, Any]) -> dict[str, Any]:
    """A record in which each repeated call takes 1 s and each eager one 6 s."""
    lengths = [str(one["tokens"]) for one in found]
    return {
        "environment": {"command": ["rmtcompile", "bench"]},
        "segment": 10,
        "documents": list(found),
        "repeated_s": {tokens: [9.0, 9.0, 1.0, 0.5, 1.5] for tokens in lengths},
        "eager_s": dict.fromkeys(lengths, 6.0),
    }


def test_sums_leave_the_first_two_out() -> None:
    warm = [document(10, 50.0, captures=1), document(13, 40.0, captures=1)]
    worst = document(25, 1.3, compilations=2, cause="2 graphs compiled")
    record = record_of(*warm, document(14, 1.0), worst)
    found = documents.summary(record)
    assert (found["documents"], found["captures"], found["compilations"]) == (2, 0, 2)
    assert found["first_s"] == pytest.approx(2.3)
    assert found["first_over_repeated"] == pytest.approx(1.15)
    assert found["eager_over_first"] == pytest.approx(12 / 2.3)
    assert found["worst"] is worst
    text = "\n".join(map(str, documents.tables(record)))
    assert "+300.0 ms" in text and "2 segments + 5: 2 graphs compiled" in text
    assert "yes: at least 5" in text


def test_a_length_that_was_not_measured_again_is_in_no_sum_that_needs_it() -> None:
    record = record_of(document(10, 1.0), document(13, 1.0), document(14, 1.0), document(15, 7.0))
    del record["eager_s"]["15"]
    found = documents.summary(record)
    assert (found["documents"], found["eager_documents"], found["first_s"]) == (2, 1, 8.0)
    assert found["eager_over_first"] == found["eager_s"] / 1.0
    record["eager_s"].clear()
    assert documents.summary(record)["documents"] == 2
    assert "eager / first" not in "\n".join(map(str, documents.tables(record)))
    record["repeated_s"].clear()
    assert documents.summary(record)["worst"] is None
    assert [table.title for table in documents.tables(record)][1:] == [
        "documents of random lengths, segments of 10 (*: not counted)"
    ]


# ---- runs ----


@pytest.mark.slow
def test_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    flags = [*FLAGS, "--segment", "2", "--memory", "1", "--documents", "4", "--max-segments", "4"]
    assert main([*flags, "--seed", "233", "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    assert [d["tokens"] for d in record["documents"]] == record["lengths"] == [4, 8, 2, 6]
    assert [d["captures"] for d in record["documents"]] == [1, 0, 0, 0]  # whole segments all of them
    assert [d["compilations"] for d in record["documents"]] == [0, 0, 0, 0]
    assert set(record["eager_s"]) == set(record["repeated_s"]) == {str(n) for n in record["lengths"]}
    assert all(len(times) >= 7 for times in record["repeated_s"].values())
    assert record["summary"]["documents"] == 2 and record["summary"]["first_over_repeated"] > 0
    out, err = capsys.readouterr()
    assert "2 documents after the first 2" in out and "worst document" in out
    assert "document 4 of 4" in err and "eager" in err


def test_a_document_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The second call of ours fails; the rest runs as it is, since nothing is to be captured here."""

    def broken(self: documents.Session, fast: Any, i: int, tokens: int) -> None:
        if i == 1:
            raise RuntimeError("no such kernel")
        self.record["documents"].append(document(tokens, 1.0))

    def times(self: documents.Session, fast: Any, i: int, tokens: int, of: int) -> None:
        self.record["repeated_s"][str(tokens)] = [1.0, 1.0, 1.0]

    monkeypatch.setattr(documents.Session, "_document", broken)
    monkeypatch.setattr(documents.Session, "_repeated", times)
    path = tmp_path / "run.json"
    assert main([*FLAGS, "--documents", "4", "--max-segments", "2", "--seed", "1", "--out", str(path)]) == 1
    record = json.loads(path.read_text())
    assert len(record["documents"]) == 3 and len(record["eager_s"]) == 3
    assert "RuntimeError: no such kernel" in record["failed"][0]
    assert "no such kernel" in capsys.readouterr().out


def test_budget_ends_a_run_early(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, "--documents", "3", "--budget", "0"]) == 1
    assert "documents: 3 of 3 not begun, the time is up" in capsys.readouterr().out


# ---- flags ----


def test_flags() -> None:
    args = parser().parse_args([*FLAGS, "--documents", "5", "--seed", "7", "--option", "cuda_graphs=False"])
    found = documents_of(args, ())
    assert (found.documents, found.max_segments, found.case.seed, found.case.segment) == (5, 40, 7, 8)
    assert found.options == {"cuda_graphs": False} and found.case.shape.layers == 2


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--documents", "2"], "documents must be more than 2"),
        (["--documents", "5", "--max-segments", "0"], "max-segments must be at least 1"),
        (["--documents", "5", "--segment", "8", "16"], "segments of one length"),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "tiny", *flags]) == 2
    assert line in capsys.readouterr().err
