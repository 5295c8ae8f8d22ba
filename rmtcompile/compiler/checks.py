"""Checks: what a program may contain between passes. A pass that breaks one of these rules has a bug.

    flat graph   each operation says its type and its line; nothing reads what comes later, or is written
    program      each port, feed, entry and tap names something that there is; every value arrives in time

They run under `optimize(verify=True)`, and in all tests.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import fx

from rmtcompile.errors import InternalError
from rmtcompile.ir.program import Group, Lane, Program
from rmtcompile.passes.flat.functionalise import is_mutating

AROUND = 3
"""Operations shown before and behind the one that breaks a rule."""


def check_flat(graph: fx.Graph, stage: str, leaves: Collection[str], functional: bool) -> None:
    """Check a flat graph.

    Args:
        stage: that has made it.
        leaves: targets of `get_attr` that the capture knows.
        functional: whether writes in place are gone by now.

    Raises:
        InternalError: with the rule, the operation and its surroundings.
    """
    nodes = list(graph.nodes)
    try:
        graph.lint()
    except RuntimeError as error:
        raise InternalError(f"after {stage}: {error}") from error
    for i, node in enumerate(nodes):
        broken = _broken(node, leaves, functional)
        if broken:
            window = [x.format_node() or str(x) for x in nodes[max(0, i - AROUND) : i + AROUND + 1]]
            lines = "\n  ".join([f"{node.format_node()}   {node.meta.get('source', '?')}", "in", *window])
            raise InternalError(f"after {stage}: {broken}\n  {lines}")


def _broken(node: fx.Node, leaves: Collection[str], functional: bool) -> str:
    """The rule that an operation breaks, in words; empty if it breaks none."""
    if node.op == "get_attr" and node.target not in leaves:
        return "a tensor is read that the capture does not know"
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    if "val" not in node.meta and (schema is None or schema.returns):
        return "an operation does not say what type its result has"
    if "source" not in node.meta:
        return "an operation does not say which line it comes from"
    if functional and is_mutating(node):
        return "an operation writes in place"
    return ""


def check_program(program: Program, stage: str) -> None:
    """Check a scheduled program.

    Raises:
        InternalError: with the rule and what breaks it.
    """
    for broken in (*_groups(program), *_lanes(program), *_taps(program)):
        raise InternalError(f"after {stage}: {broken}")


def _groups(program: Program) -> Iterator[str]:
    lanes = {lane.name: lane for lane in program.lanes}
    for group in program.groups:
        names = [node.name for node in group.graph.nodes if node.op == "placeholder"]
        if sorted(names) != sorted(port.name for port in group.ports):
            yield f"group {group.name}: ports {[p.name for p in group.ports]} for placeholders {names}"
        (returned,) = next(node for node in group.graph.nodes if node.op == "output").args
        if len(returned) != len(group.outputs) or len(group.values) != len(group.outputs):
            yield f"group {group.name}: {len(returned)} results under {len(group.outputs)} names"
        for port in group.ports:
            if port.role == "lane" and port.source not in lanes:
                yield f"group {group.name}: port {port.name} reads no lane: {port.source}"
            elif port.role == "lane" and not set(group.layers) <= set(lanes[port.source].layers):
                yield f"group {group.name}: lane {port.source} has no place for some of its layers"


def _lanes(program: Program) -> Iterator[str]:
    groups: dict[str, Group] = {group.name: group for group in program.groups}
    lanes: dict[str, Lane] = {lane.name: lane for lane in program.lanes}
    for lane in program.lanes:
        for feed in lane.feeds:
            known = groups[feed.group].outputs if feed.group in groups else lanes if not feed.group else ()
            if feed.source not in known:
                giver = f"group {feed.group}" if feed.group else "a lane"
                yield f"lane {lane.name}: fed by {giver} with {feed.source}, which it has not"
            ds, dl = feed.offset
            late = program.alpha and not 1 <= program.alpha * ds + dl <= program.alpha
            if late or (not program.alpha and dl < 1):
                yield f"lane {lane.name}: a feed of offset {feed.offset} does not arrive in time"
        if not {entry.layer for entry in lane.entries} <= set(lane.places):
            yield f"lane {lane.name}: an entry for a layer without a place"


def _taps(program: Program) -> Iterator[str]:
    names = [tap.name for tap in program.taps]
    if len(set(names)) < len(names):
        yield f"two taps of one name: {names}"
    outputs = {(group.name, output) for group in program.groups for output in group.outputs}
    for tap in program.taps:
        if not set(tap.group_outputs) <= outputs:
            yield f"tap {tap.name}: of {tap.group_outputs}, which no group gives"


__all__ = ["check_flat", "check_program"]
