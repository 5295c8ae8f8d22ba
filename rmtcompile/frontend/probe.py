"""Probe: along which axis of which input the forward walks, and how long a segment is.

The forward runs on fake tensors until it has taken two segments; every view that it takes of an input is
located in the input by offset and strides, so slicing, splitting, unbinding, reshaping into segments or
indexing all look alike. Tensors as long as an input are followed like the input, and some of them are cut for
other reasons: a layer walks the tokens of the only segment, halves of a feature axis are swapped. Such cuts
do not stay when the input grows, so other lengths are looked at, too. Where that leaves no cut, dimensions
that grow with the input are followed (`growing`): layers that walk the segments themselves cut such values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from rmtcompile.binding.kinds import held_oddly
from rmtcompile.errors import PartitionError
from rmtcompile.frontend.blame import refusal
from rmtcompile.frontend.growing import Growth
from rmtcompile.frontend.views import MOST, Views, axes_of, views_of
from rmtcompile.ir.segmentation import Axis, Segmentation

Run = Callable[..., tuple[Views, Exception | None]]
"""`views_of` with the forward and its arguments."""


def probe(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], length: int | None = None
) -> Segmentation:
    """Find the segment axis of a forward from the views that it takes of its inputs.

    Args:
        fn: the forward; left as it was.
        args, kwargs: inputs; only their shapes and types are read.
        length: override: the segment length along the walked axis.

    Raises:
        PartitionError: no input is cut into pieces.
        CaptureError: the forward failed before it did; the message names the user's line.
    """
    flat, spec = pytree.tree_flatten((args, kwargs))
    positions = [i for i, value in enumerate(flat) if isinstance(value, torch.Tensor)]
    shapes = [flat[i].shape for i in positions]
    run = partial(views_of, fn, flat, positions, spec)
    if length is not None:
        views, _ = run(shapes, None, True)
        cut = [axis for axis in axes_of(views.taken, shapes) if axis.length == length and axis.dim < 2]
        if cut:
            return _with_partners(cut[0], cut, run, shapes)
        for dim in (1, 0, 2):
            leaf = next(
                (i for i, shape in enumerate(shapes) if len(shape) > dim and shape[dim] >= min(length, 2)),
                None,
            )
            if leaf is not None:
                return _with_partners(Axis(leaf, dim, length), [], run, shapes)
    guess: Segmentation | None = None
    first: Exception | None = None
    leads = [(i, min(len(shape) - 1, 1)) for i, shape in enumerate(shapes) if shape][:_LEADS]
    if not leads:
        _, first = run(shapes)
    for lead in leads:
        found, is_sure, failure = _search(run, shapes, lead)
        if found is not None and is_sure:
            return found
        guess, first = guess or found, first or failure
    if guess is not None:
        return guess
    if first is not None:
        raise refusal(first, held_oddly(fn)) from None
    raise PartitionError(
        "the forward does not cut any of its inputs into segments",
        [f"input {i}: shape {tuple(shape)}" for i, shape in enumerate(shapes)],
        "give segment_size=, or check that the forward walks its input segment by segment",
    )


_LEADS = 4
"""Inputs that are made longer, one after the other, where nothing shows what is cut."""


def _search(
    run: Run, shapes: Sequence[torch.Size], lead: tuple[int, int]
) -> tuple[Segmentation | None, bool, Exception | None]:
    """The segmentation that a forward shows as one axis grows; whether other lengths confirm it, or what the
    forward has raised on inputs of these shapes.

    Args:
        lead: (leaf, dim) of the axis.
    """
    grown = [tuple(shape) for shape in shapes]
    first: Exception | None = None
    operations = 0  # of the last attempt
    apart: frozenset[tuple[int, int]] = frozenset()
    short = growth = Growth()
    beside: list[Axis] = []  # cuts of an axis that the input cannot grow along: halves of features
    doubtful: Segmentation | None = None
    for attempt in range(7):
        views, failure = run(grown, growth, bool(beside))
        first = failure if attempt == 0 else first
        axes, of_tokens = axes_of(views.taken, grown), axes_of(views.tokens, grown)
        is_sure = True
        if axes and not of_tokens:
            found = _confirmed(axes, run, grown)
            found = _followed(axes[0], run, grown) if found == [] else found
            if not found and not beside and (axes[0].leaf, axes[0].dim) != lead:
                beside, axes = axes, []  # there may be one segment only, or a batch of as many
            elif not found and len(shapes) > 1:  # no other length is cut so, or runs: pieces of a memory
                doubtful = doubtful or _with_partners(axes[0], axes, run, grown)
                apart |= {(axes[0].leaf, axes[0].dim)}
                run = partial(run, apart=apart)
                continue
            else:
                axes, is_sure = found or axes, bool(found)
        elif axes:
            known = {(axis.leaf, axis.dim) for axis in of_tokens}
            axes = [*of_tokens, *(axis for axis in axes if (axis.leaf, axis.dim) not in known)]
        if axes and len(shapes) > 1 and not of_tokens and not (walked := _is_walked(axes[0], run, grown)):
            if walked is None:  # the last such cut is left, should there be no other
                doubtful = _with_partners(axes[0], axes, run, grown)
            apart |= {(axes[0].leaf, axes[0].dim)}
            run = partial(run, apart=apart)
            continue
        if axes:
            others = {(axis.leaf, axis.dim) for axis in beside}
            cut_too = [axis for axis in axes if (axis.leaf, axis.dim) not in others]
            return _with_partners(axes[0], cut_too, run, grown), is_sure, first
        if (cut := growth.cut()) is not None:
            return _with_partners(Axis(*lead, cut), [], run, grown), True, first
        walks = attempt > 0 and views.operations > 3 * operations > 0  # more of them for more tokens
        if views.operations > MOST or (walks and failure is None):
            break
        operations = views.operations if failure is None else 0
        grown = _longer(grown, *lead, 4)
        growth = _grown(short, *lead, shapes, grown)
    if beside:
        return _with_partners(beside[0], beside, run, shapes), False, first
    return doubtful, False, first


_PIECES = 3
"""How many times as many pieces of an axis are tried, to see whether more is done for them."""

_EACH = 3
"""Operations for a piece that are no walk: to take it out, to view it, to put it back in a result."""

_LONG = 24
"""Segments of a forward whose calls are counted: a number with many divisors."""


def recounted(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], found: Segmentation
) -> Segmentation | None:
    """The segmentation with segments several times as long, if the forward calls its modules once for each of
    these; None if it does not. What layers cut off at the ends of a segment may look like segments.

    Args:
        found: the segmentation that shorter cuts show.
    """
    flat, spec = pytree.tree_flatten((args, kwargs))
    positions = [i for i, value in enumerate(flat) if isinstance(value, torch.Tensor)]
    shapes = found.shapes([flat[i].shape for i in positions], _LONG)
    calls: Counter[int] = Counter()
    with register_module_forward_pre_hook(lambda module, _: calls.update((id(module),))):
        _, failure = views_of(fn, flat, positions, spec, shapes, None, True)
    times = Counter(n for n in calls.values() if 1 < n < _LONG and _LONG % n == 0)
    are_segments = _LONG in calls.values()  # what is called for each of them says so
    if failure is not None or are_segments or not times:
        return None
    several = _LONG // max(times, key=lambda n: (times[n], n))
    return Segmentation(tuple(replace(axis, length=axis.length * several) for axis in found.axes))


def _longer(shapes: list[Any], leaf: int, dim: int, factor: int) -> list[Any]:
    """The shapes with one dim, and those of other inputs that are as long, `factor` times as long."""
    return [
        tuple(n * factor if _is_as_long(shapes, (leaf, dim), (i, d)) else n for d, n in enumerate(shape))
        for i, shape in enumerate(shapes)
    ]


def _is_as_long(shapes: Sequence[Sequence[int]], one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two axes are of equal size, and at the same place, or the only one of their input (positions
    [T] beside tokens [B, T], if there are not as many texts as tokens)."""
    (leaf, dim), (i, d) = one, other
    size, mine, theirs = shapes[leaf][dim], list(shapes[leaf]), list(shapes[i])
    is_only = 1 in (len(mine), len(theirs)) and mine.count(size) == theirs.count(size) == 1
    return theirs[d] == size and (d == dim or is_only)


