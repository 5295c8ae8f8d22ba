"""Bands of layers on several devices, beside the same program on one.

What could be reached is printed beside what was measured: T = (S + L - 1 + lag (P - 1)) t(L / P), where a
level of L / P layers takes 1 / P of a level of all layers, and a band is a level (lag 1) behind the one
before.
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

LAG = 1


@dataclass(frozen=True)
class Settings:
    """What one run does; see the command line's help.

    Attributes:
        counts: numbers of devices; 1 is the program on one device.
        check: up to how many tokens results are compared with those on one device.
    """

    case: Case
    tokens: Sequence[int]
    counts: Sequence[int]
    rounds: int = 5
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: float = float("inf")
    flags: tuple[str, ...] = ()
    check: int = 32768


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
            options: dict[str, Any] = {"progress": self.say, "plan": "diagonal", **settings.options}
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
                if tokens <= self.settings.check:
                    first = result if first is None else first
                    row["difference"] = float((result.float() - first.float()).norm() / first.float().norm())
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
    """What was measured, and what could be reached."""
    layers, segment = record["layers"], record["segment"]
    alone = {row["tokens"]: row["seconds"] for row in record["bands"] if row["devices"] == 1}
    rows = []
    for row in sorted(record["bands"], key=lambda row: (row["tokens"], row["devices"])):
        tokens, count, took = row["tokens"], row["devices"], row["seconds"]
        one, levels = alone.get(tokens), tokens // segment + layers - 1
        modelled = one * (levels + LAG * (count - 1)) / levels / count if one else None
        rows.append(
            [
                f"{tokens:,}",
                str(count),
                f"{took * 1e3:.1f}",
                f"{row['low'] * 1e3:.1f} .. {row['high'] * 1e3:.1f}",
                f"{one / took:.2f}x" if one else "",
                f"{modelled * 1e3:.1f}" if modelled else "",
                ", ".join(f"{gib:.1f}" for gib in row["gib"]),
                f"{row['difference']:.1e}" if "difference" in row else "",
            ]
        )
    header = ("tokens", "devices", "ms", "spread", "faster", "modelled ms", "GiB", "difference")
    title = "bands of layers; modelled: (S + L - 1 + P - 1) levels of L / P layers"
    return [environment_table(record["environment"]), Table(title, header, rows)]


__all__ = ["Session", "Settings", "tables"]
