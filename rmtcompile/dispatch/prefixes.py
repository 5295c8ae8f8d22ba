"""Prefixes: which documents of a list begin with the same segments.

a b c d        read as a whole; what is left before segment 2 is kept
a b x          goes on from there: 2 of its 3 segments are not read again
a b x y        goes on from before segment 2, or 3 if that was kept
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.ir.segmentation import Segmentation


def chain(segmentation: Segmentation, args: Any, kwargs: Any) -> list[bytes]:
    """For each whole segment of a call, what tells it with all before it, and with all else that is given."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    positions = [i for i, value in enumerate(flat) if isinstance(value, torch.Tensor)]
    cut = {positions[axis.leaf]: axis for axis in segmentation.axes}
    digest = hashlib.sha256(repr(spec).encode())
    for i, value in enumerate(flat):
        if isinstance(value, torch.Tensor):
            shape = [size for dim, size in enumerate(value.shape) if i not in cut or dim != cut[i].dim]
            digest.update(f"{shape} {value.dtype} {value.device}".encode())
            digest.update(_bytes(value) if i not in cut else b"")
        else:
            digest.update(f"{type(value).__qualname__} {value!r}".encode())
    on_host = {i: flat[i].detach().cpu() for i in cut}
    found = []
    for s in range(min(flat[i].shape[axis.dim] // axis.length for i, axis in cut.items())):
        for i, axis in cut.items():
            digest.update(_bytes(on_host[i].narrow(axis.dim, s * axis.length, axis.length)))
        found.append(digest.digest())
    return found


def _bytes(value: torch.Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Prefixes:
    """What documents that are still to come begin with.

    Args:
        chains: of each document, in order; empty for those that share nothing.
    """

    def __init__(self, chains: Sequence[Sequence[bytes]]) -> None:
        self.chains = chains
        self._coming: Counter[bytes] = Counter(one for known in chains for one in known)

    def passed(self, index: int) -> None:
        """A document is not to come any more."""
        self._coming.subtract(self.chains[index])

    def is_wanted(self, prefix: bytes) -> bool:
        """Whether a document that is still to come begins so."""
        return self._coming[prefix] > 0

    def borders(self, index: int, longest: int) -> list[int]:
        """The segments before which others that are still to come leave the path of a document.

        Args:
            longest: the last border that can be kept.
        """
        known = self.chains[index]
        coming = [self._coming[one] for one in known] + [0]
        leaving = [i + 1 for i in range(len(known)) if coming[i] > coming[i + 1]]
        return sorted({min(border, longest) for border in leaving if min(border, longest) > 0})


__all__ = ["Prefixes", "chain"]