def _grown(short: Growth, leaf: int, dim: int, shapes: Sequence[Any], longer: Sequence[Any]) -> Growth:
    """What follows the values that grow with an axis from some shapes to longer ones."""
    return Growth(short, (shapes[leaf][dim], longer[leaf][dim]))


def _followed(axis: Axis, run: Run, shapes: list[Any]) -> list[Axis]:
    """The cut of values that grow with an axis, if there is one."""
    short = Growth()
    run(shapes, short, True)
    for factor in (4, 16):
        longer = _longer(shapes, axis.leaf, axis.dim, factor)
        growth = _grown(short, axis.leaf, axis.dim, shapes, longer)
        run(longer, growth, True)
        if (cut := growth.cut()) is not None:
            return [Axis(axis.leaf, axis.dim, cut)]
    return []


def _confirmed(axes: list[Axis], run: Run, shapes: list[Any]) -> list[Axis] | None:
    """The cut that two of three lengths of the input agree on; None if the model does not run on others.
    Lengths at which two axes cannot be told apart say nothing."""
    found, failed = [axes], False
    longer = [_longer(shapes, axes[0].leaf, axes[0].dim, factor) for factor in (4, 3, 5, 7)]
    for sizes in [sizes for sizes in longer if not _collides(shapes, sizes, axes[0])][:2]:
        views, failure = run(sizes)
        again = axes_of(views.taken, sizes)
        if again and again[0].dim > max(1, axes[0].dim):
            again = []  # that of features, which have not grown, says nothing
        if any(again[:1] == other[:1] for other in found):
            return again
        failed = failed or failure is not None
        found.append(again or axes)
    return None if failed else []


