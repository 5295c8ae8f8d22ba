"""stages.py: work that takes long is not done in silence."""

from __future__ import annotations

import time

import pytest
from toys import Toy, features, made

import rmtcompile
from rmtcompile import patience
from rmtcompile.compiler.stages import said_when_long


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "rmtcompile"]


def test_a_long_capture_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.0)
    fast = rmtcompile.optimize(made(Toy))
    fast(features(3))
    fast(features(5))
    assert len(said(caplog)) == 1 and said(caplog)[0].startswith("rmtcompile: capturing the forward")


def test_with_progress_nothing_else_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.0)
    lines: list[str] = []
    rmtcompile.optimize(made(Toy), progress=lines.append)(features(3))
    assert lines and not said(caplog)


def test_what_is_quick_is_not_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.05)
    with said_when_long("quick"):
        pass
    with said_when_long("slow"):
        time.sleep(0.2)
    assert said(caplog) == ["rmtcompile: slow"]
