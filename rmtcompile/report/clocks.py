"""Clocks: when something happened on a device, or in another process, by one clock.

    device    .......... zero ........ begin .... end        events; only their own device can tell them apart
    host      before ─────┘ └───── after                     zero happened between the two

    rank 0    enters a collective ──────── leaves it         nobody leaves before all have entered, so that
    rank 1         enters it ─────────────── leaves it       either clock bounds the other one
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_TRIES = 16


def now() -> float:
    """Microseconds by this host's clock."""
    return time.perf_counter() * 1e6


class DeviceClock:
    """Tells when work on a device begins and ends, by the host's clock.

    A CPU has no other clock. A CUDA device has one of its own, which tells how far two of its events are
    apart, to half a microsecond. One event, on the idle device, is recorded and waited for between two looks
    at the host's clock, some times; the closest two looks say when it happened, to half of the time between
    them: some ten microseconds. Two devices are compared through the host, so that they may be apart by both
    of these, and by what their clocks drift during a run.

    Attributes:
        exact_us: how far what it tells may be off, without drift.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._zero: Any = None
        self._zero_us = self.exact_us = 0.0
        if device.type == "cuda":
            self.exact_us, self._zero_us, self._zero = min(
                (self._looked() for _ in range(_TRIES)), key=lambda look: look[0]
            )

    def _looked(self) -> tuple[float, float, Any]:
        torch.cuda.synchronize(self._device)
        before = now()
        event = self.mark()
        event.synchronize()
        after = now()
        return (after - before) / 2, (before + after) / 2, event

    def mark(self) -> Any:
        """Note when the device comes to this place of its current stream."""
        if self._device.type != "cuda":
            return now()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def at(self, mark: Any) -> float:
        """When that was, in microseconds by the host's clock; the device has come there."""
        if self._device.type != "cuda":
            return float(mark)
        return self._zero_us + float(self._zero.elapsed_time(mark)) * 1e3


def offsets(gathered: Callable[[Any], list[Any]]) -> list[tuple[float, float]]:
    """How far the clock of each process is ahead of the first one's, and how far off that may be, in
    microseconds; the same on all processes.

    Args:
        gathered: gives all processes what each of them says, and returns on none before all have called it.
    """
    looks = []
    for _ in range(_TRIES):
        entered = now()
        gathered(None)
        looks.append((entered, now()))
    everyone = gathered(looks)
    found = []
    for looked in everyone:
        pairs = list(zip(looked, everyone[0], strict=True))
        least = max(entered - other_left for (entered, _), (_, other_left) in pairs)
        most = min(left - other_entered for (_, left), (other_entered, _) in pairs)
        found.append(((least + most) / 2, (most - least) / 2))
    return [(0.0, 0.0), *found[1:]]
