"""Asking: what functions of torch make of integers that are watched (`counting.py`).

    table[position : position + n]     a function of torch: it gets numbers, and the graph has them
    torch.zeros(position, 4).shape     the size moves with the integer, and Python sees sizes: it was asked
    torch.Size([position])[0]          a number again: asked
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from rmtcompile.frontend.counting import Counting, Counts, Place

Change = Callable[[Counting], int]


@contextmanager
def watching(counts: Counts, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Watch the integers of these modules that forwards go on from, for a while."""
    with counts.put(modules) as are_any, Asking() if are_any else nullcontext():
        yield


class Asking(TorchFunctionMode):
    """Gives functions of torch the numbers of watched integers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = args, kwargs or {}
        watched = list(_watched(given))
        if not watched:
            return func(*args, **given[1])
        plain_args, plain_kwargs = _changed(given, lambda x: x.number)
        result = func(*plain_args, **plain_kwargs)
        if not _is_tensors(result):
            for one in watched:
                one.break_up()
            return result
        shapes = _shapes(result)
        for place in {place for one in watched for place in one.parts}:
            if shapes and not _stays(func, given, place, shapes):
                for one in watched:
                    one.break_up({place} & one.parts.keys())
        return result


def _watched(value: Any) -> Iterator[Counting]:
    if type(value) is Counting:
        yield value
    elif isinstance(value, slice):
        yield from _watched((value.start, value.stop, value.step))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _watched(item)
    elif isinstance(value, dict):
        yield from _watched(list(value.values()))


def _changed(value: Any, change: Change) -> Any:
    """The same with numbers in the place of watched integers."""
    if type(value) is Counting:
        return change(value)
    if isinstance(value, slice):
        return slice(*(_changed(x, change) for x in (value.start, value.stop, value.step)))
    if type(value) in (list, tuple, torch.Size):
        return type(value)(_changed(x, change) for x in value)
    if type(value) is dict:
        return {key: _changed(x, change) for key, x in value.items()}
    return value


def _stays(func: Any, given: Any, place: Place, shapes: list[torch.Size]) -> bool:
    """Whether the sizes of the result stay where the integer of a place is another one."""
    for step in (1, -1):

        def change(one: Counting, step: int = step) -> int:
            return one.number + step * one.parts.get(place, 0)

        with _disable_current_modes(), torch._C.DisableTorchFunction():
            args, kwargs = pytree.tree_map_only(torch.Tensor, _meta, _changed(given, change))
            if kwargs.get("device") is not None:
                kwargs["device"] = "meta"
            try:
                return _shapes(func(*args, **kwargs)) == shapes
            except Exception:  # an index behind the end, say: the other way, then
                continue
    return False


def _meta(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _is_tensors(result: Any) -> bool:
    return all(x is None or isinstance(x, torch.Tensor) for x in pytree.tree_leaves(result))


def _shapes(result: Any) -> list[torch.Size]:
    return [x.shape for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


__all__ = ["watching"]
