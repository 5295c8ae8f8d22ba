"""How many bytes of tensors a call holds at its peak, counted storage by storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while the mode is on, until they are freed.

    What existed before (weights, inputs) and views of it do not count; buffers inside a kernel are not seen.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, *existing: torch.Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = {
            value.untyped_storage()._cdata
            for value in pytree.tree_leaves((args, kwargs))
            if isinstance(value, torch.Tensor)
        }
        for value in pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage(), read)
        return result

    def _count(self, storage: torch.UntypedStorage, read: set[int]) -> None:
        if storage._cdata in self._known or storage._cdata in read:
            return
        size = storage.nbytes()
        self._known.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(f: Callable[..., Any], *args: Any) -> int:
    """Bytes that `f(*args)` holds at its peak beyond what exists before, its result included."""
    with torch.no_grad(), LiveBytes() as live:
        result = f(*args)
    del result
    return live.peak
