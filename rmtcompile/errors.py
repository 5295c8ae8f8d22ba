"""Errors: what the compiler refuses, and what is a bug of its own; and warnings.

Two families under one base.  `UnsupportedError` means that the program is outside what the compiler handles;
its message says what, where, the evidence, and what would help.  `InternalError` means that the compiler
broke one of its own rules.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any


class RMTCompileError(Exception):
    """Base of every error that rmtcompile raises on purpose."""


class UnsupportedError(RMTCompileError):
    """The program is outside what rmtcompile handles.

    Args:
        what: one sentence naming what is not handled.
        evidence: lines that show it (FX nodes, module paths, the user's file:line).
        remedy: what the user can do about it.

    Attributes:
        parts: in how many equal parts the forward seems to walk each segment; 0 where it does not.
    """

    parts = 0

    def __init__(self, what: str, evidence: Sequence[str] = (), remedy: str = "") -> None:
        self.what = what
        self.evidence = tuple(dict.fromkeys(evidence))  # several operations may stand in one line
        self.remedy = remedy
        lines = [what, *(f"  {line}" for line in self.evidence)]
        if remedy:
            lines.append(f"  help: {remedy}")
        super().__init__("\n".join(lines))


class CaptureError(UnsupportedError):
    """The forward could not be captured as a graph."""


class PartitionError(UnsupportedError):
    """No layer x segment grid was found in the graph."""


class CircleError(PartitionError):
    """Regions wait for each other; with more segments it may show better where operations lie."""


class DependenceError(UnsupportedError):
    """The dependences between cells are not a function of (segment, layer) offsets."""


class RerollError(UnsupportedError):
    """The unrolled segments do not follow one rule, so other lengths cannot be predicted.

    Attributes:
        period: after how many segments what they do seems to repeat; 0 where it does not.
        nodes: of a capture, for each segment; 0 where none was made.
    """

    period = 0
    nodes = 0


class UnseenError(RerollError):
    """Captures are too short to show all that longer inputs need.

    Attributes:
        rolled: the rules as far as they show.
    """

    rolled: Any = None


class BoundedError(RerollError):
    """The model does not run on as many segments as it takes to find a rule."""


class LiftError(UnsupportedError):
    """An operation cannot be computed for several cells at once."""


class StateError(UnsupportedError):
    """A run state does not belong to this model, plan, dtype or batch size, or cannot be split or joined."""


class VerificationError(RMTCompileError):
    """`verify=True` found a difference from the sequential forward."""


class RankError(RMTCompileError):
    """A process of several that run a program together has failed, or does not answer any more."""


class InternalError(RMTCompileError):
    """A pass broke one of the compiler's own rules: a bug in rmtcompile, please report it."""


class SequentialScheduleWarning(UserWarning):
    """No two cells of the model can run together; it runs one cell after the other."""


class FallbackWarning(UserWarning):
    """The model, or an input too short for its rules, could not be compiled and runs as it is."""


class IgnoredWarning(UserWarning):
    """Something that is switched on has no effect in the program."""


class RecordingWarning(UserWarning):
    """Runs are not recorded as CUDA graphs, since something in them cannot be."""


class RecaptureWarning(UserWarning):
    """The model has been captured anew several times, since what its forward reads changes from call to
    call."""


_BETWEEN = ("rmtcompile.", "torch.nn.modules.", "torch.nn.parallel.")


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line of the user's code that called into rmtcompile, however deep that lies."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