def _is_walked(axis: Axis, run: Run, shapes: list[Any]) -> bool | None:
    """Whether the forward does more for more pieces of an axis; None where it does not run on more. A memory
    that is an argument may be taken apart by layers before the input is by segments. Asked where that may be
    so: of another input than the first one, and of pieces of one."""
    if axis.leaf == 0 and axis.length > 1:
        return True
    (short, failed), (long, failed_too) = (
        run(_longer(shapes, axis.leaf, axis.dim, factor), None, True) for factor in (1, _PIECES)
    )
    pieces = shapes[axis.leaf][axis.dim] // axis.length * (_PIECES - 1)
    if failed_too and not failed:
        return None
    return bool(failed) or long.operations - short.operations > _EACH * pieces


def _collides(shapes: list[Any], longer: list[Any], axis: Axis) -> bool:
    """Whether an axis that has grown is as long now as one that has not."""
    pairs = [pair for a, b in zip(shapes, longer, strict=True) for pair in zip(a, b, strict=True)]
    return any(before == after == longer[axis.leaf][axis.dim] for before, after in pairs)


def _with_partners(
    first: Axis, cut: Sequence[Axis], run: Run, shapes: Sequence[Sequence[int]]
) -> Segmentation:
    """Add the axes that grow with the first one: those that are cut too, and those of equal size."""
    known = {(axis.leaf, axis.dim): axis for axis in cut}
    size, count = shapes[first.leaf][first.dim], _pieces(first, shapes)
    others = [
        (leaf, dim, n)
        for leaf, shape in enumerate(shapes)
        for dim, n in enumerate(shape)
        if (leaf, dim) != (first.leaf, first.dim)
    ]
    turned = [
        (leaf, dim) for leaf, dim, n in others if leaf != first.leaf and n == size > 1 and dim != first.dim
    ]
    if any(place not in known for place in turned):  # cut behind the first two segments, if it is
        views, _ = run(shapes, None, True)
        seen = {(axis.leaf, axis.dim): axis for axis in axes_of(views.taken, shapes)}
        known = {place: seen[place] for place in turned if place in seen} | known
    axes = [first]
    for leaf, dim, n in others:
        if (other := known.get((leaf, dim))) is not None:
            if dim >= first.dim or _pieces(other, shapes) == count:
                axes.append(other)  # else a batch that is as large as something that is cut
        elif n > 1 and _is_as_long(shapes, (first.leaf, first.dim), (leaf, dim)):
            axes.append(Axis(leaf, dim, first.length))
    return Segmentation(tuple(axes))


def _pieces(axis: Axis, shapes: Sequence[Sequence[int]]) -> int:
    """Segments along an axis, an incomplete one included."""
    return -(-shapes[axis.leaf][axis.dim] // axis.length)


__all__ = ["probe", "recounted"]
