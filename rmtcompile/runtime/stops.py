"""Stops: how a program ends that was extrapolated to where its rules do not hold."""

from __future__ import annotations

import sys
from typing import Any

import torch

from rmtcompile.errors import InternalError, RankError
from rmtcompile.runtime.reach import OutOfReachError


class StoppedError(RankError):
    """A program has stopped on one of several ranks, and all of them say so."""


class BeyondReachError(StoppedError, OutOfReachError):
    """The same, where an integer of the model moves a slice beyond the end of a tensor."""


STOPS = (LookupError, RuntimeError, TypeError, ValueError, InternalError, StoppedError)
"""An index out of bounds, shapes that do not fit, a value that nobody gives."""


def is_no_fault(error: Exception) -> bool:
    """Whether an error says nothing of the program's rules: no memory is left, a backend does not compile."""
    dynamo: Any = sys.modules.get("torch._dynamo.exc")  # its import takes seconds
    is_of_backend = dynamo is not None and isinstance(error, dynamo.TorchDynamoException)
    return is_of_backend or isinstance(error, torch.OutOfMemoryError)


def kind_of(error: Exception) -> type[RankError]:
    """As what all ranks raise an error of one of them."""
    if is_no_fault(error) or not isinstance(error, STOPS):
        return RankError
    return BeyondReachError if isinstance(error, OutOfReachError) else StoppedError


__all__ = ["STOPS", "BeyondReachError", "StoppedError", "is_no_fault", "kind_of"]
