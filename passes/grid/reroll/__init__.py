"""Reroll: from a graph unrolled over k segments to rules that give the graph of any number of segments.

    cell (0, l)  A' = add(zeros, u)            class first:  A' = add(A, u)    A from init
    cell (1, l)  A' = add(A', u)       ->      class later:  A' = add(A, u)    A from cell (s - 1, l)
    cell (2, l)  A' = add(A', u)

Each region is reduced to a *body* (its operations, live-ins apart) and the sources of its live-ins. Bodies
are equal or not; sources are absolute ("init", "segment 0") or relative ("one segment back"); integers in
prologues and epilogues are affine in the segment s and in the number of segments S.

Proof by comparison: the rules are read from a capture with k segments, then predict a capture with k + 1:
every region, operation, integer and edge of the larger capture has to come out as predicted, or `RerollError`
names what did not.
Reference: loop rerolling is the inverse of unrolling; anti-unification gives the affine integers.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rmtcompile.errors import RerollError, UnseenError
from rmtcompile.ir.program import Body, Each, Source
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, INIT, PROLOGUE, Region
from rmtcompile.passes.grid.reroll.classes import classes_of, members_of
from rmtcompile.passes.grid.reroll.gathered import gathered
from rmtcompile.passes.grid.reroll.loosened import (
    check_growth,
    check_readers,
    loosened,
    period_of_growing,
)
from rmtcompile.passes.grid.reroll.rules import Classes, ClassRule, LiveIn, Rolled
from rmtcompile.passes.grid.reroll.sources import affine, live_in_of, outputs_of
from rmtcompile.passes.grid.reroll.unrolled import (
    EMPTY,
    Key,
    Unrolled,
    body_at,
    period_of,
    region_name,
    shape_of,
    typed,
    unroll,
)


def reroll(small: Unrolled, large: Unrolled, older: Unrolled | None = None, may_grow: bool = False) -> Rolled:
    """Read rules from `small` (k segments) and prove that they give `large` (k + 1 segments, or more).

    Args:
        older: a capture of fewer segments, for integers that two captures show too seldom.
        may_grow: whether sizes inside of cells may grow with the segment.

    Raises:
        RerollError: the two captures do not follow one rule; the message shows the first place where they
            differ.
    """
    if large.count <= small.count or large.n_layers != small.n_layers:
        raise RerollError(
            "one more segment changes the layers that run",
            [
                f"{small.count} segments: {small.n_layers} layers",
                f"{large.count} segments: {large.n_layers} layers",
            ],
        )
    keys: list[Key] = [(PROLOGUE, -1), *((CELL, layer) for layer in range(small.n_layers)), (EPILOGUE, -1)]
    classes: dict[Key, Classes] = {(INIT, -1): Classes(0, 0)}
    rules: dict[Key, dict[int, ClassRule]] = {(INIT, -1): {0: _init_rule(small, large)}}
    growing: set[int] = set()
    for key in keys:
        try:
            classes[key] = classes_of(key, small, large)
        except RerollError:
            if not may_grow or key[0] != CELL:
                raise
            growing.add(key[1])
    if growing:
        small, large = loosened(small, growing), loosened(large, growing)
        older = loosened(older, growing) if older is not None else None
        classes |= {(CELL, layer): classes_of((CELL, layer), small, large) for layer in sorted(growing)}
    for key in keys:
        rules[key] = _class_rules(key, classes, small, large, older)
    for layer in growing:
        for rule in rules[(CELL, layer)].values():
            check_growth(layer, rule)
    if growing:
        check_readers(rules, classes)
    outputs = outputs_of(small, large, classes)
    rules, outputs = _complete(rules, outputs)
    minimum = max(c.head + c.tail if c.head and c.tail else 1 for c in classes.values())
    proved_on = small.count, large.count
    rolled = Rolled(small.n_layers, classes, rules, outputs, small, minimum, None, proved_on)
    for key in keys:
        _check_seen(key, rolled, small, large)
    return rolled


def fixed(only: Unrolled) -> Rolled:
    """Rules for one number of segments. They need no proof, and predict nothing: segments are of one class
    where that gives rules, and else each is its own."""
    try:
        return _fixed(only, is_apart=False)
    except RerollError:
        return _fixed(only, is_apart=True)


def _fixed(only: Unrolled, is_apart: bool) -> Rolled:
    keys: list[Key] = [(PROLOGUE, -1), *((CELL, layer) for layer in range(only.n_layers)), (EPILOGUE, -1)]
    classes: dict[Key, Classes] = {(INIT, -1): Classes(0, 0)}
    rules: dict[Key, dict[int, ClassRule]] = {(INIT, -1): {0: _init_rule(only, only)}}
    for key in keys:
        bodies = [body_at(only, key, s) for s in range(only.count)]
        heads = range(only.count - 1 if is_apart else 0, only.count)
        head = next((h for h in heads if all(b.key == bodies[h].key for b in bodies[h:])), 0)
        classes[key] = Classes(head, 0)
    for key in keys:
        rules[key] = _class_rules(key, classes, only, only)
    outputs = outputs_of(only, only, classes)
    return Rolled(only.n_layers, classes, rules, outputs, only, only.count, only.count, (only.count,))


def _class_rules(
    key: Key, classes: dict[Key, Classes], small: Unrolled, large: Unrolled, older: Unrolled | None = None
) -> dict[int, ClassRule]:
    members = members_of(key, classes[key], small, large)
    before = members_of(key, classes[key], older, older) if older is not None else {}
    rules: dict[int, ClassRule] = {}
    predicts = small is not large
    for number, found in members.items():
        base, first = found[0]
        body = body_at(base, key, first)
        body = body.lender or body
        readers = [_readers(key, j, found, members) for j in range(len(body.live_ins))]
        sources = tuple(live_in_of(key, j, some, classes, predicts) for j, some in enumerate(readers))
        alike = [(u, s) for u, s in before.get(number, ()) if body_at(u, key, s).key == body.key]
        ints = tuple(affine(key, j, found, others=alike, predicts=predicts) for j in range(len(body.ints)))
        others = [body_at(unrolled, key, s) for unrolled, s in found]
        rules[number] = ClassRule(body, sources, ints, _varying(body, others))
    return rules


def _readers(
    key: Key, j: int, found: list[tuple[Unrolled, int]], members: dict[int, list[tuple[Unrolled, int]]]
) -> list[tuple[Unrolled, int]]:
    """The instances of a class that read live-in j; where it is dead in all of them (nobody reads the memory
    that last cells write), those of a class with the same code."""

    def read_by(others: list[tuple[Unrolled, int]]) -> bool:
        bodies = [body_at(unrolled, key, s) for unrolled, s in others]
        return bodies[0].key == mine and any(body.live_ins[j] is not None for body in bodies)

    base, first = found[0]
    mine = body_at(base, key, first).key
    return next((others for others in (found, *members.values()) if read_by(others)), found)


def _init_rule(small: Unrolled, large: Unrolled) -> ClassRule:
    key = (INIT, -1)
    a, b = small.bodies.get(Region(INIT), EMPTY), large.bodies.get(Region(INIT), EMPTY)
    if a.key != b.key:
        rows = list(zip(a.key, b.key, a.nodes, b.nodes, strict=False))
        where = next(((x, y) for left, right, x, y in rows if left != right), None)
        raise RerollError(
            "what the forward computes before its segments changes with their number",
            [f"{n.format_node()}   {n.meta.get('source')}" for n in where]
            if where
            else [f"{len(a.nodes)} operations for {small.count} segments, {len(b.nodes)} for {large.count}"],
            "compute per segment what depends on the segment",
        )
    members = [(small, 0), (large, 0)] if small is not large else [(small, 0)]
    sources = []
    for j, node in enumerate(a.live_ins):
        source = small.source(node)  # type: ignore[arg-type]
        other = large.source(b.live_ins[j])  # type: ignore[arg-type]
        if source != other:
            raise RerollError(
                "what is computed before the segments reads other values with one more segment",
                [f"{small.count} segments: {source}", f"{large.count} segments: {other}"],
                "compute per segment what depends on the segment",
            )
        sources.append(LiveIn({}, source))
    ints = tuple(affine(key, j, members, by_count_only=True) for j in range(len(a.ints)))
    return ClassRule(a, tuple(sources), ints, _varying(a, [b]))


def _varying(body: Body, others: list[Body]) -> dict[fx.Node, frozenset[int]]:
    """Dims of a body's values that have another size in another instance of it."""
    found: dict[fx.Node, set[int]] = defaultdict(set)
    for other in others:
        mine_all, theirs_all = (*body.nodes, *body.live_ins), (*other.nodes, *other.live_ins)
        for mine, theirs in zip(mine_all, theirs_all, strict=False):
            if isinstance(mine, fx.Node) and isinstance(theirs, fx.Node) and mine is not theirs:
                a, b = shape_of(mine.meta.get("val")), shape_of(theirs.meta.get("val"))
                if a != b and isinstance(mine.meta.get("val"), torch.Tensor):
                    found[mine] |= {i for i, (x, y) in enumerate(zip(a[0], b[0], strict=False)) if x != y}
    return {node: frozenset(dims) for node, dims in found.items()}


