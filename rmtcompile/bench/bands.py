"""Bands of layers on several devices, beside the same program on one.

What could be reached is printed beside what was measured: a level takes as long as the band that has most
cells on it, and a cell as long as on one device.  A band is a level behind the one before (lag 1), so that
T = T1 / (S L) * (sum of the largest number of cells of a band on each of S + L - 1 + P - 1 levels).
Of that, T1 / P is compute and the rest is fill; what was measured beyond it is communication and the host.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import rmtcompile
from rmtcompile.bench import measure
from rmtcompile.bench.opponents import result_of
from rmtcompile.bench.recording import Recording
from rmtcompile.bench.report import Table, environment_table
from rmtcompile.bench.shapes import Case
from rmtcompile.passes.bands import even

LAG = 1

FEW = 2
"""Segments whose results are compared: with random weights the recurrence amplifies rounding, so that later
ones say nothing."""


@dataclass(frozen=True)
class Settings:
    """What one run does; see the command line's help.

    Attributes:
        counts: numbers of devices; 1 is the program on one device.
    """

    case: Case
    tokens: Sequence[int]
    counts: Sequence[int]
    rounds: int = 5
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: float = float("inf")
    flags: tuple[str, ...] = ()


class Session(Recording):
    """Times inputs of each length on each number of devices, in turn."""

    def __init__(
        self, settings: Settings, device: torch.device, save: Callable[[dict[str, Any]], None]
    ) -> None:
        super().__init__(device, settings.budget, save)
        self.settings = settings
        case = settings.case
        there = torch.cuda.device_count() if device.type == "cuda" else max(settings.counts)
        if max(settings.counts) > there:
            raise ValueError(f"{max(settings.counts)} devices are wanted, and there are {there}")
        self.begin(case, settings.flags, layers=case.shape.layers, bands=[])

    def devices(self, count: int) -> list[str]:
        """The first so many."""
        return [f"cuda:{i}" if self.device.type == "cuda" else "cpu" for i in range(count)]

    @torch.no_grad()
    def run(self) -> None:
        """All lengths; saved after each of them."""
        settings, case = self.settings, self.settings.case
        torch.compiler.reset()
        measure.release(self.device)
        self.say(f"building {case.shape.layers} layers of width {case.shape.hidden}")
        model = case.build(self.device)
        programs = {}
        for count in settings.counts:
            options: dict[str, Any] = {"progress": self.say, "plan": "diagonal", "cache": False}
            options |= settings.options
            if count > 1:
                options["devices"] = self.devices(count)
            programs[count] = rmtcompile.optimize(model, **options)
        for tokens in settings.tokens:
            if self.is_late:
                self.note(f"{tokens} tokens: not begun, the time is up")
                continue
            torch.manual_seed(case.seed)
            self._length(tokens, programs, case.ids(tokens, self.device))
            self.save(self.record)
        self.record["seconds"] = time.monotonic() - self.started
        self.save(self.record)

    def _length(self, tokens: int, programs: Mapping[int, Any], ids: Tensor) -> None:
        """One length: everything is warm, then all programs in turn."""
        ready: dict[str, Callable[[], Any]] = {}
        first: Tensor | None = None
        rows: dict[str, dict[str, Any]] = {}
        for count, program in programs.items():
            row: dict[str, Any] = {"devices": count, "tokens": tokens}
            try:
                before = time.perf_counter()
                for _ in range(3):  # compiled, recorded, replayed
                    result = result_of(program(ids))
                self._wait(count)
                row["warm_seconds"] = time.perf_counter() - before
                few = result[:, : FEW * self.settings.case.segment].float()
                first = few if first is None else first
                row["difference"] = float((few - first).norm() / first.norm())
                row["recorded"] = program._last[0].executor.recorded
                on = range(count if ids.is_cuda else 0)
                row["gib"] = [torch.cuda.max_memory_allocated(i) / 2**30 for i in on]
                ready[str(count)] = self._timed(program, ids, count)
                rows[str(count)] = row
            except Exception as error:  # the others are measured all the same
                traceback.print_exc()
                self.note(f"{count} devices, {tokens} tokens: {type(error).__name__}: {error}")
        times = measure.in_turn(ready, self.device, self.settings.rounds)
        for name, row in rows.items():
            spread = measure.Spread.of(times[name])
            row |= {"seconds": spread.median, "low": spread.low, "high": spread.high, "count": spread.count}
            self.say(f"{tokens} tokens, {name} devices: {spread.median * 1e3:.1f} ms")
            self.record["bands"].append(row)

    def _timed(self, program: Callable[..., Any], ids: Tensor, count: int) -> Callable[[], None]:
        def run() -> None:
            program(ids)
            self._wait(count)

        return run

    def _wait(self, count: int) -> None:
        for device in self.devices(count):
            measure.synchronise(torch.device(device))


def tables(record: Mapping[str, Any]) -> list[Table]:
    """What was measured, and what could be reached: seconds, and shares of them."""
    layers, segment = record["layers"], record["segment"]
    alone = {row["tokens"]: row["seconds"] for row in record["bands"] if row["devices"] == 1}
    rows = []
    for row in sorted(record["bands"], key=lambda row: (row["tokens"], row["devices"])):
        tokens, count, took = row["tokens"], row["devices"], row["seconds"]
        one = alone.get(tokens)
        modelled = one * modelled_share(tokens // segment, layers, count) if one else None
        parts = (one / count, modelled - one / count, took - modelled) if one and modelled else ()
        rows.append(
            [
                f"{tokens:,}",
                str(count),
                f"{took * 1e3:.1f}",
                f"{row['low'] * 1e3:.1f} .. {row['high'] * 1e3:.1f}",
                f"{one / took:.2f}x" if one else "",
                f"{modelled * 1e3:.1f}" if modelled else "",
                ", ".join(f"{share / took:.0%}" for share in parts),
                ", ".join(f"{gib:.1f}" for gib in row["gib"]),
                f"{row['difference']:.1e}" if "difference" in row else "",
            ]
        )
    shares = "compute, fill, rest"
    header = ("tokens", "devices", "ms", "spread", "faster", "modelled ms", shares, "GiB", "difference")
    title = f"bands of layers; difference: of the first {FEW} segments, from one device"
    return [environment_table(record["environment"]), Table(title, header, rows)]


def modelled_share(segments: int, layers: int, count: int) -> float:
    """What a run in so many bands takes without communication, as a share of the time on one device."""
    cells = 0
    for level in range(segments + layers - 1 + LAG * (count - 1)):
        widths = [
            sum(1 for layer in band if 0 <= level - LAG * index - layer < segments)
            for index, band in enumerate(even(layers, count))
        ]
        cells += max(widths)
    return cells / (segments * layers)


__all__ = ["Session", "Settings", "modelled_share", "tables"]
