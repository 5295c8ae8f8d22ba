"""The time of backward, level by level."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toys import Toy, features, made

import rmtcompile
from rmtcompile.report import Profile
from rmtcompile.schedule.trace import to_chrome_trace


def profiled(**options: object) -> tuple[rmtcompile.Optimized, Profile]:
    fast = rmtcompile.optimize(made(lambda: Toy(3)), **options)  # type: ignore[call-overload]
    return fast, fast.profile(features(6))


@pytest.mark.parametrize("recompute", ["none", "level", 3])
def test_levels_have_their_part_of_backward(recompute: str | int) -> None:
    """All of them, in company nearly all of backward; no gradient is left in a parameter."""
    fast, found = profiled(recompute=recompute)
    assert len(found.backward_us) == fast.schedule.n_levels
    assert min(found.backward_us) > 0 if recompute != 3 else sum(us > 0 for us in found.backward_us) >= 2
    assert sum(found.backward_us) <= 1.01 * found.backward_total_us
    several = (found, *(fast.profile(features(6)) for _ in range(2)))  # others may have run beside one
    assert max(sum(one.backward_us) / one.backward_total_us for one in several) > 0.5
    assert all(parameter.grad is None for parameter in fast.parameters())  # type: ignore[attr-defined]
    assert "backward ms" in str(found) and "backward <b>" in found._repr_html_()
    assert json.loads(found.to_json())["backward_us"] == list(found.backward_us)


def test_without_gradients_there_is_none() -> None:
    with torch.no_grad():
        _, found = profiled()
    assert found.backward_us == () and found.backward_total_us == 0 and "backward" not in str(found)


def test_it_is_shown_behind_the_forward(tmp_path: Path) -> None:
    fast, found = profiled()
    events = json.loads(fast.view(tmp_path / "s.trace.json").read_text())["traceEvents"]
    levels = [event for event in events if event.get("cat") == "level"]
    n = fast.schedule.n_levels
    names = [f"level {t}" for t in range(n)] + [f"backward of level {t}" for t in reversed(range(n))]
    assert [event["name"] for event in levels] == names
    assert levels[n]["ts"] == pytest.approx(levels[n - 1]["ts"] + levels[n - 1]["dur"], abs=0.01)
    assert levels[-1]["dur"] == pytest.approx(found.backward_us[0], abs=0.01)
    page = fast.view(tmp_path / "s.html").read_text()
    assert "backwardUs" in page and "Forwards and backwards" in page
    with pytest.raises(ValueError, match="one time of backward a level"):
        to_chrome_trace(fast.schedule, None, [1.0])
