"""Segmentation: along which axes of its inputs a forward is cut into segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.layouts import in_layout

Cuts = Mapping[str, tuple[int, int]]
"""By placeholder: the dimension along which segments lie, and the length of one."""


@dataclass(frozen=True)
class Axis:
    """One axis of one input that grows with the number of segments.

    Attributes:
        leaf: index among the tensor leaves of (args, kwargs).
        dim: the dimension.
        length: elements of one segment along it.
    """

    leaf: int
    dim: int
    length: int


@dataclass(frozen=True)
class Segmentation:
    """The axes along which inputs are cut; the first one counts the segments.

    Attributes:
        period: how many segments of the model are one here, where its rules repeat after so many.
        parts: into how many steps of the grid each segment is cut, where the model walks it in so many.
    """

    axes: tuple[Axis, ...]
    period: int = 1
    parts: int = 1

    def times(self, period: int) -> Segmentation:
        """The same with `period` segments taken as one."""
        axes = tuple(replace(axis, length=axis.length * period) for axis in self.axes)
        return Segmentation(axes, self.period * period)

    def cut(self, parts: int) -> Segmentation:
        """The same, each segment in `parts` steps."""
        return replace(self, parts=parts)

    @property
    def is_own(self) -> bool:
        """Whether these segments are the model's: neither several of them as one, nor parts."""
        return self.period == self.parts == 1

    @property
    def steps(self) -> Segmentation:
        """The steps of the grid: what a program counts."""
        axes = tuple(replace(axis, length=axis.length // self.parts) for axis in self.axes)
        return Segmentation(axes, self.period)

    def pieces(self, length: int) -> int:
        """How many segments of the model, or steps of these, are begun in `length` elements of the first
        axis."""
        return -(-length // (self.axes[0].length // self.period // self.parts))

    def count(self, shapes: list[torch.Size]) -> tuple[int, int]:
        """(segments, elements in an incomplete one) for inputs of these shapes."""
        axis = self.axes[0]
        whole, rest = divmod(shapes[axis.leaf][axis.dim], axis.length)
        return whole + (rest > 0), rest

    def shapes(self, shapes: list[torch.Size], segments: int) -> list[torch.Size]:
        """Shapes of inputs with another number of segments, the incomplete one kept.

        Raises:
            UnsupportedError: an input has fewer of them: its axis is another one than at the first call.
        """
        count, _ = self.count(shapes)
        resized = [list(shape) for shape in shapes]
        for axis in self.axes:
            resized[axis.leaf][axis.dim] += (segments - count) * axis.length
            if resized[axis.leaf][axis.dim] < 0:
                raise self._uneven(shapes)
        return [torch.Size(shape) for shape in resized]

    def _uneven(self, shapes: list[torch.Size]) -> UnsupportedError:
        return UnsupportedError(
            "the segments of one input are not as many as those of another",
            [f"input {a.leaf}: {a.length} along dim {a.dim} of {list(shapes[a.leaf])}" for a in self.axes],
            "give segment_size=, or let the first call have inputs whose sizes all differ",
        )

    def resized(self, tensors: Sequence[torch.Tensor], segments: int) -> list[torch.Tensor]:
        """Inputs with another number of segments: the given ones repeated or cut, or themselves."""
        return _repeated(tensors, self.shapes([x.shape for x in tensors], segments))

    def with_rest(self, tensors: Sequence[torch.Tensor], segments: int, rest: int) -> list[torch.Tensor]:
        """Inputs of so many segments, the last of `rest` elements along each axis: the given ones repeated or
        cut."""
        shapes = [list(x.shape) for x in tensors]
        for axis in self.axes:
            shapes[axis.leaf][axis.dim] = (segments - 1) * axis.length + rest
        return _repeated(tensors, shapes)


def _repeated(tensors: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Tensors of these shapes, the given ones repeated or cut, or themselves; in their layouts."""
    found = []
    for given, shape in zip(tensors, shapes, strict=True):
        x = given
        for dim, size in enumerate(shape):
            if size != x.shape[dim]:
                x = x.index_select(dim, torch.arange(size, device=x.device) % x.shape[dim])
        found.append(x if x is given else in_layout(x, given))
    return found
