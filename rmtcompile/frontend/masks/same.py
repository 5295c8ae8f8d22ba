"""Same: whether two masks hold the same, by the memory that they lie in or by how they were made.

logits[mask], labels[mask]                              one tensor
logits[mask[:, 1:]], labels[mask[:, 1:]]                views of one memory, written as often
logits[labels != -100], labels[labels != -100]          made alike of the same
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.frontend.masks.selected import Keys, names

_MAKE = names(
    "eq ne lt le gt ge logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_not "
    "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ __xor__ __invert__ isin bool to view reshape "
    "flatten __getitem__ squeeze contiguous isfinite isnan"
)


def memory(tensor: torch.Tensor) -> Any:
    """What is another one as soon as a tensor holds something else; to be used while the tensor is alive."""
    try:
        version = tensor._version
    except RuntimeError:  # made in inference mode
        return object()
    where = tensor.untyped_storage()._cdata, tensor.storage_offset()
    return ("memory", *where, tuple(tensor.shape), tensor.stride(), tensor.dtype, version)


class Made:
    """How masks were made."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, ...]] = {}

    def note(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Remember how a mask was made, if by a function that gives equal values for equal ones."""
        if name not in _MAKE or not isinstance(result, torch.Tensor) or result.dtype != torch.bool:
            return
        values, spec = pytree.tree_flatten((args, kwargs))
        parts = tuple(self._part(value) for value in values)
        self._made[id(result)] = (result, memory(result), (name, str(spec), parts), values)

    def keys(self, mask: torch.Tensor) -> Keys:
        """What is known of a mask as it is now."""
        now = memory(mask)
        made = self._made.get(id(mask))
        return frozenset((now, made[2]) if made is not None and made[1] == now else (now,))

    def _part(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return type(value), repr(value)
        now = memory(value)
        made = self._made.get(id(value))
        return made[2] if made is not None and made[1] == now else now
