"""Obstacles: why a text cannot be read in parts, by the first operation that needs all of it.

    mean(x)                    needs the whole input
    cut(x / x.shape[1], s)     depends on how long the text becomes
    x[8 * s - 2 : 8 * s + 8]   reads more of the input than its own segment

What is allowed on a whole input treats each of its elements by itself; what is allowed without the input
(tables of positions, masks) begins with the same elements whatever the length.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import fx

from rmtcompile.ir.program import Affine, Each, Source
from rmtcompile.ir.randomness import is_random
from rmtcompile.passes.emit.bodies import is_view
from rmtcompile.passes.emit.calls import Calls, Case
from rmtcompile.passes.emit.counted import inner, mixed, sources_of
from rmtcompile.passes.emit.regions import Regions
from rmtcompile.passes.emit.text import target_name
from rmtcompile.passes.flat.functionalise import is_pointwise
from rmtcompile.passes.grid.partition import INIT
from rmtcompile.passes.grid.reroll import ClassRule

_COPIES = frozenset(
    ("to", "_to_copy", "clone", "contiguous", "embedding", "detach", "alias", "dropout", "native_dropout")
)
"""Operations that treat each element by itself without being tagged so."""

_FROM_START = frozenset(("arange", "zeros", "ones", "full", "empty", "tril", "triu", "cumsum"))
"""Operations whose results begin with the same elements, however long they are."""


def obstacle(regions: Regions, enter: Calls, leave: Calls) -> str:
    """Why a part of a text cannot be read by itself; empty if it can."""
    return next(_reasons(regions, enter, leave), "")


def _reasons(regions: Regions, enter: Calls, leave: Calls) -> Iterator[str]:
    yield from _of_init(regions)
    for group in regions.program.groups:
        for port in group.ports:
            if any(_holds_segments(regions, source) for source in port.sources):
                yield "each cell reads all segments of an input"
    for calls in (enter, leave):
        for case in calls.cases:
            yield from _of_case(regions, calls, case)


def _holds_segments(regions: Regions, source: Source | Each) -> bool:
    """Whether a value is an input that holds segments, or computed of one before the first segment."""
    return isinstance(source, Source) and (
        (source.kind == "input" and source.name in regions.program.segmented)
        or (source.kind == INIT and source.node in regions.inner_init)
    )


# ---- before the first segment ------------------------------------------------------------------------------


def _of_init(regions: Regions) -> Iterator[str]:
    rule = regions.rolled.rules[(INIT, -1)][0]
    found, ints = inner(rule, regions.program.segmented), rule.integers()
    needed = _needed(rule.body.nodes, [rule.body.nodes[i] for i in regions.init_nodes])
    sized: set[fx.Node] = set()  # grow with the text, and are not computed of the input
    for node in rule.body.nodes:
        if node not in needed:
            continue
        if is_random(node) and node not in found:
            yield f"{_said(node)} draws numbers once for all segments"
        counts = any(a.by_count for a in ints[node])
        if node in found:
            if not _is_row_wise(node) or not _keeps_extent(node, rule):
                yield f"{_said(node)} needs the whole input"
            if counts and not is_view(node):
                yield f"{_said(node)} depends on how long the text becomes"
        elif counts or sized.intersection(node.all_input_nodes):
            sized.add(node)
            if not _begins_alike(node, ints[node]):
                yield f"{_said(node)} depends on how long the text becomes"
    met = mixed([node for node in rule.body.nodes if node in needed], rule, found)
    if met is not None:
        yield f"{_said(met)} joins the whole input with what depends on its length"


def _needed(nodes: Sequence[fx.Node], results: Sequence[fx.Node]) -> set[fx.Node]:
    inside, found = set(nodes), set(results)
    for node in reversed(nodes):
        if node in found:
            found |= inside.intersection(node.all_input_nodes)
    return found


def _opname(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", node.target))


def _is_row_wise(node: fx.Node) -> bool:
    """Whether an operation treats each element, or each row of a view, by itself."""
    return is_view(node) or is_pointwise(node) or _opname(node) in _COPIES


def _keeps_extent(node: fx.Node, rule: ClassRule) -> bool:
    """Whether a view shows all segments of what it is taken of."""
    if not is_view(node):
        return True
    of = node.all_input_nodes[0]
    before, after = of.meta.get("val"), node.meta.get("val")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return True  # a list of parts, which together are all of it
    growing = sorted(before.shape[dim] for dim in rule.varying.get(of, ()))
    return before.numel() == after.numel() or growing == sorted(
        after.shape[dim] for dim in rule.varying.get(node, ())
    )


def _begins_alike(node: fx.Node, ints: Sequence[Affine]) -> bool:
    """Whether a longer result of an operation begins with the elements of a shorter one."""
    name = _opname(node)
    if name == "slice":  # dim, start, end, step
        return not (len(ints) > 1 and ints[1].by_count)
    if is_view(node) or name in _FROM_START:
        return name != "arange" or not ints or len(ints) == 1 or not ints[0].by_count
    return _is_row_wise(node) and not any(a.by_count for a in ints)


# ---- segments ----------------------------------------------------------------------------------------------


def _of_case(regions: Regions, calls: Calls, case: Case) -> Iterator[str]:
    rule, is_last = case.rule, case.test.startswith("s == S")
    found, ints = inner(rule, regions.program.segmented, regions.inner_init), rule.integers()
    for node in case.parts.before:
        if node in found and not is_own_part(ints[node], _length(node, ints[node])):
            yield f"{_said(node)} reads more of the input than its own segment"
    for node in (*case.parts.before, *case.parts.after):
        if not is_last and any(a.by_count for a in ints[node]) and not (node in found and is_view(node)):
            yield f"{_said(node)} depends on how long the text becomes"
    for value, live_in in zip(rule.body.live_ins, rule.sources, strict=True):
        whole = [x for x in (value if isinstance(value, tuple) else (value,)) if x in case.parts.inputs]
        if whole and any(_holds_segments(regions, source) for source in sources_of(live_in)):
            yield f"the {calls.kind} reads the whole input"
        if isinstance(live_in.steady, Each) and not is_last:
            yield f"the {calls.kind} of each segment reads all segments before it"
    for node, tap in case.results:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            yield f"{_said(node)} keeps a list for others to read ({tap})"
    met = mixed(case.parts.after, rule, found)
    if met is not None:
        yield f"{_said(met)} joins all segments with what depends on their number"


def is_own_part(ints: Sequence[Affine], length: int | None = None) -> bool:
    """Whether a view of an input with these integers reads nothing outside of its reader's segment.

    Args:
        length: of what is shown, where the integer that moves says where it starts, and none where it ends.
    """
    moving = [a for a in ints if a.by_segment]
    if not moving:
        return True
    if any(a.by_count for a in moving) or len(moving) > 2:
        return False
    start, end = moving[0], moving[-1]
    if len(moving) == 1 and length is not None:
        end = replace(start, const=start.const + length)
    elif len(moving) == 1 and start.const:
        return False
    return start.const >= 0 and start.by_segment == end.by_segment and end.const <= end.by_segment


def _length(node: fx.Node, ints: Sequence[Affine]) -> int | None:
    """How much a view shows that says where it starts and how long it is; see `is_own_part`."""
    if node.target is operator.getitem or _opname(node) == "select":
        return 1
    if _opname(node) == "narrow" and not ints[-1].by_segment and not ints[-1].by_count:
        return ints[-1].const
    return None


def _said(node: fx.Node) -> str:
    return f"{target_name(node.target)} at {node.meta.get('source', '?')}"


__all__ = ["is_own_part", "obstacle"]
