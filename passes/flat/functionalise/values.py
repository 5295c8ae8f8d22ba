"""Fake values and how they lie in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_arg

from rmtcompile.ir.fakes import computed


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape have one layout (strides of size-1 dimensions say nothing)."""
    return a.numel() == 0 or all(
        size == 1 or sa == sb for size, sa, sb in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def dense_order(value: torch.Tensor) -> list[int] | None:
    """The dimensions from outermost to innermost if the tensor fills its memory without gap, or None."""
    order = sorted(range(value.dim()), key=lambda d: (value.stride(d), value.size(d)), reverse=True)
    expected = 1
    for d in reversed(order):
        if value.size(d) != 1 and value.stride(d) != expected:
            return None
        expected *= value.size(d)
    return order


class Values:
    """The fake value of each node, all under one mode (captures give constants a mode of their own)."""

    def __init__(self, graph: fx.Graph) -> None:
        modes = [v.fake_mode for n in graph.nodes if isinstance(v := n.meta.get("val"), FakeTensor)]
        calls = [
            v.fake_mode
            for n in graph.nodes
            if n.op in ("placeholder", "call_function") and isinstance(v := n.meta.get("val"), FakeTensor)
        ]
        self.mode = (calls or modes or [FakeTensorMode()])[0]

    def local(self, value: Any) -> Any:
        """The value under our mode."""
        if not isinstance(value, torch.Tensor) or (
            isinstance(value, FakeTensor) and value.fake_mode is self.mode
        ):
            return value
        with self.mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    def run(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What a call on nodes gives, as a fake value."""
        get = lambda n: self.local(n.meta["val"])  # noqa: E731
        return computed(self.mode, target, map_arg(args, get), map_arg(kwargs, get))


def storage_of(value: Any) -> int | None:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    return value.untyped_storage()._cdata


def geometry(value: torch.Tensor) -> tuple[Any, ...]:
    return (tuple(value.shape), value.stride(), value.storage_offset(), value.dtype)


def _addresses(value: torch.Tensor) -> set[int]:
    """The places in its storage that a tensor covers, in elements."""
    grid = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(value.shape, value.stride(), strict=True):
        grid = grid.unsqueeze(-1) + torch.arange(size) * stride
    return {int(place) + int(value.storage_offset()) for place in grid.flatten().tolist()}


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    def interval(t: torch.Tensor) -> tuple[int, int]:
        span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
        start = int(t.storage_offset())
        return start * t.itemsize, (start + span) * t.itemsize

    (a0, a1), (b0, b1) = interval(a), interval(b)
    if a.numel() == 0 or b.numel() == 0 or a1 <= b0 or b1 <= a0:
        return False
    return (
        a.dtype != b.dtype
        or max(a.numel(), b.numel()) > 1 << 22
        or not _addresses(a).isdisjoint(_addresses(b))
    )
