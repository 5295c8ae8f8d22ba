"""Calls: what a call says about the programs that may run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rmtcompile.binding.captured import Capture
from rmtcompile.binding.guard import layouts_of
from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.layouts import Layout
from rmtcompile.ir.segmentation import Segmentation


class TooFewSegments(UnsupportedError):
    """An input so short that the program does not cover it, and for which there is none of its own."""


@dataclass(frozen=True)
class Call:
    """One call's segmentation, number of segments, and the key of the programs that may run it.

    Attributes:
        first: segments that were read by earlier calls.
        by_itself: whether the text begins and ends with it, and shares no level with another one: then it may
            run as one with a rest where it has none.
    """

    segmentation: Segmentation
    count: int
    key: Any
    first: int = 0
    by_itself: bool = False

    @property
    def total(self) -> int:
        """Segments of the text so far."""
        return self.first + self.count


class Layouts:
    """How inputs lie in memory, where the forward was seen to do something else then: part of the key of
    programs, but for the way of the first capture."""

    def __init__(self) -> None:
        self._first: tuple[Layout, ...] | None = None

    def captured(self, capture: Capture, args: Any, kwargs: Any) -> None:
        """Note a capture for these arguments."""
        if capture.by_layout and self._first is None:
            self._first = layouts_of(args, kwargs)

    def of(self, args: Any, kwargs: Any) -> tuple[Layout, ...]:
        """Empty where it does not matter, or is as in the first capture that showed it."""
        layouts = () if self._first is None else layouts_of(args, kwargs)
        return () if layouts == self._first else layouts
