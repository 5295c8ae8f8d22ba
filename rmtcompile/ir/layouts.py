"""Layouts: how tensors lie in memory, told apart as far as `contiguous()` and `reshape()` tell them apart.

    x[2, 12, 6]                                  no layout of its own: contiguous
    x[12, 2, 6].transpose(0, 1)                  the order of its dims in memory
    x[2, 16, 6][:, :12]                          and where there are gaps

What these give is the same memory or a copy, which shows where it is written into.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Layout = tuple[tuple[int, str], ...]
"""From the innermost dim on: the dim, and how it follows the one before: "" next to it, "gap", or "same"
where all its elements are one."""


def layout_of(value: torch.Tensor) -> Layout:
    """Empty for a contiguous tensor."""
    if value.layout is not torch.strided or value.is_contiguous():
        return ()
    found: list[tuple[int, str]] = []
    expected = 1
    for dim in sorted(range(value.dim()), key=lambda d: (value.stride(d), -d)):
        size, stride = value.shape[dim], value.stride(dim)
        if size == 1:
            continue
        found.append((dim, "same" if stride == 0 else "" if stride == expected else "gap"))
        expected = max(expected, stride * size)
    return tuple(found)


def strides_like(value: torch.Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor of another shape in the layout of this one."""
    layout = layout_of(value)
    if not layout:
        return torch.empty(tuple(shape), device="meta").stride()
    listed = [dim for dim, _ in layout]
    follows = dict(layout)
    strides, expected = [0] * len(shape), 1
    for dim in (*listed, *(d for d in reversed(range(len(shape))) if d not in listed)):
        how = follows.get(dim, "")
        if how != "same":
            strides[dim] = expected + (how == "gap")
            expected = strides[dim] * max(shape[dim], 1)
    return tuple(strides)


def in_layout(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The values in the layout of another tensor: a copy, or the tensor itself where it has it."""
    if layout_of(value) == layout_of(like):
        return value
    shape = value.shape
    for dim, how in layout_of(like):
        value = value.narrow(dim, 0, 1) if how == "same" else value
    strides = strides_like(like, value.shape)
    found = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return found.copy_(value).expand(shape)


__all__ = ["Layout", "in_layout", "layout_of", "strides_like"]
