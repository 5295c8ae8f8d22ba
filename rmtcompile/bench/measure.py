"""Clocks, memory and ceilings: how figures are taken."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """One run by the host's clock, from an idle device to an idle device."""
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def event_seconds(function: Callable[[], Any], repeat: int) -> list[float]:
    """Runs back to back on a CUDA device, each by the device's clock; the first two do not count."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 3)]
    for mark in marks[:-1]:
        mark.record()
        function()
    marks[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(marks[2:])]


def in_turn(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, turn: float = 0.25
) -> dict[str, list[float]]:
    """Time functions in turn, so that drifting clocks touch all of them alike.

    Each round runs each function once untimed, where it is short, and then as often as fits into `turn`
    seconds, at least once and at most ten times; each round begins with another one.  Returns all times.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turning in range(rounds):
        first = turning % len(names) if names else 0
        for name in names[first:] + names[:first]:
            function = functions[name]
            last = times[name][-1] if times[name] else seconds(function, device)
            if last < turn:
                function()
            for _ in range(max(1, min(10, int(turn / max(last, 1e-9))))):
                times[name].append(seconds(function, device))
    return times


@dataclass(frozen=True)
class Spread:
    """Several times of one thing, in seconds."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, times: list[float]) -> Spread:
        """Median, and the quartiles around it (the extremes below four times)."""
        if len(times) < 4:
            return cls(statistics.median(times), min(times), max(times), len(times))
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
        return cls(middle, low, high, len(times))

    @property
    def relative(self) -> float:
        """Half the distance of the quartiles, over the median."""
        return (self.high - self.low) / 2 / self.median


class Memory:
    """Device memory around pieces of work, in bytes; zeros on a CPU.

    What a piece holds afterwards is told by what the allocator has reserved, since the private pools of CUDA
    graphs count there and not among allocations; what a run needs while it lasts, by the peak of allocations.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held = 0
        self.peak = 0

    def _reserved(self) -> int:
        release(self.device)
        return torch.cuda.memory_reserved(self.device)

    def holding(self, function: Callable[[], Any]) -> Any:
        """Run `function`; `held` is what stays reserved, `peak` what was allocated more at the peak."""
        if self.device.type != "cuda":
            return function()
        before, allocated = self._reserved(), torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            return function()
        finally:
            self.peak = torch.cuda.max_memory_allocated(self.device) - allocated
            self.held = self._reserved() - before

    def running(self, function: Callable[[], Any]) -> Any:
        """Run `function`; `peak` is what was allocated more than before at the peak, results included."""
        if self.device.type != "cuda":
            return function()
        torch.cuda.synchronize(self.device)
        allocated = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = function()
        torch.cuda.synchronize(self.device)
        self.peak = torch.cuda.max_memory_allocated(self.device) - allocated
        return result


def allocated(device: torch.device) -> int:
    """Bytes of the device that are allocated now; zero on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes allocated at the peak of a run, what was there before included; zero on a CPU. A run that records
    CUDA graphs allocates what they use; one that replays them does not."""
    if device.type != "cuda":
        function()
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def reserved(device: torch.device) -> int:
    """Bytes that the allocator holds: with the memory pools of CUDA graphs, and with gaps between blocks.
    Zero on a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def product_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on random data: 8192 wide on CUDA, 512 wide on a CPU."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * size**3 / _median(lambda: torch.mm(a, b, out=out), device, 50)


def copy_ceiling(device: torch.device) -> float:
    """Bytes per second of a large copy, bytes read and written counted."""
    size = 1 << (31 if device.type == "cuda" else 24)
    a = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    return 2.0 * size / _median(lambda: b.copy_(a), device, 20)


def _median(function: Callable[[], Any], device: torch.device, repeat: int) -> float:
    if device.type == "cuda":
        return statistics.median(event_seconds(function, repeat))
    return statistics.median(seconds(function, device) for _ in range(5))
