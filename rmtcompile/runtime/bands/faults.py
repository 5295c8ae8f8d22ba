"""Faults: what goes wrong on one of several ranks, and how all of them say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rmtcompile.errors import RankError
from rmtcompile.runtime.stops import kind_of

Said = tuple[str, type[RankError]]
"""What has gone wrong, in words, and as what all ranks raise it."""


@dataclass(frozen=True)
class Fault:
    """What has gone wrong on this rank.

    Attributes:
        where: rank and level.
    """

    where: str
    error: Exception


def said(fault: Fault | None) -> Said | None:
    """What other ranks are told."""
    if fault is None:
        return None
    error = fault.error
    return f"{fault.where}: {type(error).__name__}: {error}", kind_of(error)


def raise_any(everyone: Sequence[Said | None], mine: Fault | None) -> None:
    """Raise on all ranks what has gone wrong on any of them, if something has.

    Args:
        everyone: what each rank has `said`.
    """
    if found := [one for one in everyone if one is not None]:
        kinds = {kind for _, kind in found}
        kind = next(iter(kinds)) if len(kinds) == 1 else RankError
        raise kind("\n".join(text for text, _ in found)) from (mine.error if mine is not None else None)


__all__ = ["Fault", "Said", "raise_any", "said"]
