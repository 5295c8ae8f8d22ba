"""Growing: the axis of the input, followed into values that do not have its size.

    12 positions: view [2, 4, 3, 8]    48 positions: view [2, 16, 3, 8]    dim 1 grows: 3 positions an index

A layer that walks the segments itself cuts values that it has computed of the whole input, often after a
reshape into chunks.  Which of their dimensions the input's axis is shows where the same operation gives more
with a longer input; sizes that only happen to be equal do not.
"""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from typing import Any

import torch

_MOST = 20_000
"""Operations that are looked at: cuts are in the first layer."""


class Growth:
    """Watches a forward for pieces that are taken along dimensions which grow with the input.

    Args:
        short: what has watched the forward with a shorter input.
        lengths: of the shorter input and of this one.

    Attributes:
        shapes: the operations in order, each with the shapes of its results.
        taken: start and length of each piece, in positions of the input, in the order in which they are
            taken; by value that is cut and dimension of it.
    """

    def __init__(self, short: Growth | None = None, lengths: tuple[int, int] = (0, 0)) -> None:
        self.short, self.lengths = short, lengths
        self.follows = short is not None
        self.shapes: list[tuple[Any, tuple[torch.Size, ...]]] = []
        self.padded: set[int] = set()  # how long padded values are
        self.bases: dict[int, tuple[torch.Tensor, dict[int, Fraction]]] = {}
        self.taken: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)

    def saw(self, func: Any, values: list[torch.Tensor]) -> None:
        """Note an operation and its results."""
        number = len(self.shapes)
        if number >= _MOST:
            return
        self.shapes.append((func, tuple(value.shape for value in values)))
        if self.short is None:
            return
        known = self.short.shapes[number] if number < len(self.short.shapes) else (None, ())
        same = known[0] is func and [len(shape) for shape in known[1]] == [x.dim() for x in values]
        same = self.follows = same and self.follows  # the shorter input has fewer pieces
        for i, value in enumerate(values):
            shorter = known[1][i] if same else value.shape
            if "pad" in getattr(func, "__name__", ""):
                self.padded |= {size for size, was in zip(value.shape, shorter, strict=True) if size > was}
            self._note(value, shorter)

    def _note(self, value: torch.Tensor, shorter: torch.Size) -> None:
        storage = value.untyped_storage()._cdata
        grown = self._grown(value, shorter)
        base, axes = self.bases.get(storage, (value, {}))
        if grown and (not axes or max(grown.values()) > max(axes.values())):  # coarser: closer to chunks
            if value.numel() == base.numel() > 0 and 0 not in value.stride():
                self.bases[storage] = value, grown
            return
        if grown or not axes or not value.numel() or value.numel() == base.numel():
            return
        for dim, (start, length) in enumerate(box(value, base.shape, base.stride())):
            piece = (start * axes[dim], length * axes[dim]) if dim in axes else (Fraction(1, 2), 0)
            if length < base.shape[dim] and all(Fraction(n).denominator == 1 for n in piece):
                seen = self.taken[storage, dim]
                if (whole := (int(piece[0]), int(piece[1]))) not in seen:
                    seen.append(whole)

    def _grown(self, value: torch.Tensor, shorter: torch.Size) -> dict[int, Fraction]:
        """The dimensions that are longer than they were, as the input is, with the positions of the input
        that one index of them stands for."""
        found, (before, now) = {}, self.lengths
        for dim, (size, was) in enumerate(zip(value.shape, shorter, strict=True)):
            if size == was:
                continue
            if size * before == was * now:
                found[dim] = Fraction(now, size)
            elif size in self.padded:
                found[dim] = Fraction(1)
            elif chunk := [n for n in value.shape if size * n in self.padded]:
                found[dim] = Fraction(chunk[0])
        return found

    def cut(self) -> int | None:
        """The length of the first two or more pieces of one value that follow each other and are equally
        long."""
        for seen in self.taken.values():
            lengths = [length for start, length in seen if start == 0]
            if any((length, length) in seen and 2 * length < self.lengths[1] for length in lengths):
                return next(length for length in lengths if (length, length) in seen)
        return None


def box(value: torch.Tensor, shape: torch.Size, strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Start and length of a view along each dimension of the tensor it views."""
    order = sorted(range(len(shape)), key=lambda d: -strides[d])
    offset, starts = int(value.storage_offset()), [0] * len(shape)
    for dim in order:
        if shape[dim] > 1 and strides[dim]:
            starts[dim], offset = divmod(offset, strides[dim])
    extents = [0] * len(shape)
    for size, stride in zip(value.shape, value.stride(), strict=True):
        if size == 1 or not stride:
            continue
        for dim in order:
            if shape[dim] > 1 and strides[dim] and stride >= strides[dim]:
                extents[dim] += (size - 1) * stride // strides[dim]
                break
    return [
        (start, min(extent + 1, shape[d]))
        for d, (start, extent) in enumerate(zip(starts, extents, strict=True))
    ]
