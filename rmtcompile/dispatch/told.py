"""Told: what the user is warned of when there is a new program."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.errors import (
    IgnoredWarning,
    RecaptureWarning,
    RerollError,
    SequentialScheduleWarning,
    UnsupportedError,
    warn,
)
from rmtcompile.options import Options
from rmtcompile.schedule import blocking

_LOGGER = logging.getLogger("rmtcompile")

SLOWER = 1.2
"""Times as long as the model from which on a program is called slower: single runs vary."""

CHANGES = 8
"""Captures in a row for new states of the model after which the user is told."""


class Told:
    """What was said of the programs of one model.

    Attributes:
        changes: captures in a row for states of the model that were new.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.changes = 0
        self._ignored: set[str] = set()
        self._is_told_slower = False

    def of(self, compiled: Compiled) -> None:
        """Say what the user is to know of a program.

        Raises:
            UnsupportedError: no two cells can run together, though that was asked for.
        """
        self._say_ignored(compiled.capture.ignored)
        n_layers, offsets = compiled.program.n_layers, compiled.program.offsets
        blocked = blocking(offsets, n_layers)
        if blocked and self.options.plan != "sequential":
            witness = "; ".join(
                compiled.dependences[offset].described(compiled.layer_paths) for offset in blocked
            )
            message = (
                f"no two cells can run together, the {n_layers} layers run one after the other: {witness}"
            )
            if self.options.plan == "diagonal":
                raise UnsupportedError(
                    message, remedy="use plan='auto' to run it as a compiled sequential program"
                )
            warn(message, SequentialScheduleWarning)

    def captured_anew(self, last: Compiled | None) -> None:
        """Say so where the model's state was another one for each of the last captures.

        Args:
            last: the newest program of such calls.
        """
        change = last.changed() if last is not None else None
        self.changes += change is not None
        if change is not None and self.changes == CHANGES:
            warn(
                f"captured anew at {self.changes} calls in a row, since what the forward reads has changed: "
                f"{change}. Each such call costs a capture; a number that only counts calls can be a buffer "
                "(a tensor), which is carried from call to call",
                RecaptureWarning,
            )

    def alone(self, count: int, error: RerollError) -> None:
        """Say that a program is for one number of segments."""
        _LOGGER.warning(
            "no rules hold for any number of segments (%s): this program is for %d segments alone, and each "
            "other number costs a capture",
            error.what,
            count,
        )

    def finer(self, parts: int, before: float, after: float) -> None:
        """Say that segments are cut into parts."""
        _LOGGER.info(
            "rmtcompile: the model walks each segment in %d parts: on a grid of these a segment takes %.3g "
            "levels, not %.3g",
            parts, after, before,
        )  # fmt: skip

    def took(self, count: int, model: float, program: float) -> None:
        """Say once where the model itself is faster on a CPU: there wavefronts pay for wide layers only.

        Args:
            count: segments of what both have read.
            model, program: seconds.
        """
        if program > SLOWER * model and not self._is_told_slower:
            self._is_told_slower = True
            _LOGGER.warning(
                "rmtcompile: on this CPU %d segments take the program %.3g ms, and the model itself %.3g: so "
                "small a model is better called as it is",
                count, program * 1e3, model * 1e3,
            )  # fmt: skip

    def _say_ignored(self, what: Iterable[str]) -> None:
        """Warn once of each thing that is switched on and has no effect."""
        for text in what:
            if text not in self._ignored:
                self._ignored.add(text)
                warn(f"without effect in the program: {text}", IgnoredWarning)
