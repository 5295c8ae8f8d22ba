"""Fitting: levels keep their values for backward as long as there is memory for them; the others run again.

    level      0  1  2  3  4  5  6  7  8  9
    kept       x  x  x  x  x  x                 while what is left suffices for all that follows
    again                        x  x  x  x     from here on: what lies between levels

What a cell keeps, and what lies between levels, is measured while the first levels run, by what is left of
the memory. A launched run decides anew, so that it sees what an optimizer has taken meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from rmtcompile.runtime.base import BaseRun, Level, OnLevel
from rmtcompile.runtime.recompute import Recompute, again

_LOGGER = logging.getLogger("rmtcompile")

SHARE = 0.92
"""Of what is left, as blocks of memory have gaps."""

MOST = 256
"""Shapes of inputs whose measurements are kept."""


def room_on(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where nobody can say."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(total * torch.cuda.memory.get_per_process_memory_fraction(device)) - reserved
    return min(free, allowed) + reserved - torch.cuda.memory_allocated(device)


@dataclass
class Measured:
    """Bytes, as far as they have been seen; those of the largest.

    Attributes:
        cell: what backward keeps of one cell.
        border: what lies between two levels of full width; None before one was run again.
        rest: what the run takes after its last level.
    """

    cell: float = 0
    border: float | None = None
    rest: float = 0


@dataclass
class Fitted:
    """What a run has done.

    Attributes:
        levels: that it had.
        again: how many of these backward runs again.
    """

    levels: int = 0
    again: int = 0


class Fitting:
    """Runs the levels of one run, and decides which of them backward runs again; a run's `on_level`.

    Args:
        room: gives the bytes that are left.
        gradients: bytes that backward takes for gradients of parameters.
        measured: what earlier runs on such inputs have shown; this one adds to it.
        draws: whether levels draw random numbers.
        keeps: False has all levels run again.
    """

    def __init__(
        self, room: Callable[[], int], gradients: int, measured: Measured, draws: bool, keeps: bool = True
    ) -> None:
        self._ask, self._gradients, self._draws = room, gradients, draws
        self.measured, self._keeps = measured, keeps
        self.fitted = Fitted()
        self._widest = self._left = 0  # cells of the widest level, of those that have not run
        self._room = 0
        self._is_ample = False

    def __call__(self, run: BaseRun, level: int, step: Level) -> None:
        """Run a level."""
        grid, measured, done = run.grid, self.measured, self.fitted
        width = len(grid.cells(grid.levels[done.levels]))
        if not done.levels:
            self._left = len(grid.own) * (grid.n_segments - grid.first)
            self._widest = max(len(grid.cells(t)) for t in grid.levels)
            self._room = self._ask()
        is_kept, before = self._is_kept(grid.n_levels - done.levels, width), self._room
        if is_kept:
            step(run, level)
        else:
            again(run, (level,), step, self._draws)
        if not self._is_ample:
            self._room = self._ask()
        taken = max(before - self._room, 0) / width
        if is_kept:
            measured.cell = max(measured.cell, taken)
        else:
            measured.border = max(measured.border or 0, taken * self._widest)
            done.again += 1
        done.levels += 1
        self._left -= width

    def ended(self) -> None:
        """The run has come to its end."""
        if not self._is_ample:
            self.measured.rest = max(self.measured.rest, self._room - self._ask())

    def _is_kept(self, levels: int, width: int) -> bool:
        """Whether the next level's values are kept.

        Args:
            levels: that have not run.
            width: cells of the next one.
        """
        if not self._keeps:
            return False
        cell, border = self.measured.cell, self.measured.border
        if not cell or self._is_ample:
            return True  # one has to be seen
        # Backward holds the values of a level that it runs again, and as much for gradients within it.
        other = self._gradients + 2 * self._widest * cell + 2 * self.measured.rest
        room = SHARE * self._room - other
        self._is_ample = width == self._widest and 4 * cell * self._left <= room
        if cell * self._left <= room:
            return True
        return border is not None and cell * width + border * (levels - 1) <= room


T = TypeVar("T")
Room = Callable[[], int | None]


class Keeping:
    """What training runs of one executor keep for backward.

    Args:
        recompute: see `rmtcompile.optimize`.
        checkpoint: where the forward itself has parts that are run again; empty where it has none.
        draws: whether levels draw random numbers.
        room: gives the bytes that are left; None where nobody can say.

    Attributes:
        block: the levels of a block that backward runs again; 0 where it keeps all, or what fits.
        fits: whether it keeps what fits.
        fitted: what the last run did where it does.
    """

    def __init__(self, recompute: str | int, checkpoint: str, draws: bool, room: Room | None) -> None:
        asked = "level" if recompute == "auto" and checkpoint else recompute
        self.block = asked if isinstance(asked, int) else int(asked == "level")
        self.fits = asked == "auto" and room is not None and room() is not None
        self.fitted = Fitted()
        self._draws, self._ask = draws, room or (lambda: None)
        self._measured: dict[Any, Measured] = {}  # by the shapes of inputs

    @property
    def draws_again(self) -> bool:
        """Whether backward draws random numbers again, as far as runs have shown."""
        return self._draws and bool(self.block or self.fitted.again)

    @property
    def words(self) -> str:
        """What the last run had run again, in words; empty for nothing."""
        if not self.fitted.again:
            return ""
        how_many = f"{self.fitted.again} of {self.fitted.levels} levels"
        return f"backward computes {how_many} again: memory is too short to keep more"

    def run(
        self,
        launch: Callable[[OnLevel | None], T],
        inputs: Sequence[torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
    ) -> T:
        """Launch a run with gradients; into a CUDA graph, too.

        Args:
            launch: takes the run's `on_level`.
            leaves: what gradients may be wanted of.

        Raises:
            torch.OutOfMemoryError: it does not fit with all levels run again, either.
        """
        is_recorded = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if self.block:
            return launch(Recompute(self.block, self._draws))
        if not self.fits or (is_recorded and self._draws):
            return launch(None)
        if len(self._measured) > MOST:
            self._measured.clear()
        measured = self._measured.setdefault(tuple(x.shape for x in inputs), Measured())
        gradients = sum(leaf.nbytes for leaf in leaves.values() if leaf.requires_grad)
        given = (lambda: self._ask() or 0), gradients, measured, self._draws
        fitting, found = Fitting(*given), []
        try:
            found.append(launch(fitting))
        except torch.OutOfMemoryError:  # at its end, say, which has not been seen before
            if is_recorded or fitting.fitted.again == fitting.fitted.levels:
                raise
        if not found:  # not above, where the error still holds what has run
            fitting = Fitting(*given, keeps=False)
            found.append(launch(fitting))
        fitting.ended()
        self._tell(fitting.fitted)
        return found[0]

    def _tell(self, fitted: Fitted) -> None:
        if fitted.again and not self.fitted.again:
            _LOGGER.info("memory is short: %d of %d levels are computed again", fitted.again, fitted.levels)
        self.fitted = fitted


__all__ = ["Fitted", "Fitting", "Keeping", "Measured", "room_on"]
