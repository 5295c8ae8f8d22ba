"""Counted: which operations count segments from the start of their input, and which from the start of the
whole text, where a run goes on from where an earlier one has stopped.

    x = slice(ids, 1, 8 * i, 8 * i + 8)          a part of the input: i = s - first
    p = arange(8 * s, 8 * s + 8)                 positions: s
    y = cat([h(first), ..., h(S - 1)]), n = S - first     a join of what this run's segments have given

What is taken of an input that holds segments, and what follows a list over segments, counts from the first
segment of the run; everything else counts from segment 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import fx

from rmtcompile.ir.program import Each, Source
from rmtcompile.passes.grid.partition import INIT
from rmtcompile.passes.grid.reroll import ClassRule, LiveIn


def sources_of(live_in: LiveIn) -> Iterator[Source | Each]:
    """Where a live-in may come from."""
    yield from live_in.early.values()
    if live_in.steady is not None:
        yield live_in.steady


def inner(rule: ClassRule, segmented: Collection[str], init: Collection[int] = ()) -> set[fx.Node]:
    """The values of a region, live-ins included, that are counted from the start of the input.

    Args:
        segmented: inputs of the forward that hold segments, by name.
        init: places in the body of init whose values are counted so.
    """

    def counts(source: Source | Each) -> bool:
        if isinstance(source, Each):
            return True
        return (source.kind == "input" and source.name in segmented) or (
            source.kind == INIT and source.node in init
        )

    found: set[fx.Node] = set()
    for node, live_in in zip(rule.body.live_ins, rule.sources, strict=True):
        if node is not None and any(map(counts, sources_of(live_in))):
            found |= set(node) if isinstance(node, tuple) else {node}
    found -= set(rule.body.nodes)  # a list may end with the region's own member
    for node in rule.body.nodes:
        if found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def inner_places(rule: ClassRule, segmented: Collection[str]) -> frozenset[int]:
    """The places in a body whose values are counted from the start of the input."""
    found = inner(rule, segmented)
    return frozenset(i for i, node in enumerate(rule.body.nodes) if node in found)


def mixed(nodes: Sequence[fx.Node], rule: ClassRule, counted: Collection[fx.Node]) -> fx.Node | None:
    """The first of some operations that meets what is counted from the start of the input and something else
    whose size depends on s or S."""
    for node in nodes:
        if node in counted and any(x in rule.varying and x not in counted for x in node.all_input_nodes):
            return node
    return None


__all__ = ["inner", "inner_places", "mixed", "sources_of"]
