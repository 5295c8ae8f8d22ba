"""One run of the benchmark: build the model and its opponents, check them, time them in turn, look closer."""

from __future__ import annotations

import contextlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rmtcompile.bench import kernels, measure, numerics
from rmtcompile.bench.opponents import Diagonal, Full, Graphed, Handwritten, Opponent, Sequential, Skipped
from rmtcompile.bench.recording import Recording, environment
from rmtcompile.bench.shapes import Case, parameter_bytes
from rmtcompile.models import ARMT

LARGEST_COMPARED = 8 << 30
"""Bytes of a result above which results are not compared with each other: both would have to be kept."""


@dataclass(frozen=True)
class Settings:
    """What one run does; see the command line's help."""

    cases: tuple[Case, ...]
    tokens: tuple[int, ...]
    opponents: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    handwritten: Path | None = None
    rounds: int = 5
    error_tokens: int = 0
    accumulation: int = 0
    profile: bool = False
    wavefronts: bool = False
    budget: float = float("inf")
    flags: tuple[str, ...] = ()


class Session(Recording):
    """Times the ways of running a model; pieces that fail are noted and the rest goes on."""

    def __init__(
        self, settings: Settings, device: torch.device, save: Callable[[dict[str, Any]], None]
    ) -> None:
        super().__init__(device, settings.budget, save)
        self.settings = settings
        self.record = {
            "environment": environment(device, settings.flags),
            "models": [],
            "ceilings": [],
        }

    def run(self) -> None:
        """Everything, model by model; saved after each piece."""
        with torch.no_grad():
            self._ceilings()
            for case in self.settings.cases:
                if self._in_time(f"segments of {case.segment}"):
                    self._case(case)
            self._ceilings()
        self.record["seconds"] = time.monotonic() - self.started
        self.record["failed"] = self.failed
        self.save(self.record)

    # ---- pieces ----

    def _case(self, case: Case) -> None:
        entry: dict[str, Any] = {
            "shape": asdict(case.shape),
            "case": {k: str(v) for k, v in asdict(case).items() if k != "shape"},
            "segment": case.segment,
            "cell": {"flops": case.batch * case.cell_flops(), "bytes": case.cell_bytes()},
            "opponents": {},
            "rows": [],
        }
        self.record["models"].append(entry)
        torch.compiler.reset()  # of the model before: its compiled forms would count against this one's
        measure.release(self.device)
        self.say(
            f"building {case.shape.layers} layers of width {case.shape.hidden}, segments of {case.segment}"
        )
        model = case.build(self.device)
        entry["weights_bytes"] = parameter_bytes(model)
        opponents = self._opponents(case, model, entry)
        if self.settings.error_tokens and self._in_time("errors"):
            self._errors(case, model, opponents, entry)
        for tokens in self.settings.tokens:
            if self._in_time(f"{tokens} tokens"):
                self._length(case, tokens, opponents, entry)
                self.save(self.record)
        diagonal = next((o for o in opponents if isinstance(o, Diagonal)), None)
        if self.settings.profile and self._in_time("profile"):
            self._profile(case, opponents, entry)
        if self.settings.wavefronts and diagonal is not None and self._in_time("wavefronts"):
            with self._noting("wavefronts"):
                self.say("timing wavefronts")
                entry["wavefronts"] = wavefront_seconds(diagonal, self.device)
        if self.settings.accumulation and self._in_time("accumulation"):
            self._accumulation(case, model, opponents, entry)
        self.save(self.record)

    def _opponents(self, case: Case, model: ARMT, entry: dict[str, Any]) -> list[Opponent]:
        """Build and compile those that take part; the optimized model first, since it moves the weights."""
        wanted = self.settings.opponents
        makers: dict[str, Callable[[], Opponent]] = {}
        if "diagonal" in wanted:
            makers["diagonal"] = lambda: Diagonal(case, model, self.settings.options, say=self.say)
        for name, options in self.settings.variants.items():
            mixed = {**self.settings.options, **options}
            makers[name] = lambda name=name, mixed=mixed: Diagonal(case, model, mixed, name, True, self.say)  # type: ignore[misc]
        if "graphed" in wanted:
            makers["graphed"] = lambda: Graphed(case, model)
        if "sequential" in wanted:
            makers["sequential"] = lambda: Sequential(case, model)
        if "full" in wanted:
            makers["full"] = lambda: Full(case, model)
        if self.settings.handwritten is not None:
            path = self.settings.handwritten
            makers["handwritten"] = lambda: Handwritten(case, path)
        made: list[Opponent] = []
        ids = case.ids(min(self.settings.tokens), self.device)
        for name, make in makers.items():
            self.say(f"{name}: first call, {ids.shape[1]} tokens")
            about: dict[str, Any] = {"held_bytes": 0}
            entry["opponents"][name] = about
            memory = measure.Memory(self.device)
            with self._noting(name, about):
                start = time.perf_counter()
                opponent = memory.holding(lambda make=make: prepared(make, ids))  # type: ignore[misc]
                about["first_call_s"] = time.perf_counter() - start
                about["held_bytes"] = max(0, memory.held - opponent.own_bytes)
                about["first_call_peak_bytes"] = max(0, memory.peak - opponent.own_bytes)
                if isinstance(opponent, Graphed) and opponent.runner.attention:
                    about["attention"] = opponent.runner.attention
                if isinstance(opponent, Diagonal):
                    about["schedule"] = schedule_of(opponent)
                    about["stages"] = stages_of(opponent)
                made.append(opponent)
                self.say(f"{name}: ready after {about['first_call_s']:.1f} s")
        return made

    def _length(self, case: Case, tokens: int, opponents: list[Opponent], entry: dict[str, Any]) -> None:
        """Time all opponents in turn on one input."""
        ids = case.ids(tokens, self.device)
        rows: dict[str, dict[str, Any]] = {}
        reference: torch.Tensor | None = None
        ready: dict[str, Opponent] = {}
        for opponent in sorted(opponents, key=lambda o: o.name != "sequential"):
            row: dict[str, Any] = {"tokens": tokens, "opponent": opponent.name}
            rows[opponent.name] = row
            with self._noting(f"{opponent.name}, {tokens} tokens", row):
                self.say(f"{tokens} tokens: {opponent.name}")
                reference = self._prepare(opponent, ids, row, entry["opponents"][opponent.name], reference)
                ready[opponent.name] = opponent
        del reference
        functions = {name: (lambda o=o: o(ids)) for name, o in ready.items()}
        self.say(f"{tokens} tokens: {self.settings.rounds} rounds of {', '.join(functions)}")
        with self._noting(f"timing, {tokens} tokens"):
            times = measure.in_turn(functions, self.device, self.settings.rounds)
            for name, taken in times.items():
                spread = measure.Spread.of(taken)
                flops = ready[name].flops(tokens)
                rows[name].update(asdict(spread), flops=flops, flops_per_s=flops / spread.median, times=taken)
                self.say(f"{tokens} tokens: {name} {spread.median * 1e3:.2f} ms +- {spread.relative:.1%}")
        entry["rows"].extend(rows.values())

    def _prepare(
        self,
        opponent: Opponent,
        ids: torch.Tensor,
        row: dict[str, Any],
        about: dict[str, Any],
        reference: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """First runs at a length: memory, and the difference from the sequential forward."""
        memory = measure.Memory(self.device)
        start = time.perf_counter()
        memory.holding(lambda: opponent.prepare(ids))
        row["prepare_s"] = time.perf_counter() - start
        about["held_bytes"] += memory.held
        result = memory.running(lambda: opponent(ids))
        row["held_bytes"], row["peak_bytes"] = about["held_bytes"], memory.peak
        row["result_bytes"] = result.numel() * result.element_size()
        row["beyond_weights_bytes"] = about["held_bytes"] + memory.peak
        if isinstance(opponent, Diagonal):
            row["workspace_s"] = dict(opponent.fast.explain().workspace_seconds)
        if not opponent.recurrent or row["result_bytes"] > LARGEST_COMPARED:
            return reference
        if opponent.name == "sequential":
            return result
        if reference is not None:
            row["difference_from_sequential"] = numerics.relative_error(result, reference)
        return reference

    def _errors(self, case: Case, model: ARMT, opponents: list[Opponent], entry: dict[str, Any]) -> None:
        tokens = max(case.segment, self.settings.error_tokens // case.segment * case.segment)
        self.say(f"errors against float64, {tokens} tokens")
        runs = {o.name: o for o in opponents if o.recurrent}
        with self._noting("errors"):
            entry["errors"] = numerics.errors(model, runs, case.ids(tokens, self.device))
            for name, error in entry["errors"]["relative_error"].items():
                self.say(f"errors: {name} {error:.3e}")

    def _accumulation(
        self, case: Case, model: ARMT, opponents: list[Opponent], entry: dict[str, Any]
    ) -> None:
        tokens = max(case.segment, self.settings.accumulation // case.segment * case.segment)
        self.say(f"accumulation of errors over {tokens} tokens")
        runs = {o.name: o for o in opponents if o.recurrent and o.name != "graphed"}
        with self._noting("accumulation"):
            if case.head:
                raise Skipped("needs a model without head: hidden states of every token are kept")
            entry["accumulation"] = numerics.accumulation(model, runs, case.ids(tokens, self.device))

    def _profile(self, case: Case, opponents: list[Opponent], entry: dict[str, Any]) -> None:
        entry["profiles"] = {}
        shortest, more = case.shape.layers + 2, min(16, case.shape.layers)
        for opponent in opponents:
            if isinstance(opponent, (Diagonal, Graphed, Handwritten)):
                with self._noting(f"profile of {opponent.name}"):
                    self.say(f"profile of {opponent.name}")
                    inputs = {n: case.ids(n * case.segment, self.device) for n in (shortest, shortest + more)}
                    for ids in inputs.values():
                        opponent.prepare(ids)
                    run = lambda n, o=opponent, i=inputs: o(i[n])  # noqa: E731
                    found = kernels.steady_step(run, shortest, more, self.device)
                    found["floors_us"] = self._floors(case)
                    entry["profiles"][opponent.name] = found

    def _floors(self, case: Case) -> dict[str, float]:
        """Microseconds that one step of all layers takes at least, at the ceilings measured in this run."""
        product = max(c["flops_per_s"] for c in self.record["ceilings"])
        copy = max(c["bytes_per_s"] for c in self.record["ceilings"])
        cells, rows = case.shape.layers * 1e6, case.segment + case.memory
        inputs = case.batch * cells
        return {
            "products": inputs * (case.linear_flops(rows) + case.memory_flops(first=False)) / product,
            "attention": inputs * case.attention_flops(rows) / product,
            "bytes": cells * case.cell_bytes() / copy,
        }

    def _ceilings(self) -> None:
        """Matrix products and copies as fast as they go, now."""
        dtype = self.settings.cases[0].dtype
        found = {
            "flops_per_s": measure.product_ceiling(self.device, dtype),
            "bytes_per_s": measure.copy_ceiling(self.device),
        }
        self.record["ceilings"].append(found)
        self.say(
            f"ceilings: {found['flops_per_s'] / 1e12:.3g} TFLOP/s, {found['bytes_per_s'] / 1e12:.3g} TB/s"
        )

    # ---- telling ----

    def _in_time(self, what: str) -> bool:
        if not self.is_late:
            return True
        self.note(f"{what}: not begun, the time is up")
        return False

    @contextlib.contextmanager
    def _noting(self, what: str, row: dict[str, Any] | None = None) -> Iterator[None]:
        """Note what stops a piece, and go on; being left out on purpose is no failure."""
        try:
            yield
        except Skipped as reason:
            note = f"left out: {reason}"
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            note = "out of memory"
        except Exception as error:  # a benchmark of several opponents outlives each of them
            traceback.print_exc()
            note = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self.failed.append(f"{what}: {note}")
        else:
            return
        if row is not None:
            row["note"] = note
        self.say(f"{what}: {note}")


def prepared(make: Callable[[], Opponent], ids: torch.Tensor) -> Opponent:
    """An opponent after its first call."""
    opponent = make()
    opponent.prepare(ids)
    return opponent


def wavefront_seconds(diagonal: Diagonal, device: torch.device) -> list[dict[str, float]]:
    """Median seconds of a wavefront of n cells, n = 1 .. L, in a run of 2 L segments."""
    from rmtcompile.report.profiling import level_us

    case, layers = diagonal.case, diagonal.case.shape.layers
    times = level_us(diagonal.fast, (case.ids(2 * layers * case.segment, device),), {})
    if not times:
        raise Skipped("the program does not run level by level")
    found: dict[int, list[float]] = {}
    for width, us in zip(diagonal.fast.schedule.widths, times, strict=True):
        found.setdefault(width, []).append(us * 1e-6)
    flops = case.batch * case.cell_flops()
    medians = {width: statistics.median(seconds) for width, seconds in sorted(found.items())}
    return [{"width": n, "seconds": t, "flops_per_s": n * flops / t} for n, t in medians.items()]


def schedule_of(diagonal: Diagonal) -> dict[str, Any]:
    """What the compiler found for the last call."""
    schedule, found = diagonal.fast.schedule, diagonal.fast.explain()
    return {
        "plan": found.plan,
        "why": found.why,
        "width": schedule.width,
        "levels": schedule.n_levels,
        "cells": schedule.n_cells,
        "rule": schedule.level_rule,
    }


def stages_of(diagonal: Diagonal) -> dict[str, float]:
    """Seconds of each stage of compilation."""
    return {stage.name: stage.seconds for stage in getattr(diagonal.fast.compiled, "stages", ())}
