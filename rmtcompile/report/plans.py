"""What the runtime measured to choose a plan: the one place where reports ask it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an executor says about its plans.

    Attributes:
        seconds: of one call by each plan, by name; empty if it measured none.
        chosen: the plan that runs this number of segments; "" if there was no choice.
        compile_seconds: time in which the backend compiled the cell functions; None if it is not known.
    """

    seconds: Mapping[str, float]
    chosen: str = ""
    compile_seconds: float | None = None


def measured_plans(executor: Any, segments: int) -> Measured:
    """Ask an executor; it need not know anything.

    What it may have: `plan_seconds(segments)`, a mapping from plans to seconds; `plan_for(segments)`, the
    name of the plan that runs; `compile_seconds`.
    """
    seconds, chosen = getattr(executor, "plan_seconds", None), getattr(executor, "plan_for", None)
    return Measured(
        dict(seconds(segments)) if seconds is not None else {},
        str(chosen(segments)) if chosen is not None else "",
        getattr(executor, "compile_seconds", None),
    )
