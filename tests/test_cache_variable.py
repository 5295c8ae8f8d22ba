"""RMTCOMPILE_CACHE: the folder of programs where `cache` is not given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys import Toy, features, made

import rmtcompile


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RMTCOMPILE_CACHE", str(tmp_path / "programs"))
    return tmp_path / "programs"


@torch.no_grad()
def test_programs_are_kept_where_the_variable_says(folder: Path) -> None:
    expected = made(Toy)(features(3))
    rmtcompile.optimize(made(Toy))(features(3))
    assert any(folder.rglob("*.py"))
    fast = rmtcompile.optimize(made(Toy))
    fast.prepare(features(3))
    assert "saved      loaded from a folder" in str(fast.explain())
    assert torch.allclose(fast(features(3)), expected)


def test_what_is_given_wins(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Toy)
    assert rmtcompile.optimize(model).options.cache == str(folder)
    assert rmtcompile.optimize(model, cache=tmp_path / "x").options.cache == str(tmp_path / "x")
    assert rmtcompile.optimize(model, cache=False).options.cache is None
    folder.mkdir()
    assert rmtcompile.load(folder, model).options.cache is None  # it writes nothing
    assert rmtcompile.install(model).options.cache == str(folder)
    rmtcompile.uninstall(model)
    monkeypatch.setenv("RMTCOMPILE_CACHE", "")
    assert rmtcompile.optimize(model).options.cache is None
    with pytest.raises(ValueError, match="cache must be the path of a folder, or False for none, not True"):
        rmtcompile.optimize(model, cache=True)
