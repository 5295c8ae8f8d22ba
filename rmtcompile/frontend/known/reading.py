"""Reading: functions that read the memory of tensors without an operation get what is known."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from rmtcompile.frontend.known.following import Known
from rmtcompile.frontend.known.records import outside, tensors

_ARRAYS = {torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__}
_READS = {
    torch.Tensor.item,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__complex__,
    torch.Tensor.__index__,
    torch.Tensor.is_nonzero,
    torch.is_nonzero,
    torch.Tensor.tolist,
    torch.Tensor.__repr__,
    torch.Tensor.__format__,
    torch.Tensor.__reduce_ex__,
    torch.Tensor.equal,
    torch.Tensor.allclose,
    torch.equal,
    torch.allclose,
}
_FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, torch.Tensor.new_tensor}


class Reads(TorchFunctionMode):
    """Gives `known` values to functions that read memory without an operation that tracing could see, or that
    tracing refuses. NumPy gets copies that it cannot write: a write would be lost."""

    def __init__(self, known: Known) -> None:
        super().__init__()
        self._known = known

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ARRAYS or func in _READS:
            return self._read(func, args, kwargs)
        if func in _FROM_NUMBERS:
            args, kwargs = pytree.tree_map(
                lambda value: self._listed(func, value), (args, kwargs), is_leaf=_is_list
            )
        return func(*args, **kwargs)

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        values = {id(tensor): self._valued(tensor) for tensor in tensors((args, kwargs))}
        if any(value is None for value in values.values()):
            if func in _ARRAYS or self._known.is_stale(args, kwargs):
                raise self._known.unreadable(func, sys._getframe(2))
            return func(*args, **kwargs)

        def known(value: Any) -> Any:
            return values[id(value)] if isinstance(value, torch.Tensor) else value

        args, kwargs = pytree.tree_map(known, (args, kwargs))
        with outside():
            result = func(*args, **kwargs)
        if func in _ARRAYS and hasattr(result, "flags"):
            result.flags.writeable = False
        return result

    def _valued(self, tensor: torch.Tensor) -> torch.Tensor | None:
        value = self._known.value(tensor)
        if value is None:
            return None
        with outside():
            return value.clone().requires_grad_(tensor.requires_grad)

    def _listed(self, func: Any, value: Any) -> Any:
        """Lists of numbers with the tensors among them read; what is no list stays."""
        if not _is_list(value) or not tensors(value):
            return value

        def read(one: Any) -> Any:
            found = self._known.value(one) if isinstance(one, torch.Tensor) else one
            if found is None and one is not None:
                raise self._known.unreadable(func, sys._getframe(2))
            return found

        return pytree.tree_map(read, value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)
