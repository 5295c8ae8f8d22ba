"""Calls: what a call says about the programs that may run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rmtcompile.errors import UnsupportedError
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
