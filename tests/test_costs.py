"""runtime/costs.py: the plan that is measured to be cheaper is the one that runs."""

from __future__ import annotations

import copy

import pytest
import torch
from toys import Toy, assert_equal_runs, features, made

import rmtcompile
from rmtcompile.runtime.costs import Costs
from rmtcompile.runtime.execute import Executor


def test_wavefronts_pay_where_cells_in_company_are_cheaper() -> None:
    assert Costs(alone=1.0, full=3.9, width=4, n_layers=4, alpha=1).wavefront_pays
    assert not Costs(alone=1.0, full=4.1, width=4, n_layers=4, alpha=1).wavefront_pays


def test_seconds() -> None:
    """Levels of one and of four cells cost what was measured; the plans agree where no cell has company."""
    costs = Costs(alone=2.0, full=5.0, width=4, n_layers=4, alpha=1)
    assert costs.seconds(1) == {"diagonal": 8.0, "sequential": 8.0}
    found = costs.seconds(5)  # widths 1 2 3 4 4 3 2 1
    assert found["diagonal"] == pytest.approx(2 * (2 + 3 + 4 + 5)) and found["sequential"] == 40.0


@torch.no_grad()
def test_a_measured_choice_is_what_runs_and_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Costs(alone=1.0, full=9.0, width=3, n_layers=3, alpha=1)
    monkeypatch.setattr(Executor, "measure", lambda self, inputs: slow)
    model = made(Toy)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(segments) for segments in (4, 4, 1, 7)])
    assert fast.schedule.alpha == 3 and set(fast.schedule.widths) == {1}
    assert "level of cell (s, l): 3 * s + l" in fast.code
    assert "sequential" in str(fast.explain()) and fast.captures == 1


@torch.no_grad()
def test_a_plan_that_was_asked_for_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Costs(alone=1.0, full=9.0, width=3, n_layers=3, alpha=1)
    monkeypatch.setattr(Executor, "measure", lambda self, inputs: slow)
    fast = rmtcompile.optimize(made(Toy), plan="diagonal")
    fast(features(4))
    assert fast.schedule.alpha == 1


@torch.no_grad()
def test_the_time_of_compiling_is_told() -> None:
    fast = rmtcompile.optimize(made(Toy), backend="aot_eager")
    fast(features(4))
    told = fast.explain()
    assert told.compile_seconds is not None and told.compile_seconds > 0
    assert "cell functions, by aot_eager" in str(told)
    eager = rmtcompile.optimize(made(Toy))
    eager(features(4))
    assert eager.explain().compile_seconds is None
