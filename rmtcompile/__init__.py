"""rmtcompile: run recurrent-memory transformers a diagonal at a time, without touching the model."""

from __future__ import annotations

from pathlib import Path

_beside = Path(__file__).parent.parent
if not (Path(__file__).parent / "passes").exists() and (_beside / "passes" / "__init__.py").exists():
    __path__.append(str(_beside))  # a checkout that is not installed: `rmtcompile.passes` is the folder beside this one
