"""Training steps: forward and backward, beside the model as it is and the model with compiled layers.

The loss compares all hidden states with random targets: a mean of squares of normalised values would have
next to no gradient. A step begins without gradients and ends with those of all parameters; there is no
optimizer.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import rmtcompile
from rmtcompile.bench import measure
from rmtcompile.bench.opponents import result_of
from rmtcompile.bench.recording import Recording
from rmtcompile.bench.report import Table, environment_table
from rmtcompile.bench.shapes import Case

EVERY = 997
"""Of the gradients, each 997th element is compared."""

LONGEST_EAGER = 32
"""Segments up to which the model as it is takes steps, where nothing else is said."""

LONG = 10.0
"""Seconds of steps after which two rounds are enough."""

TABLE: tuple[tuple[str, int, dict[str | int, Sequence[int]], Sequence[int]], ...] = (
    ("1b", 1024, {"none": (4096, 32768), "level": (32768, 131072)}, (4096, 32768)),
    ("160m", 1024, {"none": (8192,)}, (8192,)),
    ("160m", 256, {"none": (4096,)}, (4096,)),
)
"""Preset, segment, programs and the model's own lengths (see `Steps`) of `--train table`."""


@dataclass(frozen=True)
class Steps:
    """Steps of one model.

    Attributes:
        shape: its name, in tables.
        programs: what backward computes again, for each program, and the lengths that it takes, in tokens.
        own: the lengths of which the model takes steps itself, as it is and with compiled layers.
    """

    shape: str
    case: Case
    programs: Mapping[str | int, Sequence[int]]
    own: Sequence[int] = ()


@dataclass(frozen=True)
class Settings:
    """What one run does; see the command line's help."""

    models: Sequence[Steps]
    rounds: int = 5
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: float = float("inf")
    flags: tuple[str, ...] = ()


class Session(Recording):
    """Takes steps of each length with each program, and with the model itself."""

    def __init__(
        self, settings: Settings, device: torch.device, save: Callable[[dict[str, Any]], None]
    ) -> None:
        super().__init__(device, settings.budget, save)
        self.settings = settings
        self.begin(settings.models[0].case, settings.flags, steps=[])

    def run(self) -> None:
        """All models; saved after each length."""
        for steps in self.settings.models:
            ModelSession(self, steps).run()
        self.record["seconds"] = time.monotonic() - self.started
        self.save(self.record)


class ModelSession:
    """The steps of one model: all programs, then the model itself."""

    def __init__(self, session: Session, steps: Steps) -> None:
        self.session, self.steps, self.device = session, steps, session.device
        self.case, self.settings = steps.case, session.settings
        self._taken: list[tuple[dict[str, Any], list[Tensor]]] = []  # records, and gradients

    def run(self) -> None:
        """Build the model, take all steps, compare."""
        case, session = self.case, self.session
        torch.compiler.reset()
        measure.release(self.device)
        session.say(f"building {case.shape.layers} layers of width {case.shape.hidden}")
        model = case.build(self.device).requires_grad_()
        self.target = torch.randn(1, case.segment, case.shape.hidden, device=self.device)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        self.others = measure.allocated(self.device) - weights
        for how, lengths in self.steps.programs.items():
            options = {"progress": session.say, "cache": False, **self.settings.options, "recompute": how}
            self._steps(
                f"rmtcompile, {how} recomputed", rmtcompile.optimize(model, **options), model, lengths
            )  # which is gone before the next one begins, with what it has recorded
        if self.steps.own:
            self._steps("the model as it is", model, model, self.steps.own)
            for layer in model.memory_cell.layers:
                layer.compile()
            self._steps("the model, layers compiled", model, model, self.steps.own)
        self._compare()

    def _steps(self, name: str, run: Callable[..., Any], model: nn.Module, lengths: Sequence[int]) -> None:
        """Steps of each length."""
        for tokens in lengths:
            what = f"{self.steps.shape}, {name}, {tokens} tokens"
            if self.session.is_late:
                self.session.note(f"{what}: not begun, the time is up")
                continue
            torch.manual_seed(self.case.seed)
            ids = self.case.ids(tokens, self.device)
            try:
                self._step_of(name, run, model, ids)
            except torch.OutOfMemoryError:
                self._none(model)
                self.session.note(f"{what}: out of memory")
            except Exception as error:  # the others are measured all the same
                traceback.print_exc()
                self.session.note(f"{what}: {type(error).__name__}: {error}".splitlines()[0][:300])
            self.session.save(self.session.record)

    def _step_of(self, name: str, run: Callable[..., Any], model: nn.Module, ids: Tensor) -> None:
        def step() -> None:
            for parameter in model.parameters():
                parameter.grad = None
            out = result_of(run(ids)).float()
            (out.unflatten(1, (-1, self.target.shape[1])) * self.target).mean().backward()

        self._none(model)
        first = measure.seconds(step, self.device)
        self._none(model)
        start = time.perf_counter()
        peak = measure.peak(step, self.device) - self.others  # records, where steps are recorded
        second = time.perf_counter() - start
        self._none(model)
        step()
        reserved = measure.reserved(self.device) - self.others
        grads = [p.grad.flatten()[::EVERY].float().cpu() for p in model.parameters() if p.grad is not None]
        times: list[float] = []
        hosts = []
        while len(times) < self.settings.rounds and (len(times) < 2 or sum(times) < LONG):
            start = time.perf_counter()
            step()
            hosts.append(time.perf_counter() - start)
            measure.synchronise(self.device)
            times.append(time.perf_counter() - start)
        self._none(model)
        record = {
            "shape": self.steps.shape,
            "segment": self.case.segment,
            "name": name,
            "tokens": ids.shape[1],
            "first_s": first,
            "step_s": times,
            "host_s": statistics.median(hosts),
            "second_s": second,
            "peak_bytes": peak,
            "reserved_bytes": reserved,
            "gradients": [float(g.norm()) for g in grads],
        }
        self.session.record["steps"].append(record)
        self._taken.append((record, grads))
        took = statistics.median(times) * 1e3
        self.session.say(f"{name}, {ids.shape[1]} tokens: {took:.1f} ms, first {first:.1f} s")

    def _none(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = None
        measure.release(self.device)

    def _compare(self) -> None:
        """Relative differences of the gradients from the model's own: the median and the largest one."""
        own = {step["tokens"]: grads for step, grads in self._taken if step["name"] == "the model as it is"}
        for step, mine in self._taken:
            theirs = own.get(step["tokens"])
            if theirs is not None and theirs is not mine:
                pairs = zip(mine, theirs, strict=True)
                found = [float((a - b).norm() / (b.norm() + 1e-20)) for a, b in pairs]
                step["difference"] = [statistics.median(found), max(found)]


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """The run, and each step."""
    yield environment_table(record["environment"])
    rows = []
    for step in record["steps"]:
        difference = step.get("difference")
        rows.append(
            (
                step["shape"],
                f"{step['segment']:,}",
                f"{step['tokens']:,}",
                step["name"],
                f"{statistics.median(step['step_s']) * 1e3:.1f}",
                f"{step['host_s'] * 1e3:.1f}",
                f"{step['peak_bytes'] / 2**30:.1f}",
                f"{step['reserved_bytes'] / 2**30:.1f}",
                f"{step['first_s']:.1f}",
                f"{step['second_s']:.1f}",
                "{:.1e} {:.1e}".format(*difference) if difference else "",
            )
        )
    times = ("ms", "host ms", "peak GiB", "reserved", "first s", "second")
    header = ("shape", "segment", "tokens", "step", *times, "gradients off: median, most")
    yield Table("training steps", header, rows)
