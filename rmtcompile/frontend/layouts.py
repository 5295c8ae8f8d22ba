"""Layouts: whether a forward does something else for inputs that lie in memory in another way.

    z.contiguous().mul_(2)      writes into z where that is contiguous, and into a copy where it is not
    h = z.reshape(-1, D)        reads what is written into z afterwards, or does not
    z.zero_()
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rmtcompile.frontend.blame import user_source

_OR_COPIES = {"contiguous", "reshape", "reshape_as", "flatten", "ravel"}
"""Give the memory of a tensor, or a copy where it lies in another way."""


class Layouts(TorchFunctionMode):
    """Notes what may share memory by its layout alone."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[tuple[torch.Tensor, int, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _OR_COPIES and args and isinstance(result, torch.Tensor):
            place = user_source(sys._getframe(1))
            self._noted += [(x, x._version, place) for x in (args[0], result) if isinstance(x, torch.Tensor)]
        return result

    def shown(self) -> str:
        """The first place, as "file:line", of which one side was written afterwards; empty if there is
        none."""
        return next((place for x, version, place in self._noted if x._version != version), "")
