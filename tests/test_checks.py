"""checks.py: a pass that breaks a rule of programs is named, with the operation and its surroundings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx
from toys import Toy, features, made

import rmtcompile
import rmtcompile.compiler.unrolling as unrolling
from rmtcompile.compiler.checks import check_program
from rmtcompile.compiler.stages import Log
from rmtcompile.errors import InternalError
from rmtcompile.ir.program import Program

aten = torch.ops.aten


def first(module: fx.GraphModule) -> fx.Node:
    return next(node for node in module.graph.nodes if node.op == "call_function")


def untyped(module: fx.GraphModule) -> None:
    del first(module).meta["val"]


def without_a_line(module: fx.GraphModule) -> None:
    del first(module).meta["source"]


def writing(module: fx.GraphModule) -> None:
    node = first(module)
    with module.graph.inserting_after(node):
        added = module.graph.call_function(aten.add_.Tensor, (node, 1))
    added.meta.update(node.meta)


def unknown(module: fx.GraphModule) -> None:
    with module.graph.inserting_before(first(module)):
        module.nowhere = torch.zeros(1)
        module.graph.create_node("get_attr", "nowhere")


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (untyped, "does not say what type"),
        (without_a_line, "does not say which line"),
        (writing, "writes in place"),
        (unknown, "the capture does not know"),
    ],
)
def test_a_pass_that_breaks_a_graph_is_named(
    damage: Callable[[fx.GraphModule], None], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(flat: Any) -> fx.GraphModule:
        damage(flat.module)
        return flat.module

    passes = (*unrolling.PASSES[:2], ("a pass", broken), *unrolling.PASSES[2:])
    monkeypatch.setattr(unrolling, "PASSES", passes)
    with pytest.raises(InternalError, match=rf"after a pass: .*{what}[\s\S]*\n  in\n"):
        rmtcompile.optimize(made(Toy))(features(3))


def program() -> Program:
    fast = rmtcompile.optimize(made(Toy))
    fast(features(3))
    return fast.compiled.program


def renamed(found: Program) -> Program:
    group = found.groups[0]
    return replace(found, groups=(replace(group, ports=group.ports[1:]),))


def unnamed(found: Program) -> Program:
    group = found.groups[0]
    return replace(found, groups=(replace(group, outputs=group.outputs[1:]),))


def lost(found: Program) -> Program:
    return replace(found, lanes=found.lanes[1:])


def late(found: Program) -> Program:
    fed = next(lane for lane in found.lanes if lane.feeds)
    feeds = tuple(replace(feed, offset=(3, 0)) for feed in fed.feeds)
    return replace(found, lanes=tuple(replace(x, feeds=feeds) if x is fed else x for x in found.lanes))


def foreign(found: Program) -> Program:
    fed = next(lane for lane in found.lanes if lane.feeds)
    feeds = tuple(replace(feed, source="out99") for feed in fed.feeds)
    return replace(found, lanes=tuple(replace(x, feeds=feeds) if x is fed else x for x in found.lanes))


def twice(found: Program) -> Program:
    return replace(found, taps=(*found.taps, *found.taps))


def without_a_group(found: Program) -> Program:
    taps = tuple(replace(tap, group_outputs=(("nobody", "out0"),)) for tap in found.taps)
    return replace(found, taps=taps)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (renamed, "for placeholders"),
        (unnamed, "names"),
        (lost, "reads no lane"),
        (late, "does not arrive in time"),
        (foreign, "which it has not"),
        (twice, "two taps of one name"),
        (without_a_group, "which no group gives"),
    ],
)
def test_a_broken_program_is_refused(damage: Callable[[Program], Program], what: str) -> None:
    found = program()
    check_program(found, "a pass")
    with pytest.raises(InternalError, match=f"after a pass: .*{what}"):
        check_program(damage(found), "a pass")


def test_it_costs_nothing_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Log, "always_checks", False)
    calls: list[str] = []
    monkeypatch.setattr(unrolling, "check_flat", lambda graph, stage, *_, **__: calls.append(stage))
    rmtcompile.optimize(made(Toy))(features(3))
    assert not calls
    rmtcompile.optimize(made(Toy), verify=True)(features(3))
    assert calls[:2] == ["functionalise", "forward"]
