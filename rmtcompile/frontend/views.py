"""Views: which pieces a forward takes of its inputs, in which order.

    x[2, 12, 8]     x[:, 0:4]  x[:, 4:8] ...     boxes of (leaf 0, dim 1): (0, 4), (4, 4)

The forward runs on fake tensors. Each view that it takes of an input is located in the input by offset and
strides, so slicing, splitting, unbinding, reshaping into segments or indexing all look alike. Tensors as long
as an input are followed like the input.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rmtcompile.binding.arguments import left_alone
from rmtcompile.binding.state import Contents, Snapshot, roots_of
from rmtcompile.binding.surroundings import Surroundings
from rmtcompile.errors import UnsupportedError
from rmtcompile.frontend.growing import Growth, box
from rmtcompile.frontend.known import Known, Reads
from rmtcompile.frontend.masks import Masks
from rmtcompile.frontend.tracing import SharedData, as_written, uncompiled_callables
from rmtcompile.ir.modes import uncached_autocast
from rmtcompile.ir.segmentation import Axis

Boxes = dict[tuple[int, int], list[tuple[int, int]]]
"""Start and length of views, in the order in which they were taken, by (leaf, dim)."""


class _Enough(BaseException):
    """Two segments have been seen, or so many operations without them that there are none to see."""


MOST = 50_000
"""Operations of a forward after which no cut is expected any more: two segments of a deep model are fewer."""


class Views(TorchDispatchMode):
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
        if self.operations > MOST:
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


def views_of(
    fn: Callable[..., Any],
    flat: list[Any],
    positions: list[int],
    spec: pytree.TreeSpec,
    shapes: list[Any],
    growth: Growth | None = None,
    is_following: bool = False,
    apart: frozenset[tuple[int, int]] = frozenset(),
) -> tuple[Views, Exception | None]:
    """Run the forward on fake inputs of the given shapes until two segments were seen, or all of it where it
    is followed; gives the views of them, and what it raised.

    Args:
        flat, positions, spec: the arguments, and which of them are tensors.
        growth: what follows values that grow with the inputs.
        apart: axes whose cuts are no segments.
    """
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
        views = Views(fakes, growth or Growth(), is_following, apart)
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


def axes_of(taken: Boxes, shapes: Sequence[Any]) -> list[Axis]:
    """The axes that are cut into pieces, by leaf and dim."""
    axes = []
    for (leaf, dim), seen in taken.items():
        tiles = _tiles(seen)
        if len(tiles) >= 2:
            lengths = [length for _, length in tiles]
            axes.append(Axis(leaf, dim, lengths[1] if len(tiles) > 2 else max(lengths)))
        elif len(tiles) == 1 and tiles[0][1] * 2 > shapes[leaf][dim]:
            continue
    return sorted(axes, key=lambda axis: (axis.leaf, axis.dim))


__all__ = ["MOST", "Boxes", "Views", "axes_of", "views_of"]
