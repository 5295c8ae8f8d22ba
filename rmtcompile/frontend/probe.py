"""Probe: along which axis of which input the forward walks, and how long a segment is.

The forward runs on fake tensors until it has taken two segments; every view that it takes of an input is
located in the input by offset and strides, so slicing, splitting, unbinding, reshaping into segments or
indexing all look alike. Tensors as long as an input are followed like the input, and some of them are cut for
other reasons: a layer walks the tokens of the only segment, halves of a feature axis are swapped. Such cuts
do not stay when the input grows, so other lengths are looked at, too. Where that leaves no cut, dimensions
that grow with the input are followed (`growing`): layers that walk the segments themselves cut such values.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rmtcompile.binding.arguments import left_alone
from rmtcompile.binding.kinds import held_oddly
from rmtcompile.binding.state import Contents, Snapshot, roots_of
from rmtcompile.binding.surroundings import Surroundings
from rmtcompile.errors import PartitionError, UnsupportedError
from rmtcompile.frontend.blame import refusal
from rmtcompile.frontend.growing import Growth, box
from rmtcompile.frontend.known import Known, Reads
from rmtcompile.frontend.masks import Masks
from rmtcompile.frontend.tracing import SharedData, as_written, uncompiled_callables
from rmtcompile.ir.modes import uncached_autocast
from rmtcompile.ir.segmentation import Axis, Segmentation

Boxes = dict[tuple[int, int], list[tuple[int, int]]]
"""Start and length of views, in the order in which they were taken, by (leaf, dim)."""


class _Enough(BaseException):
    """Two segments have been seen, or so many operations without them that there are none to see."""


_MOST = 50_000
"""Operations of a forward after which no cut is expected any more: two segments of a deep model are fewer."""


class _Views(TorchDispatchMode):
    """Collects the boxes (start and length by dimension) that views of the inputs cover, in the order they
    are taken."""

    def __init__(
        self,
        leaves: list[torch.Tensor],
        growth: Growth,
        is_following: bool,
        apart: frozenset[tuple[int, int]] = frozenset(),
    ) -> None:
        super().__init__()
        self.apart = apart  # axes whose cuts are no segments
        self.growth, self.is_following = growth, is_following
        self.bases: dict[int, tuple[torch.Tensor, dict[int, tuple[int, int]]]] = {}
        self.axis_of_size: dict[int, tuple[int, int]] = {}
        for i, leaf in enumerate(leaves):
            self.bases[leaf.untyped_storage()._cdata] = (leaf, {d: (i, d) for d in range(leaf.dim())})
            for d, size in sorted(enumerate(leaf.shape), key=lambda one: one[0] != 1):  # as long as the batch
                if size > 2:
                    self.axis_of_size.setdefault(size, (i, d))
        self.operations = 0
        self.taken: Boxes = defaultdict(list)
        self.tokens: Boxes = defaultdict(list)  # those taken of integers, which no layer cuts
        self.integers = {x.untyped_storage()._cdata for x in leaves if not x.dtype.is_floating_point}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if self.operations > _MOST:
            raise _Enough
        several = result if isinstance(result, (list, tuple)) else (result,)
        values = [value for value in several if isinstance(value, torch.Tensor)]
        self.growth.saw(func, values)
        for value in values:
            self._note(value)
        return result

    def _note(self, value: torch.Tensor) -> None:
        """Locate a view in what it views; a new tensor as long as an input's axis is followed like the
        input."""
        found = self.bases.get(value.untyped_storage()._cdata)
        like_inputs = {d: self.axis_of_size[n] for d, n in enumerate(value.shape) if n in self.axis_of_size}
        if found is None:
            if like_inputs and value.is_contiguous():
                self.bases[value.untyped_storage()._cdata] = (value, like_inputs)
            return
        base, axes = found
        is_token = value.untyped_storage()._cdata in self.integers
        are_told_apart = len(set(like_inputs.values())) == len(like_inputs) > len(axes)
        if value.numel() == base.numel() and value.is_contiguous() and are_told_apart:
            # The rows [B * T, D] of a product, seen as [B, T, D]
            self.bases[value.untyped_storage()._cdata] = (value, like_inputs)
            return
        if not value.numel():
            return
        for dim, (start, length) in enumerate(box(value, base.shape, base.stride())):
            if dim not in axes or length >= base.shape[dim] or axes[dim] in self.apart:
                continue
            seen = self.taken[axes[dim]]
            if is_token and (start, length) not in self.tokens[axes[dim]]:
                self.tokens[axes[dim]].append((start, length))
            if (start, length) not in seen:
                seen.append((start, length))
                tiles = _tiles(seen)
                if self.is_following:
                    continue
                if len(tiles) >= 3 or (len(tiles) == 2 and tiles[0][1] == tiles[1][1]):
                    raise _Enough


def _tiles(seen: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest run of boxes from 0 on in which each starts where the one before ends. A rest that is cut
    again (`x = x[:, n:]`) is no piece: its first part continues the run as well, and further."""
    runs: dict[int, list[tuple[int, int]]] = {0: []}  # the longest one up to an element
    for start, length in seen:
        run = [*runs[start], (start, length)] if start in runs else []
        if len(run) > len(runs.get(start + length, [])):
            runs[start + length] = run
    return max(runs.values(), key=len)


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
    if length is not None:
        for dim in (1, 0, 2):
            leaf = next(
                (i for i, shape in enumerate(shapes) if len(shape) > dim and shape[dim] >= min(length, 2)),
                None,
            )
            if leaf is not None:
                return _with_partners(Axis(leaf, dim, length), {}, shapes)
    grown = [tuple(shape) for shape in shapes]
    first: Exception | None = None
    operations = 0  # of the last attempt
    run = partial(_attempt, fn, flat, positions, spec)
    apart: frozenset[tuple[int, int]] = frozenset()
    short = growth = Growth()
    beside: list[Axis] = []  # cuts of an axis that the input cannot grow along: halves of features
    for attempt in range(7):
        views, failure = run(grown, growth, bool(beside))
        first = failure if attempt == 0 else first
        axes, of_tokens = _axes(views.taken, grown), _axes(views.tokens, grown)
        candidates = [(i, d) for i, shape in enumerate(grown) for d in (1, 0) if len(shape) > d]
        if axes and not of_tokens:
            found = _confirmed(axes, run, grown)
            found = _followed(axes[0], run, grown) if found == [] else found
            if not found and not beside and (axes[0].leaf, axes[0].dim) != candidates[0]:
                beside, axes = axes, []  # there may be one segment only, or a batch of as many
            else:
                axes = found or axes
        elif axes:
            known = {(axis.leaf, axis.dim) for axis in of_tokens}
            axes = [*of_tokens, *(axis for axis in axes if (axis.leaf, axis.dim) not in known)]
        if axes and len(shapes) > 1 and not of_tokens and not _is_walked(axes[0], run, grown):
            apart |= {(axes[0].leaf, axes[0].dim)}
            run = partial(_attempt, fn, flat, positions, spec, apart=apart)
            continue
        if axes:
            others = {(axis.leaf, axis.dim) for axis in beside}
            cut_too = {(a.leaf, a.dim): a for a in axes if (a.leaf, a.dim) not in others}
            return _with_partners(axes[0], cut_too, grown)
        if (cut := growth.cut()) is not None:
            return _with_partners(Axis(*candidates[0], cut), {}, grown)
        walks = attempt > 0 and views.operations > 3 * operations > 0  # more of them for more tokens
        if not candidates or views.operations > _MOST or (walks and failure is None):
            break
        operations = views.operations if failure is None else 0
        grown = _longer(grown, *candidates[0], 4)
        growth = _grown(short, *candidates[0], shapes, grown)
    if beside:
        return _with_partners(beside[0], {(a.leaf, a.dim): a for a in beside}, shapes)
    if first is not None:
        raise refusal(first, held_oddly(fn)) from None
    raise PartitionError(
        "the forward does not cut any of its inputs into segments",
        [f"input {i}: shape {tuple(shape)}" for i, shape in enumerate(shapes)],
        "give segment_size=, or check that the forward walks its input segment by segment",
    )


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
        _, failure = _attempt(fn, flat, positions, spec, shapes, None, True)
    times = Counter(n for n in calls.values() if 1 < n < _LONG and _LONG % n == 0)
    are_segments = _LONG in calls.values()  # what is called for each of them says so
    if failure is not None or are_segments or not times:
        return None
    several = _LONG // max(times, key=lambda n: (times[n], n))
    return Segmentation(tuple(replace(axis, length=axis.length * several) for axis in found.axes))


