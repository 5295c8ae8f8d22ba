"""Sharing: parameters that share memory with others, as far as that can be seen.

    flat[0:64].view(8, 8), flat[64:128].view(8, 8)    views of one buffer: they stay there
    a.weight is b.weight                              one parameter in two layers: it stays
    kept = model.state_dict()                         others hold the memory, too: they are told
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Iterator, Sequence

import torch

_LOGGER = logging.getLogger("rmtcompile")

_ALONE = 2
"""References to a storage that one tensor has, and whoever counts them."""


def shared(tensors: Sequence[torch.Tensor], own: Collection[int] = ()) -> str:
    """Why tensors must not be moved, in words; empty if they may be.

    Args:
        own: where the storages of stacks begin, which hold more than one parameter each.
    """
    filled = [tensor for tensor in tensors if tensor.numel()]
    if len({tensor.data_ptr() for tensor in filled}) < len(filled):
        return "are one in several layers"
    for tensor in filled:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in own:
            continue
        if storage.nbytes() > tensor.numel() * tensor.element_size():
            return "are parts of a larger tensor"
        if tensor.device.type == "cpu" and tensor.is_shared():
            return "are shared with other processes"
    return ""


class Sharing:
    """What the stacks of one program meet, told once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def stays(self, tensors: Sequence[torch.Tensor], own: Collection[int], names: Sequence[str]) -> bool:
        """Whether tensors must not be moved; see `shared`."""
        reason = shared(tensors, own)
        if reason and reason not in self._told:
            self._told.add(reason)
            text = "weights (%s, ...) %s: they stay where they are, and are copied at each call"
            _LOGGER.warning(text, ", ".join(names[:2]), reason)
        return bool(reason)

    def tell_others(self, tensors: Sequence[torch.Tensor], name: str) -> None:
        """Log that tensors which the user holds lose the memory that they share with parameters, if there
        are any. What backward keeps of a forward does not count.

        Args:
            name: of one of the parameters.
        """
        counts = (torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) for tensor in tensors)
        if "others" in self._told or all(count <= _ALONE for count in counts):
            return
        self._told.add("others")  # to look for them takes as long as there are objects in the process
        if others := sum(1 for _ in _others(tensors)):
            _LOGGER.warning(
                "the weights of all layers are put into one tensor: other tensors (%d of %s) that shared "
                "their memory, from a state_dict() or a detach() before, keep the values of now; take them "
                "again",
                others,
                name,
            )


def _others(tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Tensors of Python that lie in the same memory."""
    mine = {id(tensor) for tensor in tensors}
    memories = {_memory(tensor) for tensor in tensors} - {None}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and id(found) not in mine:
            if _memory(found) in memories:
                yield found


def _memory(tensor: torch.Tensor) -> int | None:
    """Its storage; None for what has none: sparse tensors, those of transforms."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None
