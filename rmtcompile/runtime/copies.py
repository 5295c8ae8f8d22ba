"""Copies of many tensors at once, and memory to copy to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch.utils import _pytree as pytree

from rmtcompile.runtime.storage import dense


def is_tensor(value: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor)


def paired(places: Any, values: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors of two values of one structure."""
    pairs = zip(pytree.tree_leaves(places), pytree.tree_leaves(values), strict=True)
    yield from (pair for pair in pairs if is_tensor(pair[0]))


def room_for(value: torch.Tensor) -> torch.Tensor:
    """Memory for a value of this kind, with its strides; it holds this one, which is as good as any."""
    value = dense(value)
    return core(value).clone().expand(value.shape)


def filled_from(tensors: Iterator[torch.Tensor], values: Any) -> Any:
    """The values with other tensors in place of theirs."""
    if is_tensor(values):
        return next(tensors)
    return pytree.tree_map_only(torch.Tensor, lambda _: next(tensors), values)


def copies_of(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of the values; one allocation for those of one kind, one launch for all of a dtype."""
    alike: dict[Any, list[int]] = {}
    for i, x in enumerate(values):
        alike.setdefault((x.shape, x.stride(), x.dtype), []).append(i)
    copies: dict[int, torch.Tensor] = {}
    for (shape, _, dtype), indices in alike.items():
        first = values[indices[0]]
        if first.is_contiguous():
            room = torch.empty((len(indices), *shape), dtype=dtype, device=first.device)
            copies.update(zip(indices, room.unbind(0), strict=True))
        else:
            copies.update((i, torch.empty_like(first)) for i in indices)
    found = [copies[i] for i in range(len(values))]
    copy_all(found, values)
    return found


def copy_all(places: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy values to places; one launch for all of a dtype."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, place in enumerate(places):
        if place.numel():
            by_dtype.setdefault(place.dtype, []).append(i)
    for indices in by_dtype.values():
        targets = [core(places[i]) for i in indices]
        torch._foreach_copy_(targets, [core(values[i], places[i]) for i in indices])


def core(value: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """A value without the repetitions of an expanded one, or of another one of the same shape."""
    like = value if like is None else like
    for dim, stride in enumerate(like.stride()):
        if stride == 0 and value.shape[dim] > 1:
            value = value.narrow(dim, 0, 1)
    return value