def _longer(shapes: list[Any], leaf: int, dim: int, factor: int) -> list[Any]:
    """The shapes with one dim, and those of other inputs that are as long, `factor` times as long."""
    size = shapes[leaf][dim]
    return [
        tuple(n * factor if d == dim and n == size else n for d, n in enumerate(shape)) for shape in shapes
    ]


def _grown(short: Growth, leaf: int, dim: int, shapes: list[Any], longer: list[Any]) -> Growth:
    """What follows the values that grow with an axis from some shapes to longer ones."""
    return Growth(short, (shapes[leaf][dim], longer[leaf][dim]))


def _followed(
    axis: Axis, run: Callable[..., tuple[_Views, Exception | None]], shapes: list[Any]
) -> list[Axis]:
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


def _confirmed(
    axes: list[Axis], run: Callable[..., tuple[_Views, Exception | None]], shapes: list[Any]
) -> list[Axis] | None:
    """The cut that two of three lengths of the input agree on; None if the model does not run on others.
    Lengths at which two axes cannot be told apart say nothing."""
    found, failed = [axes], False
    longer = [_longer(shapes, axes[0].leaf, axes[0].dim, factor) for factor in (4, 3, 5, 7)]
    for sizes in [sizes for sizes in longer if not _collides(shapes, sizes, axes[0])][:2]:
        views, failure = run(sizes)
        again = _axes(views.taken, sizes)
        if again and again[0].dim > max(1, axes[0].dim):
            again = []  # that of features, which have not grown, says nothing
        if any(again[:1] == other[:1] for other in found):
            return again
        failed = failed or failure is not None
        found.append(again or axes)
    return None if failed else []


