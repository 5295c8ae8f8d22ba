"""Patience: what takes long is not done in silence."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 2.0
"""Seconds after which something is said."""


@contextmanager
def said_after(say: Callable[[str], object], text: str, seconds: float | None = None) -> Iterator[None]:
    """Say a line, from another thread, if the work within takes longer, than `PATIENCE` by default."""
    timer = threading.Timer(PATIENCE if seconds is None else seconds, say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


__all__ = ["PATIENCE", "said_after"]