def _check_seen(key: Key, rolled: Rolled, small: Unrolled, large: Unrolled) -> None:
    """Look whether the captures show what every class of producers gives that longer inputs make one read: a
    value of three segments before is of the first ones in a capture of six."""
    classes = rolled.classes
    members = members_of(key, classes[key], small, large)
    for number, rule in rolled.rules[key].items():
        found = [(u, u.count - 1 - s, body_at(u, key, s).live_ins) for u, s in members[number]]
        for j, live_in in enumerate(rule.sources):
            source = live_in.steady
            dead = [{end for u, end, ins in found if u is of and ins[j] is None} for of in (small, large)]
            ends, is_at_the_end = dead[1], dead[0] == dead[1]  # else nobody reads it but the first segments
            if not (isinstance(source, Source) and source.relative and source.nodes and is_at_the_end):
                continue
            other = classes[(source.kind, source.layer)]
            met = classes[key].met(number, source.segment, other, small.count, live_in.early, ends)
            if unseen := met - {seen for seen, _ in source.nodes}:
                error = UnseenError(
                    f"{region_name(key)} of a longer input reads what these captures do not show",
                    [f"{source}, which may be of class {', '.join(map(str, sorted(unseen)))}"],
                )
                error.rolled = rolled
                raise error


def _complete(
    rules: dict[Key, dict[int, ClassRule]], outputs: tuple[Source | Each, ...]
) -> tuple[dict[Key, dict[int, ClassRule]], tuple[Source | Each, ...]]:
    """Give each source the index of its value in every class that any consumer of the same value has shown.

    The last state of layer l is read from a later segment in any capture with several segments; that segment
    0 holds the same value at another index is known from segment 1, which reads it.
    """
    known: dict[Key, list[dict[int, int]]] = defaultdict(list)

    def learn(source: Source | Each) -> None:
        merged = dict(source.nodes)
        rest = []
        for other in known[(source.kind, source.layer)]:
            shares = any(merged.get(number) == index for number, index in other.items())
            clashes = any(merged.get(number, index) != index for number, index in other.items())
            if shares and not clashes:
                merged = {**other, **merged}
            else:
                rest.append(other)
        known[(source.kind, source.layer)] = [*rest, merged]

    def recall(source: Any) -> Any:
        for other in known.get((source.kind, source.layer), ()) if source is not None else ():
            if all(other.get(number) == index for number, index in source.nodes):
                return replace(source, nodes=tuple(sorted(other.items())))
        return source

    for by_class in rules.values():
        for rule in by_class.values():
            for live_in in rule.sources:
                for source in (*live_in.early.values(), live_in.steady):
                    if source is not None and source.nodes:
                        learn(source)
    for source in outputs:
        if source.nodes:
            learn(source)
    completed = {
        key: {
            number: replace(
                rule,
                sources=tuple(
                    LiveIn({s: recall(source) for s, source in x.early.items()}, recall(x.steady))
                    for x in rule.sources
                ),
            )
            for number, rule in by_class.items()
        }
        for key, by_class in rules.items()
    }
    return completed, tuple(recall(source) for source in outputs)


__all__ = [
    "ClassRule", "Classes", "LiveIn", "Rolled", "Unrolled", "fixed", "gathered", "period_of",
    "period_of_growing", "reroll", "shape_of", "typed", "unroll",
]  # fmt: skip
