"""One model beside its program: equal, refused, wrong, crashed, or no model at all."""

from __future__ import annotations

import copy
import logging
import re
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import rmtcompile
from fuzzing.models import Model, build, inputs
from fuzzing.spec import Spec
from rmtcompile.compiler.stages import Log
from rmtcompile.errors import UnsupportedError
from rmtcompile.passes.grid import wavefront

TOLERANCE = 1e-8
"""Of float64, relative to the largest value of a tensor: far above rounding, far below a wrong dependence."""

FAILURES = ("wrong", "crash", "slow")
"""Outcomes that must not be."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        kind: "equal", "refused", "wrong", "crash", "slow", or "no model": the model itself cannot be run.
        line: the first line of the refusal or error, and where a crash came from.
    """

    kind: str
    line: str = ""

    @property
    def cause(self) -> tuple[str, str]:
        """The same for outcomes that most likely have one cause: without names and numbers."""
        return self.kind, re.sub(r"'[^']*'|[\w.]*\d[\w.]*", "_", self.line)


def trial(spec: Spec) -> Outcome:
    """Run the model and its program for each length."""
    warnings.simplefilter("ignore")
    logging.getLogger("rmtcompile").setLevel(logging.ERROR)
    Log.always_checks, wavefront.BLOCK = True, spec.block
    calls = inputs(spec)
    model = build(spec)
    fast_model = copy.deepcopy(model)
    try:
        expected = [observed(model, model(*call), spec, whole=True) for call in calls]
    except Exception as error:
        return Outcome("no model", _said(error))
    try:
        fast = rmtcompile.optimize(fast_model, plan=spec.plan, recompute=spec.recompute)
        got = USAGES[spec.usage](fast, calls, spec)
        for call, one, other in zip(calls, expected, got):
            difference = compared(one, other)
            if difference:
                return Outcome("wrong", f"{difference}, input {tuple(call[0].shape)}")
    except UnsupportedError as error:
        return Outcome("refused", _said(error))
    except Exception as error:
        return Outcome("crash", f"{_said(error)} [{_place(error)}]")
    return Outcome("equal", str(fast.schedule.alpha))


def observed(model: Model, result: Any, spec: Spec, whole: bool) -> Any:
    """What is compared after a call: its result, gradients, and the state that is left in the model."""
    found: dict[str, Any] = {"result": pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), result)}
    if spec.trains:
        total = sum((x * (1 + x.detach()).cos()).sum() for x in pytree.tree_leaves(result))
        model.zero_grad()
        total.backward()
        found["gradients"] = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
        }
    if whole:
        names = [
            (layer.names, {n: getattr(layer, f"kept_{n}") for n in layer.names}) for layer in model.layers
        ]
        store = model.store and (model.store.layers, model.store.seen)
        state = ([layer.kept for layer in model.layers], names, store, model.seen)
        found["state"] = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), state)
    return found


def called(fast: Any, calls: list[tuple[Tensor, ...]], spec: Spec) -> Any:
    """One call after the other."""
    with torch.set_grad_enabled(spec.trains):
        for call in calls:
            yield observed(fast.model, fast(*call), spec, whole=True)


def in_parts(fast: Any, calls: list[tuple[Tensor, ...]], spec: Spec) -> Any:
    """Each text in two parts, cut at a place of the seed; results that cannot be joined are read whole."""
    for call in calls:
        n = call[0].shape[1]
        k = 1 + spec.seed % max(n - 1, 1)
        with torch.no_grad():
            if n < 2 or spec.result != "cat":
                out, _ = fast.run(*call)
            else:
                first, state = fast.run(*(x[:, :k] for x in call))
                again = state.pending_tokens + _added(spec) * -(-state.pending_tokens // spec.segment)
                second, _ = fast.run(*(x[:, k:] for x in call), state=state)
                out = torch.cat([first[:, : first.shape[1] - again], second], 1)
        yield observed(fast.model, out, spec, whole=True)


def _added(spec: Spec) -> int:
    """Positions that the result of each segment has and its input has not."""
    is_dropped = "drop memory tokens" in spec.epilogue
    return 0 if is_dropped else 2 * spec.prologue.count("memory tokens")


def mapped(fast: Any, calls: list[tuple[Tensor, ...]], spec: Spec) -> Any:
    """All inputs as documents."""
    with torch.no_grad():
        for result in fast.stream(calls):
            if isinstance(result, rmtcompile.FailedDocument):
                raise result.error
            yield observed(fast.model, result, spec, whole=False)


USAGES = {"call": called, "run": in_parts, "map": mapped}


def compared(one: Any, other: Any) -> str:
    """What is not equal, in words; nothing where all is."""
    for key in other:
        a, spec_a = pytree.tree_flatten(one[key])
        b, spec_b = pytree.tree_flatten(other[key])
        if spec_a != spec_b:
            return f"{key}: another structure"
        scale = max(
            (float(x.nan_to_num(0, 0, 0).abs().max()) for x in a if isinstance(x, Tensor) and x.numel()),
            default=0,
        )
        for x, y in zip(a, b):
            if not isinstance(x, Tensor):
                if type(x) is not type(y) or x != y:
                    return f"{key}: {x!r} is {y!r}"
                continue
            if (x.shape, x.dtype) != (y.shape, y.dtype):
                return f"{key}: {x.dtype}{list(x.shape)} is {y.dtype}{list(y.shape)}"
            if x.numel() and not torch.equal(x.isfinite(), y.isfinite()):
                return f"{key}: not finite in other places"
            x, y = x.nan_to_num(0, 0, 0).double(), y.nan_to_num(0, 0, 0).double()
            if key != "gradients" and x.numel():
                scale = float(x.abs().max())
            if x.numel() and float((x - y).abs().max()) > TOLERANCE * max(scale, 1e-6):
                return f"{key}: relative error {float((x - y).abs().max()) / max(scale, 1e-6):.0e}"
    return ""


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _place(error: BaseException) -> str:
    """The innermost place in the compiler."""
    root = str(Path(rmtcompile.__file__).parents[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(root)]
    frames = [frame for frame in frames if "/tests/" not in frame.filename] or frames
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "nowhere"
