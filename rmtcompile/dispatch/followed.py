"""Followed: does the forward of a long input do what the rules say, from the shapes of its values alone?

Outlines (`frontend/outline.py`) of the two captured lengths promise one for each longer length
(`frontend/steady.py`). Where the forward departs from it, bisection finds the shortest length that does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.compiler.unrolling import resize
from rmtcompile.errors import RerollError, UnsupportedError
from rmtcompile.frontend.outline import Outline, Outliner
from rmtcompile.frontend.outline_arguments import OutlineError
from rmtcompile.frontend.steady import departure
from rmtcompile.ir.segmentation import Segmentation

FAR = 64
"""Segments to which a forward whose cells are compiled is followed at its first call, which takes long: later
calls need not be, up to there."""

FAR_TRAINED = 16
"""The same for a training step: one of another length is compiled or recorded anyway, which takes seconds."""

FOLLOWED = 200_000
"""Operations that a forward may have to be followed, as calls of torch in its code: 10 s of a slow core."""

CAPTURED = 12_000
"""Nodes of a capture that is made to settle a doubt."""


@dataclass(frozen=True)
class Followed:
    """How far the forward was seen to do what the rules say.

    Attributes:
        to: segments.
        departs: what the forward of one segment more does else, and the user's line.
        unknown: why it could not be followed further.
        is_farthest: whether that is as far as any forward is followed.
        nodes: of a capture, for each segment.
    """

    to: int
    departs: str = ""
    unknown: str = ""
    is_farthest: bool = False
    nodes: int = 0

    def error(self, cause: UnsupportedError | None = None) -> RerollError:
        """The refusal of rules that do not hold longer than this."""
        evidence = [self.departs] if self.departs else []
        if cause is not None:
            evidence += [cause.what, *cause.evidence]
        error = RerollError(
            f"what holds for up to {self.to} segments does not hold for {self.to + 1}",
            evidence,
            "let rules depend on the number of the segment in the first few at most; fallback='sequential' "
            "runs the model as it is",
        )
        error.period, error.nodes = getattr(cause, "period", 0), self.nodes
        return error


def followed(
    fn: Callable[..., Any],
    compiled: Compiled,
    args: Any,
    kwargs: Any,
    segmentation: Segmentation,
    count: int,
    known: int,
    far: int = 0,
) -> Followed:
    """Follow a forward to `count` segments, or twice as many as are known where that is more and can be done.

    Args:
        fn: the forward; left as it was.
        args, kwargs: inputs of any length, of which only shapes are read.
        known: segments to which it was followed before.
        far: segments to follow it to where that can be done.
    """
    reasons = []
    nodes = compiled.longest.nodes // compiled.proved_on[-1]
    for below in (False, True):
        walk = _Walk(Outliner(fn, below), compiled.proved_on, args, kwargs, segmentation)
        for length in dict.fromkeys((max(count, 2 * known, far), max(count, 2 * known), count)):
            try:
                return replace(walk.to(length), nodes=nodes)
            except OutlineError as error:
                reasons.append(str(error))
    return Followed(known, unknown=reasons[-1])


class _Walk:
    """Outlines of one forward at several lengths."""

    def __init__(
        self, outliner: Outliner, proved: tuple[int, ...], args: Any, kwargs: Any, segmentation: Segmentation
    ) -> None:
        self.outliner, self.proved = outliner, proved
        self.inputs = args, kwargs, segmentation
        self.known: dict[int, Outline] = {}

    def to(self, length: int) -> Followed:
        """See `followed`."""
        small, large = (self.outline(count) for count in self.proved)
        more = max(1, large.size - small.size)
        reach = min(length, large.count + max(0, FOLLOWED - large.size) // more)
        if reach <= large.count or self.departure(reach) is None:
            is_farthest = reach < length
            unknown = f"{reach + 1} segments are more than {FOLLOWED:,} operations" if is_farthest else ""
            return Followed(max(reach, large.count), unknown=unknown, is_farthest=is_farthest)
        good, bad = large.count, reach
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if self.departure(middle) is None else (good, middle)
        return Followed(good, self.words(bad))

    def outline(self, count: int) -> Outline:
        """The outline of `count` segments."""
        if count not in self.known:
            args, kwargs, segmentation = self.inputs
            resized = resize(args, kwargs, segmentation, count)
            self.known[count], _ = self.outliner.outline(*resized, count)
        return self.known[count]

    def departure(self, count: int) -> Any:
        """Where the forward of this many segments departs from the rules."""
        small, large = (self.outline(proved) for proved in self.proved)
        return departure(small, large, self.outline(count))

    def words(self, count: int) -> str:
        """The same in words, with the user's line."""
        place = self.departure(count)
        args, kwargs, segmentation = self.inputs
        resized = resize(args, kwargs, segmentation, count)
        _, line = self.outliner.outline(*resized, count, (place.label, place.number))
        return f"{count} segments: {self.outliner.name(place.label)} at {line} {place.what}"


def is_alike(
    fn: Callable[..., Any], one: tuple[Any, Any], other: tuple[Any, Any], count: int
) -> bool | None:
    """Whether a forward calls the same operations, in the same order and on the same values, for two inputs
    of so many segments: what it calls may leave no trace in its results, times zero. None where it cannot be
    followed.

    Args:
        one, other: (args, kwargs), of which only shapes are read.
    """
    for below in (False, True):
        outliner = Outliner(fn, below)
        try:
            a, b = (outliner.outline(*inputs, count)[0] for inputs in (one, other))
        except OutlineError:
            continue
        return a.order() == b.order()
    return None


def are_as_many(
    fn: Callable[..., Any],
    proved: tuple[int, ...],
    args: Any,
    kwargs: Any,
    segmentation: Segmentation,
    count: int,
) -> bool | None:
    """Whether a forward of few segments calls each operation as often as those of more promise, the captured
    ones; None where it cannot be followed."""
    for below in (False, True):
        walk = _Walk(Outliner(fn, below), proved, args, kwargs, segmentation)
        try:
            short, few, many = (walk.outliner.calls(walk.outline(n)) for n in (count, *proved))
        except OutlineError:
            continue
        fewer = proved[0] - count
        called = short.keys() | few.keys() | many.keys()
        return all(short[key] == max(0, few[key] - fewer * (many[key] - few[key])) for key in called)
    return None


def is_affordable(compiled: Compiled, count: int) -> bool:
    """Whether so many segments may be captured to settle a doubt."""
    nodes, captured = compiled.longest.nodes, compiled.proved_on[-1]
    return nodes * count <= CAPTURED * captured
