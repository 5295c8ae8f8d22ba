"""Rests that are run before they come: which, and that nothing else changes by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saving import armt, tokens
from toys import assert_same

import rmtcompile
from rmtcompile.dispatch import rehearsal


@torch.no_grad()
def test_rests_all_over_a_segment_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = armt()
    fast = rmtcompile.optimize(model)
    for x in tokens((1, 29), (1, 27)):
        assert_same(model(x), fast(x))
    entry = fast._last[0]
    assert not rehearsal.is_due(entry), "on a CPU there are no kernels to be loaded"
    launched: list[Any] = []
    launch = type(entry.executor).launch

    def noting(self: Any, segments: int, inputs: list[torch.Tensor], *more: Any) -> Any:
        launched.append((segments, inputs[0].shape[1]))
        return launch(self, segments, inputs, *more)

    monkeypatch.setattr(type(entry.executor), "launch", noting)
    numbers, captures = torch.get_rng_state(), fast.captures
    done = rehearsal.rehearse(fast._programs._families, entry, (x,), {})
    assert done == [2, 3, 4, 5, 6, 7]
    segments = entry.compiled.rolled.proved_on[0]
    assert launched == [(segments, (segments - 1) * 8 + rest) for rest in done]
    assert torch.equal(numbers, torch.get_rng_state())
    assert fast.captures == captures
    assert entry.trial.rules.is_rehearsed
    for x in tokens((1, 13), (1, 30), (1, 16)):
        assert_same(model(x), fast(x))


@torch.no_grad()
def test_it_is_done_once_where_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[bool] = []
    rehearse = rehearsal.rehearse

    def due(entry: Any) -> bool:
        return entry.trial is not None and not entry.trial.rules.is_rehearsed

    monkeypatch.setattr(rehearsal, "is_due", due)
    monkeypatch.setattr(rehearsal, "rehearse", lambda *given: times.append(bool(rehearse(*given))))
    fast = rmtcompile.optimize(armt())
    for x in tokens((1, 29), (1, 27), (1, 26), (1, 13), (1, 24)):
        fast(x)
    assert times == [True]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_in_16_bits_refutes_no_rules(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may grow beyond all bounds in eight segments; in as many as were captured it does not."""
    fast = rmtcompile.optimize(armt().to(dtype))
    difference = type(fast._programs).difference

    def rounded(self: Any, entry: Any, count: int, *given: Any, **more: Any) -> Any:
        is_long = entry.trial is not None and count > entry.compiled.rolled.proved_on[-1]
        return "it differs" if is_long else difference(self, entry, count, *given, **more)

    monkeypatch.setattr(type(fast._programs), "difference", rounded)
    for x in tokens((1, 29), (1, 27), (1, 26), (1, 45)):
        fast(x)
    assert fast.captures == 2 if dtype == torch.bfloat16 else fast.captures > 2
