"""Rules from captures: which lengths are captured, and in which form, until two neighbours follow one rule.

as it comes                  2 and 3 segments, or more, up to 6
a window of a few segments   the same with its parts as what layers read, or with the window as one value
a list that grows            the same with joins nested
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from rmtcompile.binding.arguments import tensors_of
from rmtcompile.binding.captured import Capture, Effect
from rmtcompile.compiler.results import Aligner, Pairs
from rmtcompile.compiler.stages import Log
from rmtcompile.compiler.unrolling import Joins, joins_of, unrolled_forward, walked_parts
from rmtcompile.errors import (
    BoundedError,
    CaptureError,
    CircleError,
    RerollError,
    UnseenError,
    UnsupportedError,
)
from rmtcompile.ir.segmentation import Segmentation
from rmtcompile.options import Options
from rmtcompile.passes.flat.functionalise import overload_name
from rmtcompile.passes.flat.nest import NESTED
from rmtcompile.passes.flat.store_forwarding import HELD, LISTED
from rmtcompile.passes.grid.dependence import Edge, edges
from rmtcompile.passes.grid.reroll import Rolled, Unrolled, gathered, period_of, period_of_growing, reroll

LONGEST = 4
"""The longest period that is looked for."""

SEEN = 18
"""Segments of the capture in which it is looked for."""

UNSEEN = 3
"""Segments more that are captured where what was captured does not show all that longer inputs need."""

NODES = 12_000
"""Nodes that this capture may have."""


@dataclass(frozen=True)
class Found:
    """Rules, and what they were read from.

    Attributes:
        rolled: the rules.
        captures: those that they were proved on.
        paths: of the layers.
        written: what the forward writes in place.
        result, effects: rules of what it returns and leaves behind.
        joins: the form that joins have, see `Options`.
    """

    rolled: Rolled
    captures: tuple[Capture, Capture]
    paths: tuple[str, ...]
    written: tuple[tuple[str, str], ...]
    result: Any
    effects: list[tuple[Effect, Any]]
    joins: str = ""


class _NoRulesError(Exception):
    """No two lengths follow one rule.

    Args:
        error: why.
        joins: what layers join in the longest of them.
        nodes: of it, for each segment.
    """

    def __init__(self, error: RerollError, joins: Joins, nodes: int) -> None:
        super().__init__()
        self.error, self.joins, self.nodes = error, joins, nodes


def rules_of(
    fn: Callable[..., Any], args: Any, kwargs: Any, segmentation: Segmentation, options: Options, log: Log
) -> Found:
    """Capture two lengths that follow one rule, the shortest that do. Of several forms that give rules the
    one whose schedule is shorter is taken.

    Raises:
        BoundedError: none were found before the model refused so long an input.
        RerollError: no rules were found.
    """

    def settled(joins: str, fewest: int = 0) -> Found | None:
        fewest = max(options.min_segments_captured, fewest)
        longest = max(options.max_segments_captured, fewest + 1)
        form = replace(options, joins=joins, min_segments_captured=fewest, max_segments_captured=longest)
        try:
            return _settled(fn, args, kwargs, segmentation, form, log)
        except (_NoRulesError, UnsupportedError):
            return None

    found: Found | None = None
    failure: RerollError | None = None
    is_long_affordable = False
    try:
        found = _settled(fn, args, kwargs, segmentation, options, log)
        joins = _joins(found.captures[-1], found.rolled.proved_on[-1], segmentation, options)
    except _NoRulesError as error:
        failure, joins = error.error, error.joins
        failure.nodes = error.nodes
        is_long_affordable = error.nodes * SEEN <= NODES
    if joins.slide and (found is None or (_waits_for_windows(found) and not options.has_bands)):
        listed = settled(LISTED)
        if listed is not None and not _waits(listed):
            return listed
        found = found or settled(HELD) or listed
    if found is None and joins.grow:
        found = settled(NESTED, 4)
    if found is None:
        assert failure is not None
        if is_long_affordable:
            failure.period = period_of_forward(fn, args, kwargs, segmentation, options, log)
        if failure.period == 1:  # what fills up first, and is even when it is full
            found = settled("", SEEN - 1)
        if found is None:
            raise failure from None
    return found


def period_of_forward(
    fn: Callable[..., Any], args: Any, kwargs: Any, segmentation: Segmentation, options: Options, log: Log
) -> int:
    """After how many segments what the forward does repeats, as a longer capture shows it; 0 where it does
    not, or where several segments are taken as one already."""
    if not segmentation.is_own:
        return 0
    try:
        _, unrolled, _, _ = unrolled_forward(fn, args, kwargs, segmentation, SEEN, options, log)
    except UnsupportedError:
        return 0
    return period_of(unrolled, LONGEST) or period_of_growing(unrolled, LONGEST)


def _joins(capture: Capture, count: int, segmentation: Segmentation, options: Options) -> Joins:
    """What layers join; of segments that are several of the model, or parts of one, this is not asked."""
    return joins_of(capture, count, options) if segmentation.is_own else Joins()


def _waits(found: Found) -> list[Edge]:
    """What makes segments of one layer wait for each other."""
    return [edge for edge in edges(found.rolled) if edge.offset[1] < 1]


def _waits_for_windows(found: Found) -> bool:
    """Whether they wait for nothing but what is put together of other values, or cut."""
    names = {overload_name(edge.read) if isinstance(edge.read, fx.Node) else "" for edge in _waits(found)}
    return bool(names) and names <= {"cat", "slice", "detach"}


def _settled(
    fn: Callable[..., Any], args: Any, kwargs: Any, segmentation: Segmentation, options: Options, log: Log
) -> Found:
    """See `rules_of`: in one form.

    Raises:
        _NoRulesError: no rules were found.
        BoundedError: none were found before the model refused so long an input.
    """
    failure: RerollError | None = None
    unseen: Found | None = None  # rules that do not show all that longer inputs need: these are compared
    older: Unrolled | None = None
    at_hand, rest = segmentation.count([tensor.shape for tensor in tensors_of(args, kwargs)])

    def unrolled(count: int) -> Any:
        with _bounded(count > at_hand):
            return unrolled_forward(fn, args, kwargs, segmentation, count, options, log)

    first = max(options.min_segments_captured, 3 if rest else 2)  # a whole one between two special ones
    longest = options.max_segments_captured
    count, (capture_a, small, paths, written) = _first_in_order(unrolled, first, longest)
    while count < longest or (unseen is not None and count < longest + UNSEEN):
        count += 1
        try:
            capture_b, large, _, again = unrolled(count)
        except BoundedError:
            if unseen is None:
                raise
            return unseen
        try:
            _same_leaves(capture_a, capture_b)
            if written != again:
                raise RerollError(
                    "other tensors are written in place with one more segment", [f"{written} {again}"]
                )
            with log.stage(f"reroll {small.count} -> {large.count}"):
                counts = (small.count, large.count)
                result, effects, pairs = results_of(capture_a, capture_b, counts, len(written))
                may_grow = count - (rest > 0) > 3  # a window that fills up grows at first
                rolled = _ruled(grouped(small, pairs, 0), grouped(large, pairs, 1), older, may_grow)
            return Found(rolled, (capture_a, capture_b), paths, written, result, effects, options.joins)
        except RerollError as error:
            failure, unseen = error, None
            if isinstance(error, UnseenError):
                given = (capture_a, capture_b), paths, written, result, effects, options.joins
                unseen = Found(error.rolled, *given)
        older, capture_a, small, written = small, capture_b, large, again
    assert failure is not None
    if unseen is not None:
        return unseen
    joins = _joins(capture_a, count, segmentation, options)
    length = (count - (rest > 0)) * segmentation.axes[0].length + rest
    failure.parts = walked_parts(capture_a, segmentation, length)
    raise _NoRulesError(failure, joins, len(capture_a.graph.nodes) // count)


def _first_in_order(unrolled: Callable[[int], Any], first: int, longest: int) -> tuple[int, Any]:
    """The shortest capture in which there is an order of cells: two segments may not show where what both
    read lies."""
    while True:
        try:
            return first, unrolled(first)
        except CircleError:
            first += 1
            if first >= longest:
                raise


@contextmanager
def _bounded(is_longer: bool) -> Iterator[None]:
    """What fails on more segments than the input has may be a bound of the model."""
    try:
        yield
    except CaptureError as error:
        if not is_longer:
            raise
        raise BoundedError(error.what, error.evidence, error.remedy) from error


def _ruled(small: Unrolled, large: Unrolled, older: Unrolled | None, may_grow: bool) -> Rolled:
    """The rules of two captures: of cells of even sizes if there are any, else of cells that may grow."""
    try:
        return reroll(small, large, older)
    except RerollError as error:
        if not may_grow:
            raise
        try:
            return reroll(small, large, older, may_grow=True)
        except UnseenError:
            raise
        except RerollError:
            raise error from None


def _same_leaves(a: Capture, b: Capture) -> None:
    """Constants have names by position; check that equal names mean equal values."""
    mine = {leaf.name: leaf for leaf in a.leaves.values() if leaf.is_constant}
    for leaf in b.leaves.values():
        other = mine.get(leaf.name)
        if leaf.is_constant and other is not None and other.tensor is not leaf.tensor:
            if other.tensor.shape != leaf.tensor.shape or not torch.equal(other.tensor, leaf.tensor):
                raise RerollError("a constant changes with the number of segments", [leaf.name])


def results_of(
    a: Capture, b: Capture, counts: tuple[int, int], n_written: int
) -> tuple[Any, list[tuple[Effect, Any]], Pairs]:
    """Rules for the result and for what is left behind, and which outputs of the two captures correspond."""
    aligner = Aligner(counts)
    result = aligner.align(a.result, b.result, "what the forward returns")
    if [effect.name for effect in a.effects] != [effect.name for effect in b.effects]:
        raise RerollError(
            "what the forward leaves behind changes with the number of segments",
            sorted({e.name for e in a.effects} ^ {e.name for e in b.effects}),
        )
    effects = []
    for x, y in zip(a.effects, b.effects, strict=True):
        where = f"what the forward leaves in {x.name}"
        effects.append((x, aligner.align((x.leaves, x.spec), (y.leaves, y.spec), where)))
    total_a, total_b = len(a.outputs), len(b.outputs)
    for i in range(n_written, 0, -1):
        aligner.pairs.append(((total_a - i,), (total_b - i,), False))
    return result, effects, aligner.pairs


def grouped(unrolled: Unrolled, pairs: Pairs, side: int) -> Unrolled:
    """Outputs in the order of the pairs; a family is a tuple of nodes of one kind."""
    outputs: list[Any] = []
    for small, large, is_family in pairs:
        found = [unrolled.outputs[i] for i in (small, large)[side]]
        outputs.append(tuple(found) if is_family else found[0])
    return gathered(replace(unrolled, outputs=tuple(outputs)))
