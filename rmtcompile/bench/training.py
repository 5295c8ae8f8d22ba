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
"""Segments up to which the model as it is takes steps."""


@dataclass(frozen=True)
class Settings:
    """What one run does; see the command line's help.

    Attributes:
        recompute: what backward computes again, for each program.
        opponents: whether the model takes steps itself, as it is and with compiled layers.
    """

    case: Case
    tokens: Sequence[int]
    recompute: Sequence[str | int] = ("none", "level")
    opponents: bool = True
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
        case = settings.case
        self._grads: dict[tuple[str, int], list[Tensor]] = {}  # by name and tokens
        self.begin(case, settings.flags, steps=[])

    def run(self) -> None:
        """All programs, then the model; saved after each length."""
        case = self.settings.case
        torch.compiler.reset()
        measure.release(self.device)
        self.say(f"building {case.shape.layers} layers of width {case.shape.hidden}")
        model = case.build(self.device).requires_grad_()
        self.target = torch.randn(1, case.segment, case.shape.hidden, device=self.device)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        self.others = measure.allocated(self.device) - weights
        self.record["weights_bytes"] = weights
        for how in self.settings.recompute:
            options = {"progress": self.say, "cache": False, **self.settings.options, "recompute": how}
            self._steps(f"rmtcompile, {how} recomputed", rmtcompile.optimize(model, **options), model)
        if self.settings.opponents:
            self._steps("the model as it is", model, model)
            for layer in model.memory_cell.layers:
                layer.compile()
            self._steps("the model, layers compiled", model, model)
        self._compare()
        self.record["seconds"] = time.monotonic() - self.started
        self.save(self.record)

    def _steps(self, name: str, run: Callable[..., Any], model: nn.Module) -> None:
        """Steps of each length."""
        case = self.settings.case
        for tokens in self.settings.tokens:
            if self.is_late:
                self.note(f"{name}, {tokens} tokens: not begun, the time is up")
                continue
            if run is model and tokens > LONGEST_EAGER * case.segment:
                continue
            torch.manual_seed(case.seed)
            ids = case.ids(tokens, self.device)
            try:
                self._step_of(name, run, model, ids)
            except torch.OutOfMemoryError:
                self._none(model)
                self.note(f"{name}, {tokens} tokens: out of memory")
            except Exception as error:  # the others are measured all the same
                traceback.print_exc()
                self.note(f"{name}, {tokens} tokens: {type(error).__name__}: {error}".splitlines()[0][:300])
            self.save(self.record)

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
        times, hosts = [], []
        for _ in range(self.settings.rounds):
            start = time.perf_counter()
            step()
            hosts.append(time.perf_counter() - start)
            measure.synchronise(self.device)
            times.append(time.perf_counter() - start)
        self._none(model)
        self.record["steps"].append(
            {
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
        )
        self._grads[name, ids.shape[1]] = grads
        took = statistics.median(times) * 1e3
        self.say(f"{name}, {ids.shape[1]} tokens: {took:.1f} ms, first {first:.1f} s")

    def _none(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = None
        measure.release(self.device)

    def _compare(self) -> None:
        """Relative differences of the gradients from the model's own: the median and the largest one."""
        for step in self.record["steps"]:
            own = self._grads.get(("the model as it is", step["tokens"]))
            mine = self._grads[step["name"], step["tokens"]]
            if own is not None and mine is not own:
                found = [float((a - b).norm() / (b.norm() + 1e-20)) for a, b in zip(mine, own, strict=True)]
                step["difference"] = [statistics.median(found), max(found)]


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """The run, and each step."""
    yield environment_table(record["environment"])
    rows = []
    for step in sorted(record["steps"], key=lambda step: step["tokens"]):
        difference = step.get("difference")
        rows.append(
            (
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
    header = ("tokens", "step", *times, "gradients off: median, most")
    yield Table(f"training steps, segments of {record['segment']}", header, rows)
