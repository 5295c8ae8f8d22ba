"""Integers and sources of live-ins as functions of the segment, each checked on all captured segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from rmtcompile.errors import RerollError
from rmtcompile.ir.program import Affine, Each, Source
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, INIT, PROLOGUE
from rmtcompile.passes.grid.reroll.rules import Classes, LiveIn
from rmtcompile.passes.grid.reroll.unrolled import Key, Unrolled, body_at, region_name

_AS_FAR_BACK = (
    "dependences must be the same number of segments back in every segment, but for the first few and the "
    "last few; fallback='sequential' runs the model as it is"
)


def affine(
    key: Key,
    j: int,
    members: list[tuple[Unrolled, int]],
    by_count_only: bool = False,
    others: Sequence[tuple[Unrolled, int]] = (),
    predicts: bool = True,
) -> Affine:
    """Fit one integer over all instances of a class; every instance must lie on the fit. A few points lie on
    one anyway: then the step is a usual one, or `others`, instances in an earlier capture, lie on it too.
    Where it predicts nothing, for no other number of segments, any fit will do."""

    def point(unrolled: Unrolled, s: int) -> tuple[int, int, int]:
        return s, unrolled.count, body_at(unrolled, key, s if key[0] != INIT else -1).ints[j]

    points = [point(*member) for member in members]
    s0, n0, v0 = points[0]
    pairs = [(p, q) for i, p in enumerate(points) for q in points[i + 1 :]]
    by_segment = by_count = 0
    if not by_count_only:
        along = next(((p, q) for p, q in pairs if p[1] == q[1] and p[0] != q[0]), None)
        along = along or next(((p, q) for p, q in pairs if p[0] != q[0]), None)
        by_segment = (along[1][2] - along[0][2]) // (along[1][0] - along[0][0]) if along else 0
    across = next(((p, q) for p, q in pairs if p[1] != q[1]), None)
    if across:
        (sp, np, vp), (sq, nq, vq) = across
        by_count = (vq - vp - by_segment * (sq - sp)) // (nq - np)
    fit = Affine(v0 - by_segment * s0 - by_count * n0, by_segment, by_count)
    if predicts and by_segment and len(points) <= 3 and abs(by_segment) not in _steps(members):
        known = [*points, *(point(*other) for other in others)]
        if len(known) <= _freedom(known) or any(fit.at(s, n) != v for s, n, v in known):
            raise RerollError(
                f"an integer in {region_name(key)} is not seen often enough to be called even",
                [f"segment {a} of {b}: {c}" for a, b, c in known],
            )
    if any(fit.at(s, n) != v for s, n, v in points):
        raise RerollError(
            f"an integer in {region_name(key)} does not grow evenly with the segment",
            [f"segment {a} of {b}: {c}" for a, b, c in points],
            "use positions and sizes that are affine in the segment number",
        )
    return fit


def _freedom(points: list[tuple[int, int, int]]) -> int:
    """How many of these points some affine function of s and S passes through, whatever the values."""
    return int(np.linalg.matrix_rank(np.array([(1, s, n) for s, n, _ in points])))


def _steps(members: list[tuple[Unrolled, int]]) -> set[int]:
    """By how much positions move from one segment to the next: one, or the length of a segment."""
    sizes = {unrolled.count: unrolled.sizes for unrolled, _ in members}
    if len(sizes) == 1:
        ((count, only),) = sizes.items()
        return {1, *(n // count for n in only if n % count == 0)}
    (few, small), (many, large) = sorted(sizes.items())
    return {1, *((b - a) // (many - few) for a, b in zip(small, large, strict=True))}


def live_in_of(
    key: Key,
    j: int,
    members: list[tuple[Unrolled, int]],
    classes: dict[Key, Classes],
    predicts: bool = True,
) -> LiveIn:
    """One live-in over the instances of a class: sources of the early segments, then one rule. One segment
    shows a rule where it predicts nothing."""
    nodes = [(unrolled, s, body_at(unrolled, key, s).live_ins[j]) for unrolled, s in members]
    nodes = [entry for entry in nodes if entry[2] is not None]  # live-ins of code that is dead there
    if any(isinstance(node, tuple) for _, _, node in nodes):
        return LiveIn({}, _each(key, nodes, classes))
    seen = [(unrolled, s, unrolled.source(node)) for unrolled, s, node in nodes if isinstance(node, fx.Node)]
    if not seen:
        raise RerollError(
            f"nothing that is returned depends on {region_name(key)} in some segments",
            [f"segments {sorted({s for _, s in members})}"],
            "return a value of each segment, or run with fallback='sequential'",
        )
    last_segment = max(s for _, s, _ in seen)
    rule = _steady([(s, found) for _, s, found in seen], last_segment)
    early: dict[int, Source] = {}
    steady_seen: list[tuple[Unrolled, Source]] = []
    for unrolled, s, found in seen:
        if _agrees(rule, s, found):
            steady_seen.append((unrolled, found))
        elif early.setdefault(s, _ruled([(unrolled, found)], classes)) != found:
            raise RerollError(
                f"segment {s} of {region_name(key)} reads from another place with one more segment",
                [str(early[s]), _told(unrolled, found)],
                _AS_FAR_BACK,
            )
    regular = {s for _, s, found in seen if _agrees(rule, s, found)}
    if both := regular & early.keys():
        s = min(both)
        raise RerollError(
            f"segment {s} of {region_name(key)} reads from another place with one more segment",
            [f"segment {s} of {one.count}: {_told(one, found)}" for one, t, found in seen if t == s],
            _AS_FAR_BACK,
        )
    counts = {unrolled.count for unrolled, _, _ in seen}
    are_parts = max(counts) - min(counts) > 1  # of segments, each of which may do the same in turn
    is_in_turn = are_parts and early and max(early) > min(regular, default=0)
    if early and (max(early) >= last_segment or is_in_turn or (predicts and len(regular) < 2)):
        raise RerollError(
            f"a value that {region_name(key)} reads comes from another place in each segment",
            [f"segment {s}: {_told(one, found)}" for one, s, found in seen],
            _AS_FAR_BACK,
        )
    return LiveIn(early, replace(rule, nodes=_ruled(steady_seen, classes).nodes))


def _told(unrolled: Unrolled, source: Source) -> str:
    """Where a value comes from, with the user's line."""
    if source.relative or source.node < 0:
        return str(source)
    nodes = body_at(unrolled, (source.kind, source.layer), source.segment).nodes
    line = nodes[source.node].meta.get("source", "") if source.node < len(nodes) else ""
    return f"{source}   {line}".rstrip()