def _is_walked(
    axis: Axis, run: Callable[..., tuple[_Views, Exception | None]], shapes: list[Any]
) -> bool:
    """Whether the forward does more for more pieces of an axis. A memory that is an argument may be taken
    apart by layers before the input is by segments. Asked where that may be so: of another input than the
    first one, and of pieces of one."""
    if axis.leaf == 0 and axis.length > 1:
        return True
    (short, failed), (long, failed_too) = (
        run(_longer(shapes, axis.leaf, axis.dim, factor), None, True) for factor in (1, _PIECES)
    )
    pieces = shapes[axis.leaf][axis.dim] // axis.length * (_PIECES - 1)
    return bool(failed or failed_too) or long.operations - short.operations > _EACH * pieces


def _collides(shapes: list[Any], longer: list[Any], axis: Axis) -> bool:
    """Whether an axis that has grown is as long now as one that has not."""
    pairs = [pair for a, b in zip(shapes, longer, strict=True) for pair in zip(a, b, strict=True)]
    return any(before == after == longer[axis.leaf][axis.dim] for before, after in pairs)


def _attempt(
    fn: Callable[..., Any],
    flat: list[Any],
    positions: list[int],
    spec: pytree.TreeSpec,
    shapes: list[Any],
    growth: Growth | None = None,
    is_following: bool = False,
    apart: frozenset[tuple[int, int]] = frozenset(),
) -> tuple[_Views, Exception | None]:
    """Run the forward on fake inputs of the given shapes until two segments were seen, or, or all of it where
    what grows is followed; gives the views of them, and what it raised."""
    roots = roots_of(fn)
    snapshot = Snapshot(roots)
    contents, around = Contents(snapshot), Surroundings(fn, roots)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values = list(flat)
    fakes = []
    with mode:
        for position, shape in zip(positions, shapes, strict=True):
            old = flat[position]
            values[position] = torch.empty(shape, dtype=old.dtype, device=old.device)
            fakes.append(values[position])
    try:
        views = _Views(fakes, growth or Growth(), is_following, apart)
    except NotImplementedError as error:  # tensors of `vmap` and `grad` have no storage
        raise UnsupportedError(
            "the first call is inside a transform of torch.func",
            [str(error).splitlines()[0]],
            "transform the model itself",
        ) from error
    args, kwargs = pytree.tree_unflatten(values, spec)
    failure, known = None, Known()
    try:
        with (
            torch.no_grad(),
            uncached_autocast(),
            as_written(),
            uncompiled_callables(),
            SharedData(),
            Reads(known),
            mode,
            known,
            views,
            Masks(),
            left_alone(fn, args, kwargs),
        ):
            fn(*args, **kwargs)
    except _Enough:
        pass
    except UnsupportedError:
        raise
    except Exception as error:  # where some cut was seen, capture runs the same code and reports it
        failure = error
    finally:
        snapshot.restore()
        known.restore()
        contents.restore()
        around.restore()
    return views, failure


def _axes(taken: Boxes, shapes: list[Any]) -> list[Axis]:
    axes = []
    for (leaf, dim), seen in taken.items():
        tiles = _tiles(seen)
        if len(tiles) >= 2:
            lengths = [length for _, length in tiles]
            axes.append(Axis(leaf, dim, lengths[1] if len(tiles) > 2 else max(lengths)))
        elif len(tiles) == 1 and tiles[0][1] * 2 > shapes[leaf][dim]:
            continue
    return sorted(axes, key=lambda axis: (axis.leaf, axis.dim))


def _with_partners(
    first: Axis, cut: dict[tuple[int, int], Axis], shapes: Sequence[Sequence[int]]
) -> Segmentation:
    """Add the axes that grow with the first one: those that are cut too, and those of equal size."""
    axes = [first]
    size = shapes[first.leaf][first.dim]
    for leaf, shape in enumerate(shapes):
        for dim, n in enumerate(shape):
            if (leaf, dim) == (first.leaf, first.dim):
                continue
            if (leaf, dim) in cut:
                other = cut[(leaf, dim)]
                if dim >= first.dim or -(-n // other.length) == -(-size // first.length):
                    axes.append(other)  # else a batch that is as large as something that is cut
            elif n == size and dim == first.dim and size > 1:
                axes.append(Axis(leaf, dim, first.length))
    return Segmentation(tuple(axes))
