"""Storage of the values that travel between cells (lanes) and out of them (taps)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch._prims_common import make_contiguous_strides_for

from rmtcompile.ir.program import Lane


@dataclass(frozen=True)
class Target:
    """Where a cell function stores one of its outputs itself.

    Attributes:
        lane: name.
        offset: of the feed that this is.
        place: the window's part of the lane, [n, ...].
        port: the cell function's parameter that is this very memory, if it has one.
    """

    lane: str
    offset: tuple[int, int]
    place: torch.Tensor
    port: str | None


def as_slice(indices: Sequence[int]) -> slice | None:
    """The slice that picks `indices`, or None where they are not evenly spaced."""
    if len(indices) == 1:
        return slice(indices[0], indices[0] + 1)
    step = indices[1] - indices[0]
    if step > 0 and all(b - a == step for a, b in pairwise(indices)):
        return slice(indices[0], indices[-1] + 1, step)
    return None


def dense(value: torch.Tensor) -> torch.Tensor:
    """The value, laid out as if it were no part of another one.

    A part of what grows with the number of segments has strides that grow too, and compiled code holds for
    the strides that it was made for.
    """
    if value.is_contiguous():
        is_plain = value.stride() == make_contiguous_strides_for(value.shape)
        return value if is_plain else value.reshape(-1).view(value.shape)
    is_part = value.untyped_storage().nbytes() > value.numel() * value.element_size()
    return value.contiguous() if is_part else value


class LaneStore:
    """One live-in of every cell, by layer: shape [places, ...].

    Writes replace what a layer's place holds; a cell reads what was written last. Without gradients the lane
    is one buffer, or two that change roles after each level, and a window of layers is a view. With gradients
    each place is a tensor of its own, so that autograd sees no write; so it is where values grow.

    Args:
        lane: what it stores.
        functional: whether gradients may be recorded.
        buffers: what is read and what is written, as `lane_buffers` makes them; made here if not given.
    """

    def __init__(
        self, lane: Lane, functional: bool, buffers: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> None:
        self.spec = lane
        self.rank = {layer: i for i, layer in enumerate(lane.places)}
        self.functional = functional = functional or bool(lane.grows)
        if functional:
            zero = torch.zeros(lane.shape, dtype=lane.dtype, device=lane.device)
            self.places = [zero] * len(lane.places)
            return
        self.buffer, self.other = buffers if buffers is not None else lane_buffers(lane)
        self._first = self.buffer

    def copied(self) -> LaneStore:
        """What the lane holds now, in places of its own; with gradients only."""
        assert self.functional
        other = copy.copy(self)
        other.places = list(self.places)
        return other

    def fill(self, layer: int, value: torch.Tensor) -> None:
        """What a layer's place holds before its cell reads it on this level."""
        value = value if self.spec.grows else value.expand(self.spec.shape)
        if self.functional:
            self.places[self.rank[layer]] = value
        else:
            self.buffer[self.rank[layer]].copy_(value)

    def each(self, layers: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Values for these layers one by one, each in its size; of a lane that grows."""
        return tuple(self.places[self.rank[layer]] for layer in layers)

    def read(self, layers: Sequence[int]) -> torch.Tensor:
        """Values for these layers, [n, ...]."""
        ranks = [self.rank[layer] for layer in layers]
        if self.functional:
            return torch.stack([self.places[i] for i in ranks])
        window = as_slice(ranks)
        return self.buffer[window] if window is not None else self.buffer[ranks]

    def target(self, layers: Sequence[int]) -> torch.Tensor | None:
        """Where a cell function may store values [n, ...] for these layers itself; None if they have to be
        written afterwards."""
        if self.functional or self.spec.placement == "copy":
            return None
        window = as_slice([self.rank[layer] for layer in layers])
        return self.other[window] if window is not None else None

    def write(self, layers: Sequence[int], values: Any) -> None:
        """Store values [n, ...] for these layers, or a tuple of one a layer."""
        ranks = [self.rank[layer] for layer in layers]
        if self.functional:
            parts = values if isinstance(values, tuple) else values.unbind(0)
            for i, value in zip(ranks, parts, strict=True):
                self.places[i] = value
            return
        window = as_slice(ranks)
        self.other[window if window is not None else ranks] = values

    def turn(self) -> None:
        """A level has been written: what was stored is what the next level reads."""
        if not self.functional:
            self.buffer, self.other = self.other, self.buffer

    def settle(self) -> None:
        """Move what the next level reads to where a new store of these buffers looks for it."""
        if not self.functional and self.buffer is not self._first:
            self.other.copy_(self.buffer)
            self.turn()


def lane_buffers(lane: Lane) -> tuple[torch.Tensor, torch.Tensor]:
    """What a lane's cells read, and where their results go; one and the same unless there are two buffers."""
    shape = (len(lane.places), *lane.shape)
    first = torch.zeros(shape, dtype=lane.dtype, device=lane.device)
    return first, torch.zeros_like(first) if lane.placement == "double" else first


def is_kept(when: Sequence[object], segment: int, count: int) -> bool:
    """Whether a segment's value is one that a tap keeps; see `Tap.when`."""
    if when[0] == "end":
        return when[1] == count - 1 - segment
    return when[0] != "at" or when[1] == segment


class TapStore:
    """One value a segment, kept until its last reader has run.

    Args:
        keep: how many segments back it is read, or None if all segments are collected.
        first: the first segment of the run; lists over segments begin with it.
        pinned: segments whose values are kept to the end.
    """

    def __init__(self, keep: int | None, first: int = 0, pinned: frozenset[int] = frozenset()) -> None:
        self.keep, self.pinned = keep, pinned
        self.first = first
        self.values: dict[int, torch.Tensor] = {}

    def copied(self) -> TapStore:
        """What it holds now, apart."""
        other = copy.copy(self)
        other.values = dict(self.values)
        return other

    def put(self, segment: int, value: torch.Tensor) -> None:
        """Keep the value of one segment, and drop those that no reader needs any more."""
        self.values[segment] = value
        if self.keep is not None:
            for old in [s for s in self.values if s < segment - self.keep and s not in self.pinned]:
                del self.values[old]

    def __contains__(self, segment: int) -> bool:
        return segment in self.values

    def __getitem__(self, segment: int) -> torch.Tensor:
        return self.values[segment]

    def between(self, first: int, last: int) -> list[torch.Tensor]:
        """Values of segments first .. last, as far as they belong to the run."""
        return [self.values[s] for s in range(max(first, self.first), last + 1)]
