"""The engines of all bands, as one."""

from __future__ import annotations

from collections.abc import Sequence

from rmtcompile.runtime.engine import Engine
from rmtcompile.runtime.forms import Form


class BandEngines:
    """One engine a band; each compiles the cells for its own device and widths."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = tuple(engines)
        self.is_sequential = False

    def __getitem__(self, index: int) -> Engine:
        return self.engines[index]

    @property
    def is_compiled(self) -> bool:
        """See `Engine`."""
        return any(engine.is_compiled for engine in self.engines)

    @property
    def forms(self) -> list[Form]:
        """See `Engine`."""
        return [form for engine in self.engines for form in engine.forms]

    def share(self, other: BandEngines) -> None:
        """See `Engine`."""
        for mine, theirs in zip(self.engines, other.engines, strict=True):
            mine.share(theirs)

    def share_buffers(self, other: BandEngines) -> None:
        """See `Engine`."""
        for mine, theirs in zip(self.engines, other.engines, strict=True):
            mine.share_buffers(theirs)


__all__ = ["BandEngines"]
