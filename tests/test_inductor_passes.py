"""passes/inductor: which passes Inductor runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._inductor import config
from toys import Toy, features, made

import rmtcompile
from rmtcompile.passes.cell.inductor import PASSES, Passes
from rmtcompile.runtime.engine import Engine
from rmtcompile.runtime.execute import Executor

NAMES = tuple(name for passes in PASSES.values() for name in passes)


def executor(off: frozenset[str] = frozenset()) -> Executor:
    fast = rmtcompile.optimize(made(Toy))
    fast._programs.options = replace(fast.options, passes_off=off)
    fast(features(3))
    return fast._last[0].executor


def names(engine: Engine) -> tuple[str, ...]:
    options = engine._options(0) or {}
    return tuple(name for passes in options.values() for name in passes.passes)


def test_a_pass_of_the_user_stays() -> None:
    engine = Engine(executor().program, "inductor", False, frozenset())
    assert names(engine) == NAMES
    with config.patch(post_grad_custom_post_pass=lambda graph: None):
        assert names(engine) == ("turned",)
    with config.patch(joint_custom_post_pass=lambda graph: None):
        assert names(engine) == ("accumulate", "gated")


@pytest.mark.parametrize("off", [(), ("accumulate",), ("gated",), ("turned",), ("accumulate", "gated")])
def test_switched_off(off: tuple[str, ...]) -> None:
    run = executor(frozenset(off))
    assert names(run.new_engine("inductor", keeps_buffers=False)) == ()  # on CPU
    run.device = torch.device("cuda")
    assert names(run.new_engine("eager", keeps_buffers=False)) == ()
    left = tuple(name for name in NAMES if name not in off)
    assert names(run.new_engine("inductor", keeps_buffers=False)) == left


def test_compiled_code_of_other_passes_is_not_taken_from_the_cache() -> None:
    assert Passes().uuid() == Passes(frozenset()).uuid()
    assert Passes().uuid() != Passes(frozenset({"gated"})).uuid()
