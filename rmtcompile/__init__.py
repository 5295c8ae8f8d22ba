"""rmtcompile: run recurrent-memory transformers a diagonal at a time, without touching the model.

    fast = rmtcompile.optimize(model)
    out = fast(input_ids)
"""

from __future__ import annotations

from pathlib import Path

_beside = Path(__file__).parent.parent
if not (Path(__file__).parent / "passes").exists() and (_beside / "passes" / "__init__.py").exists():
    __path__.append(
        str(_beside)
    )  # a checkout that is not installed: `rmtcompile.passes` is the folder beside this one

from rmtcompile.api import explain, install, load, optimize, uninstall  # noqa: E402
from rmtcompile.documents import FailedDocument, Stream  # noqa: E402
from rmtcompile.errors import (  # noqa: E402
    CaptureError,
    DependenceError,
    FallbackWarning,
    IgnoredWarning,
    InternalError,
    LiftError,
    PartitionError,
    RankError,
    RecaptureWarning,
    RecordingWarning,
    RerollError,
    RMTCompileError,
    SequentialScheduleWarning,
    StateError,
    UnsupportedError,
    VerificationError,
)
from rmtcompile.optimized import Optimized  # noqa: E402
from rmtcompile.report import Explanation, Profile  # noqa: E402
from rmtcompile.runtime.state import RunState  # noqa: E402
from rmtcompile.schedule import Schedule  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "CaptureError", "DependenceError", "Explanation", "FailedDocument", "FallbackWarning", "IgnoredWarning",
    "InternalError", "LiftError", "Optimized", "PartitionError", "Profile", "RMTCompileError", "RankError",
    "RecaptureWarning", "RecordingWarning", "RerollError", "RunState", "Schedule",
    "SequentialScheduleWarning", "StateError", "Stream", "UnsupportedError", "VerificationError", "explain",
    "install", "load", "optimize", "uninstall",
]  # fmt: skip
