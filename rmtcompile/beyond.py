"""Beyond the captured lengths: does a program give what the model gives where its rules were not proved?

Rules are read from two captures of a few segments. A carry that is read four segments later, an integer that
only looks like a line, or another rule from the tenth segment on does not show there.

    captured, 2 and 3 segments      proved
    followed, 4 .. 24 segments      the same operations, integers, sizes and operands as the rules say
    compared, 4 .. 8 segments       the same values
    longer                          extrapolated, until such an input comes

The first time that a program is to run more segments than were followed, the forward is followed on that
many, or on twice as many as before where that is more (`outline.py`, `steady.py`): no values are computed.
Where it departs from the rules they are read again from longer captures, which settle it. And a program runs
the first segments of its first longer input, uncompiled, and is compared with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.arguments import OutlineError
from rmtcompile.errors import RerollError, UnsupportedError
from rmtcompile.outline import Outline, Outliner
from rmtcompile.pipeline import Compiled
from rmtcompile.probe import Segmentation
from rmtcompile.steady import departure
from rmtcompile.unrolling import resize

CHECKED = 8
"""Segments of the comparison: what it costs is that many of the model's own, run one by one."""

LONGER = 2
"""Segments captured at most, beyond the usual, where a comparison has failed."""


def length_to_check(compiled: Compiled, count: int, checked: int) -> int | None:
    """How many segments to compare before `count` segments run; None where that is known to be right.

    Args:
        compiled: the program.
        count: segments of the call.
        checked: the most segments compared so far.
    """
    proved = compiled.rolled.proved_on[-1]
    wanted, known = min(count, max(CHECKED, proved + 2)), max(checked, proved)
    return wanted if compiled.rolled.fixed is None and wanted > known else None


def first_segments(args: Any, kwargs: Any, segmentation: Segmentation, count: int) -> tuple[Any, Any]:
    """The arguments cut to their first `count` segments, as copies."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    positions = [i for i, value in enumerate(flat) if isinstance(value, torch.Tensor)]
    shapes = segmentation.shapes([flat[i].shape for i in positions], count)
    for position, shape in zip(positions, shapes, strict=True):
        value = flat[position].detach()
        for dim, size in enumerate(shape):
            value = value.narrow(dim, 0, size)
        flat[position] = value.clone()
    cut: tuple[Any, Any] = pytree.tree_unflatten(flat, spec)
    return cut


GROSS = 0.5
"""Relative difference that is more than rounding in 16 bits: a recurrence may amplify rounding from segment
to segment, an ARMT of random weights in bfloat16 to 7e-2 after eight."""


SLIGHT = 1e-2
"""The same in float32, for differences that longer captures do not explain: the ARMT of 32 layers with random
weights amplifies rounding to 2e-4 after eight segments."""


def rounding(compiled: Compiled) -> float:
    """The relative difference that may be rounding, whatever the type of the results: above 0 where the
    forward computes in 16 bits anywhere."""
    return GROSS if _types(compiled) & _LOW else 0.0


def unexplained(compiled: Compiled) -> float:
    """The relative difference that is taken for rounding once longer captures have given the same rules: any
    where the forward computes in 16 bits, `SLIGHT` where it does in float32."""
    types = _types(compiled)
    return math.inf if types & _LOW else SLIGHT if torch.float32 in types else 0.0


_LOW = {torch.float16, torch.bfloat16}


def _types(compiled: Compiled) -> set[torch.dtype]:
    """The types of all values of a forward."""
    nodes = compiled.captures[-1].graph.nodes
    values = (leaf for node in nodes for leaf in pytree.tree_leaves(node.meta.get("val")))
    return {value.dtype for value in values if isinstance(value, torch.Tensor)}


# ---- following ---------------------------------------------------------------------------------------------

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
    """

    to: int
    departs: str = ""
    unknown: str = ""

    def error(self, cause: UnsupportedError | None = None) -> RerollError:
        """The refusal of rules that do not hold longer than this."""
        evidence = [self.departs] if self.departs else []
        if cause is not None:
            evidence += [cause.what, *cause.evidence]
        return RerollError(
            f"what holds for up to {self.to} segments does not hold for {self.to + 1}",
            evidence,
            "let rules depend on the number of the segment in the first few at most; fallback='sequential' "
            "runs the model as it is",
        )


def followed(
    fn: Callable[..., Any],
    compiled: Compiled,
    args: Any,
    kwargs: Any,
    segmentation: Segmentation,
    count: int,
    known: int,
) -> Followed:
    """Follow a forward to `count` segments, or twice as many as are known where that is more and can be done.

    Args:
        fn: the forward; left as it was.
        args, kwargs: inputs of any length, of which only shapes are read.
        known: segments to which it was followed before.
    """
    reasons = []
    for below in (False, True):
        walk = _Walk(Outliner(fn, below), compiled.rolled.proved_on, args, kwargs, segmentation)
        for length in dict.fromkeys((max(count, 2 * known), count)):
            try:
                return walk.to(length)
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
            unknown = f"{length} segments are more than {FOLLOWED:,} operations" if reach < length else ""
            return Followed(max(reach, large.count), unknown=unknown)
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


def is_affordable(compiled: Compiled, count: int) -> bool:
    """Whether so many segments may be captured to settle a doubt."""
    nodes, captured = len(compiled.captures[-1].graph.nodes), compiled.rolled.proved_on[-1]
    return nodes * count <= CAPTURED * captured
