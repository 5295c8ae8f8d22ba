"""Together: why cells of several texts cannot run in one call, by what their cells share.

    cell(x; W, cos)      cos = f(weights)         the same for every text
    cell(x; W, mask)     mask = f(input)          each text has its own: the texts run one after the other

What cells of a call have apart (lanes, masks of classes) may be of several texts. What they share has to be
computed of the model alone.
"""

from __future__ import annotations

from torch import fx

from rmtcompile.ir.program import Program, Source
from rmtcompile.ir.randomness import is_random
from rmtcompile.passes.emit.text import target_name
from rmtcompile.passes.grid.partition import INIT
from rmtcompile.passes.grid.reroll import ClassRule


def apart(program: Program) -> str:
    """Why cells of several texts cannot stand in one call; empty if they can."""
    if not program.alpha:
        return "all segments of a layer run at once"
    if any(lane.grows for lane in program.lanes):
        return "cells hold values that grow with the segments"
    rule: ClassRule = program.rolled.rules[(INIT, -1)][0]
    for group in program.groups:
        for port in group.ports:
            for source in port.sources:
                if found := _of_text(source, rule):
                    return f"all cells of a call share {found}"
    return ""


def _of_text(source: Source, rule: ClassRule) -> str:
    """What of a text a shared value is computed of; empty if of none."""
    if source.kind == "leaf":
        return ""
    if source.kind != INIT:
        return f"a value of one text ({source.kind} {source.name}".rstrip() + ")"
    given = dict(zip(rule.body.live_ins, rule.sources, strict=True))
    ints = rule.integers()
    waiting: list[fx.Node] = [rule.body.nodes[source.node]]
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in ints:
            if is_random(node):
                return f"numbers that {target_name(node.target)} draws"
            if not all(a.is_constant for a in ints[node]):
                return f"the result of {target_name(node.target)}, which depends on the length of the text"
            waiting += node.all_input_nodes
        elif (live_in := given.get(node)) is not None:
            if not isinstance(live_in.steady, Source) or live_in.steady.kind != "leaf":
                return "a value that is computed of the input"
        else:
            return "a list over segments"
    return ""


__all__ = ["apart"]
