"""Skew: the level function that a set of offsets allows, and which offsets leave one cell a level."""

from __future__ import annotations

from collections.abc import Iterable

from rmtcompile.schedule.paths import Offset, check_offsets


def skew(offsets: Iterable[Offset], n_layers: int) -> int:
    """The smallest alpha >= 0 for which level(s, l) = alpha * s + l respects every offset.

    ARMT's {(0,1), (1,0)} gives 1, a carry read one layer below its writer, (1,-1), gives 2, and classic
    RMT's (1, 1 - n_layers) gives n_layers, which is the sequential order.  Raises `DependenceError` for a
    dependence that points backward in the program's own order.
    """
    return max((_skew_of(o) for o in _inside(offsets, n_layers)), default=0)


def _skew_of(offset: Offset) -> int:
    ds, dl = offset
    return 0 if ds == 0 else max(0, -((dl - 1) // ds))


def _inside(offsets: Iterable[Offset], n_layers: int) -> list[Offset]:
    """The offsets that join two layers of the grid at all."""
    return sorted(o for o in check_offsets(offsets) if abs(o[1]) < n_layers)


def blocking(offsets: Iterable[Offset], n_layers: int) -> tuple[Offset, ...]:
    """The offsets that keep every level one cell wide; none if levels can be wider, or there is one layer."""
    if n_layers == 1 or skew(offsets, n_layers) < n_layers:
        return ()
    return tuple(o for o in _inside(offsets, n_layers) if _skew_of(o) >= n_layers)


def blocking_reason(offsets: Iterable[Offset], n_layers: int) -> str:
    """Why no two cells can run together, as one sentence; empty if they can."""
    blocked = blocking(offsets, n_layers)
    if not blocked:
        return ""
    ds, dl = blocked[0]
    return (
        f"offset ({ds},{dl}): the top layer {-dl} of a segment feeds layer 0 of the next one, so segment "
        f"s + 1 cannot start before segment s has passed all {n_layers} layers (memory is written at the top "
        "of the stack and read at its bottom, as in classic RMT), and cells run one after the other"
    )