def _ruled(
    seen: list[tuple[Unrolled, Source]], classes: dict[Key, Classes], from_end: bool = False
) -> Source:
    """The first source, with its index in the producer's body for every class of producer that was seen."""
    nodes: dict[int, int] = {}
    for unrolled, found in seen:
        if found.kind in ("leaf", "input"):
            return found
        segment = unrolled.count - 1 - found.segment if from_end and found.relative else found.segment
        number = classes[(found.kind, found.layer)].of(segment, unrolled.count) if found.kind != INIT else 0
        if nodes.setdefault(number, found.node) != found.node:
            raise RerollError(
                "one value comes from two operations of the same code",
                [
                    _told(one, other)
                    for one, other in seen
                    if other.kind == found.kind and other.node in (nodes[number], found.node)
                ],
                _AS_FAR_BACK,
            )
    return replace(seen[0][1], nodes=tuple(sorted(nodes.items())))


def _steady(seen: list[tuple[int, Source]], last: int) -> Source:
    """The rule in the last segment: relative to the segment, or absolute where every segment reads the same
    one."""
    found = next(source for s, source in seen if s == last)
    if found.kind in ("leaf", "input", INIT):
        return found
    everywhere = all(other == found for _, other in seen) and len({s for s, _ in seen}) > 1
    if found.segment < last and everywhere:
        return found
    return replace(found, segment=last - found.segment, relative=True)


def _agrees(rule: Source, segment: int, found: Source) -> bool:
    """Whether `rule` gives `found`, up to the position in a body of another class."""
    if (rule.kind, rule.name, rule.layer) != (found.kind, found.name, found.layer):
        return False
    if rule.kind in ("leaf", "input"):
        return True
    if rule.kind == INIT:
        return rule.node == found.node
    return rule.segment_from(segment) == found.segment


def _each(key: Key, seen: list[tuple[Unrolled, int, Any]], classes: dict[Key, Classes]) -> Each:
    """A list over segments: every instance must hold the same segments, counted from the start and from its
    own."""
    found: set[Each] = set()
    nodes: dict[int, int] = {}
    for unrolled, segment, values in seen:
        sources = [unrolled.source(node) for node in (values if isinstance(values, tuple) else (values,))]
        first, last = sources[0], sources[-1]
        found.add(Each(first.segment, segment - last.segment, first.kind, first.layer))
        if len({(source.kind, source.layer) for source in sources}) > 1:
            found.add(Each(-1, -1, first.kind, first.layer))
        for source in sources:
            number = classes[(source.kind, source.layer)].of(source.segment, unrolled.count)
            if nodes.setdefault(number, source.node) != source.node:
                found.add(Each(-1, -1, source.kind, source.layer))
    if len(found) != 1:
        raise RerollError(
            f"a list over segments in {region_name(key)} does not follow one rule",
            [str(each) for each in found],
            _AS_FAR_BACK,
        )
    return replace(found.pop(), nodes=tuple(sorted(nodes.items())))


def _output_source(node: fx.Node, unrolled: Unrolled) -> Source:
    source = unrolled.source(node)
    if source.kind in (PROLOGUE, CELL, EPILOGUE):
        return replace(source, segment=unrolled.count - 1 - source.segment, relative=True)
    return source


def outputs_of(small: Unrolled, large: Unrolled, classes: dict[Key, Classes]) -> tuple[Source | Each, ...]:
    found: list[Source | Each] = []
    for a, b in zip(small.outputs, large.outputs, strict=True):
        if isinstance(a, tuple) and isinstance(b, tuple):
            seen = [(small, small.count - 1, a), (large, large.count - 1, b)]
            found.append(_each(("the outputs", -1), seen, classes))
            continue
        assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
        x, y = _output_source(a, small), _output_source(b, large)
        from_end = (x.kind, x.name, x.segment, x.layer) == (y.kind, y.name, y.segment, y.layer)
        if not from_end:
            x, y = small.source(a), large.source(b)
            if (x.kind, x.segment, x.layer) != (y.kind, y.segment, y.layer):
                raise RerollError(
                    "an output comes from another place with one more segment",
                    [
                        f"{a.format_node()}   {a.meta.get('source')}",
                        f"{b.format_node()}   {b.meta.get('source')}",
                    ],
                )
        found.append(_ruled([(small, x), (large, y)], classes, from_end))
    return tuple(found)
