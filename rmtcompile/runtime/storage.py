"""Storage of the values that travel between cells (lanes) and out of them (taps)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from rmtcompile.program import Lane


def as_slice(indices: Sequence[int]) -> slice | None:
    """The slice that picks `indices`, or None where they are not evenly spaced."""
    if len(indices) == 1:
        return slice(indices[0], indices[0] + 1)
    step = indices[1] - indices[0]
    if step > 0 and all(b - a == step for a, b in pairwise(indices)):
        return slice(indices[0], indices[-1] + 1, step)
    return None


class LaneStore:
    """One live-in of every cell, by layer: shape [layers, ...].

    Writes replace what a layer's place holds; a cell reads what was written last. Without gradients the lane
    is one buffer and a window of layers is a view of it. With gradients each place is a tensor of its own, so
    that autograd sees no write.
    """

    def __init__(self, lane: Lane, functional: bool, buffer: torch.Tensor | None = None) -> None:
        self.spec = lane
        self.rank = {layer: i for i, layer in enumerate(lane.layers)}
        self.functional = functional
        if functional:
            zero = torch.zeros(lane.shape, dtype=lane.dtype, device=lane.device)
            self.places = [zero] * len(lane.layers)
        else:
            shape = (len(lane.layers), *lane.shape)
            self.buffer = (
                buffer if buffer is not None else torch.zeros(shape, dtype=lane.dtype, device=lane.device)
            )

    def fill(self, layer: int, value: torch.Tensor) -> None:
        """What a layer's place holds before the first cell writes it."""
        value = value.expand(self.spec.shape)
        if self.functional:
            self.places[self.rank[layer]] = value
        else:
            self.buffer[self.rank[layer]].copy_(value)

    def read(self, layers: Sequence[int]) -> torch.Tensor:
        """Values for these layers, [n, ...]."""
        ranks = [self.rank[layer] for layer in layers]
        if self.functional:
            return torch.stack([self.places[i] for i in ranks])
        window = as_slice(ranks)
        return self.buffer[window] if window is not None else self.buffer[ranks]

    def write(self, layers: Sequence[int], values: torch.Tensor) -> None:
        """Store values [n, ...] for these layers."""
        ranks = [self.rank[layer] for layer in layers]
        if self.functional:
            for i, value in zip(ranks, values.unbind(0), strict=True):
                self.places[i] = value
            return
        window = as_slice(ranks)
        self.buffer[window if window is not None else ranks] = values


class TapStore:
    """One value a segment, kept until its last reader has run."""

    def __init__(self, keep: int | None) -> None:
        self.keep = keep
        self.values: dict[int, torch.Tensor] = {}

    def put(self, segment: int, value: torch.Tensor) -> None:
        """Keep the value of one segment, and drop those that no reader needs any more."""
        self.values[segment] = value
        if self.keep is not None:
            for old in [s for s in self.values if s < segment - self.keep]:
                del self.values[old]

    def __contains__(self, segment: int) -> bool:
        return segment in self.values

    def __getitem__(self, segment: int) -> torch.Tensor:
        return self.values[segment]

    def between(self, first: int, last: int) -> list[torch.Tensor]:
        """Values of segments first .. last."""
        return [self.values[s] for s in range(first, last + 1)]
