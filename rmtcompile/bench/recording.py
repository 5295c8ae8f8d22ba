"""Recording: what every benchmark session keeps: its record, what failed in it, and how much time is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch


class Recording:
    """Fills `record`, which is what the JSON file holds.

    Args:
        budget: seconds after which nothing new is begun.
        save: writes the record as it is.

    Attributes:
        failed: what failed, in words.
    """

    def __init__(self, device: torch.device, budget: float, save: Callable[[dict[str, Any]], None]) -> None:
        self.device, self.budget, self.save = device, budget, save
        self.started = time.monotonic()
        self.failed: list[str] = []
        self.record: dict[str, Any] = {}

    @property
    def is_late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() - self.started >= self.budget

    def say(self, line: str) -> None:
        """A line of progress on stderr."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {line}", file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """Note what has failed, and say so."""
        self.failed.append(line)
        self.say(line)
