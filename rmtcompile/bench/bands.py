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
from rmtcompile.bench import measure, ranks
from rmtcompile.bench.opponents import result_of
from rmtcompile.bench.recording import Recording
from rmtcompile.bench.report import Table, environment_table
from rmtcompile.bench.shapes import Case

LAG = 1

FEW = 2
"""Segments whose results are compared: with random weights the recurrence amplifies rounding, so that later
ones say nothing."""


TABLE: tuple[tuple[str, Sequence[int]], ...] = (("1b", (32768, 131072, 524288)), ("8b", (131072,)))
"""Preset and lengths, in tokens, of the whole table."""


@dataclass(frozen=True)
class Model:
    """A model and its lengths.

    Attributes:
        name: of its shape, in tables.
    """

    name: str
    case: Case
    tokens: Sequence[int]


@dataclass(frozen=True)
class Settings:
    """What one run does; see the command line's help.

    Attributes:
        counts: numbers of devices; 1 is the program on one device.
        ranks: whether bands are also run by a process each.
    """

    models: Sequence[Model]
    counts: Sequence[int]
    rounds: int = 5
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: float = float("inf")
    flags: tuple[str, ...] = ()
    ranks: bool = False


class Session(Recording):
    """Times inputs of each length on each number of devices, in turn."""

    def __init__(
        self, settings: Settings, device: torch.device, save: Callable[[dict[str, Any]], None]
    ) -> None:
        super().__init__(device, settings.budget, save)
        self.settings = settings
        there = torch.cuda.device_count() if device.type == "cuda" else max(settings.counts)
        if max(settings.counts) > there:
            raise ValueError(f"{max(settings.counts)} devices are wanted, and there are {there}")
        self.begin(settings.models[0].case, settings.flags, bands=[])

    def devices(self, count: int) -> list[str]:
        """The first so many."""
        return [f"cuda:{i}" if self.device.type == "cuda" else "cpu" for i in range(count)]

    @torch.no_grad()
    def run(self) -> None:
        """All models and lengths; saved after each of them."""
        for model in self.settings.models:
            self._in_one_process(model)
            if self.settings.ranks:
                self._in_many(model)
        self.record["seconds"] = time.monotonic() - self.started
        self.save(self.record)

    def _in_one_process(self, model: Model) -> None:
        settings, case = self.settings, model.case
        torch.compiler.reset()
        for i, _ in enumerate(self.devices(max(settings.counts))):
            measure.release(torch.device("cuda", i) if self.device.type == "cuda" else self.device)
        if self.is_late:
            self.note(f"{model.name}: not begun, the time is up")
            return
        self.say(f"building {case.shape.layers} layers of width {case.shape.hidden}")
        built = case.build(self.device)
        programs = {}
        for count in settings.counts:
            options: dict[str, Any] = {"progress": self.say, "plan": "diagonal", "cache": False}
            options |= settings.options
            if count > 1:
                options["devices"] = self.devices(count)
            programs[count] = rmtcompile.optimize(built, **options)
        for tokens in model.tokens:
            if self.is_late:
                self.note(f"{model.name}, {tokens} tokens: not begun, the time is up")
                continue
            torch.manual_seed(case.seed)
            self._length(model, tokens, programs, case.ids(tokens, self.device))
            self.save(self.record)

    def _in_many(self, model: Model) -> None:
        """The same in a process a device."""
        settings = self.settings
        for i, _ in enumerate(self.devices(max(settings.counts))):
            measure.release(torch.device("cuda", i) if self.device.type == "cuda" else self.device)
        for count in settings.counts:
            left = self.budget - (time.monotonic() - self.started)
            if count > 1 and left <= 0:
                self.note(f"{model.name}, {count} processes: not begun, the time is up")
            if count == 1 or left <= 0:
                continue
            try:
                rows = ranks.timed(
                    model.case, model.tokens, count, settings.rounds, settings.options, self.device,
                    min(left, 1e9), self.say,
                )  # fmt: skip
            except (RuntimeError, OSError) as error:
                self.note(f"{model.name}, {count} processes: {error}")
                continue
            for row in rows:
                self.say(f"{row['tokens']} tokens, {count} processes: {row['seconds'] * 1e3:.1f} ms")
                self.record["bands"].append({**self._about(model), **row})
            self.save(self.record)

    def _about(self, model: Model) -> dict[str, Any]:
        return {"model": model.name, "segment": model.case.segment}

    def _length(self, model: Model, tokens: int, programs: Mapping[int, Any], ids: Tensor) -> None:
        """One length: everything is warm, then all programs in turn."""
        ready: dict[str, Callable[[], Any]] = {}
        first: Tensor | None = None
        rows: dict[str, dict[str, Any]] = {}
        for count, program in programs.items():
            row: dict[str, Any] = {**self._about(model), "devices": count, "tokens": tokens}
            try:
                before = time.perf_counter()
                for _ in range(3):  # compiled, recorded, replayed
                    result = result_of(program(ids))
                self._wait(count)
                row["warm_seconds"] = time.perf_counter() - before
                few = result[:, : FEW * model.case.segment].float()
                first = few if first is None else first
                row["difference"] = float((few - first).norm() / first.norm())
                executor = program._last[0].executor
                row["recorded"] = executor.recorded
                row["layers"] = [len(own) for own in executor.cut.division.layers] if count > 1 else None
                row["layers"] = row["layers"] or [model.case.shape.layers]
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
    alone = {_what(row): row["seconds"] for row in record["bands"] if row["devices"] == 1}
    rows = []
    for row in sorted(record["bands"], key=lambda row: (*_what(row), row["devices"], "ranks" in row)):
        tokens, count, took = row["tokens"], row["devices"], row["seconds"]
        one = alone.get(_what(row))
        modelled = one * modelled_share(tokens // row["segment"], row["layers"]) if one else None
        parts = (one / count, modelled - one / count, took - modelled) if one and modelled else ()
        rows.append(
            [
                row["model"],
                f"{tokens:,}",
                f"{count} processes" if "ranks" in row else str(count),
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
    header = (
        "model", "tokens", "devices", "ms", "spread", "faster", "modelled ms", shares, "GiB", "difference",
    )  # fmt: skip
    title = f"bands of layers; difference: of the first {FEW} segments, from one device"
    return [environment_table(record["environment"]), Table(title, header, rows)]


def _what(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["model"], row["tokens"]


def modelled_share(segments: int, layers: Sequence[int]) -> float:
    """What a run takes without communication, as a share of the time on one device.

    Args:
        layers: of each band.
    """
    starts = [sum(layers[:i]) for i in range(len(layers))]
    cells = 0
    for level in range(segments + sum(layers) - 1 + LAG * (len(layers) - 1)):
        widths = [
            sum(1 for layer in range(start, start + n) if 0 <= level - LAG * index - layer < segments)
            for index, (start, n) in enumerate(zip(starts, layers, strict=True))
        ]
        cells += max(widths)
    return cells / (segments * sum(layers))


__all__ = ["TABLE", "Model", "Session", "Settings", "modelled_share", "tables"]
