"""rmtcompile: run recurrent-memory transformers a diagonal at a time, without touching the model.

    fast = rmtcompile.optimize(model)
    out = fast(input_ids)
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

_beside = Path(__file__).parent.parent
if not (Path(__file__).parent / "passes").exists() and (_beside / "passes" / "__init__.py").exists():
    __path__.append(
        str(_beside)
    )  # a checkout that is not installed: `rmtcompile.passes` is the folder beside this one

if TYPE_CHECKING:
    from rmtcompile.api import explain, install, load, optimize, uninstall
    from rmtcompile.documents import FailedDocument, Stream
    from rmtcompile.errors import (
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
    from rmtcompile.optimized import Optimized
    from rmtcompile.report import Explanation, Profile
    from rmtcompile.runtime.state import RunState
    from rmtcompile.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "CaptureError", "DependenceError", "Explanation", "FailedDocument", "FallbackWarning", "IgnoredWarning",
    "InternalError", "LiftError", "Optimized", "PartitionError", "Profile", "RMTCompileError", "RankError",
    "RecaptureWarning", "RecordingWarning", "RerollError", "RunState", "Schedule",
    "SequentialScheduleWarning", "StateError", "Stream", "UnsupportedError", "VerificationError", "explain",
    "install", "load", "optimize", "uninstall",
]  # fmt: skip

# Importing torch takes seconds, and help needs none of it: each name is imported when it is first asked for.
_HOMES = {
    "api": ("explain", "install", "load", "optimize", "uninstall"),
    "documents": ("FailedDocument", "Stream"),
    "optimized": ("Optimized",),
    "report": ("Explanation", "Profile"),
    "runtime.state": ("RunState",),
    "schedule": ("Schedule",),
}
"""Where public names are, but for those of `errors`."""

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

_ROOMS = (
    "api", "bench", "binding", "cli", "commandline", "compiler", "data", "dispatch", "documents", "errors",
    "frontend", "inspected", "installed", "ir", "models", "module", "optimized", "options", "passes",
    "patience", "report", "runtime", "saved", "schedule", "viewer",
)  # fmt: skip
"""Modules that `import rmtcompile` is enough for, as attributes."""

_WITHOUT_TORCH = ("bench", "cli", "commandline", "data", "errors", "patience")

if not TYPE_CHECKING:  # or else every name would be one that there is

    def __getattr__(name: str) -> object:
        """A public name or a module, imported when it is first asked for."""
        if name in _ROOMS:
            for home in () if name in _WITHOUT_TORCH else _HOMES:  # what is below a room is there, too
                import_module(f"{__name__}.{home}")
            return import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_HOME_OF.get(name, 'errors')}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
