"""Stages of the compiler: what each took, and what it did to the graph."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx

from rmtcompile.patience import said_after

Progress = Callable[[str], None]
"""Called with a line."""


@dataclass(frozen=True)
class Stage:
    """What one stage did: seconds, and operations by name before and after."""

    name: str
    seconds: float
    before: dict[str, int]
    after: dict[str, int]

    @property
    def difference(self) -> str:
        """`linear: 24 -> 6, cat: 2 -> 0`."""
        names = sorted(self.before.keys() | self.after.keys())
        changed = [(n, self.before.get(n, 0), self.after.get(n, 0)) for n in names]
        return ", ".join(f"{n}: {a} -> {b}" for n, a, b in changed if a != b)


class Log:
    """Times stages, counts operations and reports progress.

    Args:
        progress: called with the name of each stage.
        checks: whether programs are checked between passes (`checks.py`).
    """

    always_checks = False
    """Check in any case, as the tests do."""

    def __init__(self, progress: Progress | None, checks: bool = False) -> None:
        self.checks = checks or self.always_checks
        self.stages: list[Stage] = []
        self.progress = progress

    @contextmanager
    def stage(self, name: str, module: fx.GraphModule | None = None) -> Any:
        before = op_counts(module.graph) if module is not None else {}
        box: list[fx.GraphModule] = []
        start = time.perf_counter()
        if self.progress:
            self.progress(name)
        yield box
        after = op_counts(box[0].graph) if box else before
        self.stages.append(Stage(name, time.perf_counter() - start, before, after))


_LOGGER = logging.getLogger("rmtcompile")


def said_when_long(text: str) -> AbstractContextManager[None]:
    """Log one line, as a warning so that it is seen by default, if the work within takes long."""
    return said_after(_LOGGER.warning, f"rmtcompile: {text}")


def op_counts(graph: fx.Graph) -> dict[str, int]:
    """Operations of a graph by name."""
    return dict(
        Counter(getattr(n.target, "_opname", str(n.target)) for n in graph.nodes if n.op == "call_function")
    )
