"""What the user may choose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What the user may choose; see `rmtcompile.optimize`."""

    layers: str | None = None
    segment_size: int | None = None
    plan: str = "auto"
    passes_off: frozenset[str] = frozenset()
    min_segments_captured: int = 2
    max_segments_captured: int = 6
