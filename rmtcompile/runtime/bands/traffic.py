"""Traffic: what a band sends on a level, known before anything runs.

A band's messages follow from its grid and from the classes of its segments, so that who receives them knows
how many there are, and levels that do the same can share a recording.
"""

from __future__ import annotations

from collections.abc import Iterator

from rmtcompile.ir.bands import Band, Cut, Sent
from rmtcompile.ir.program import Program
from rmtcompile.runtime.storage import is_kept
from rmtcompile.schedule import Grid


def sent_on(band: Band, grid: Grid, level: int) -> Iterator[tuple[Sent, int]]:
    """What a band sends on a level, and the segment that makes it.

    Args:
        grid: of the band's part of the run.
    """
    taps = {tap.name: tap for tap in band.program.taps}
    for sent in band.sends:
        if sent.layer >= 0:
            made = [segment for segment, _ in grid.alive(level, [sent.layer])]
        else:
            at = grid.entering(level) if taps[sent.name].value.kind == "prologue" else grid.leaving(level)
            made = [] if at is None else [at]
        for segment in made:
            if _is_made(band.program, sent, segment, grid.n_segments):
                yield sent, segment


def _is_made(program: Program, sent: Sent, segment: int, count: int) -> bool:
    """Whether a segment's cell, prologue or epilogue is of a class that makes the value."""
    groups = {group.name: group for group in program.groups}
    if not sent.is_tap:
        number = program.rolled.classes[("cell", sent.layer)].of(segment, count)
        return not sent.group or number in groups[sent.group].classes
    tap = next(tap for tap in program.taps if tap.name == sent.name)
    number = program.rolled.classes[(tap.value.kind, sent.layer)].of(segment, count)
    if tap.value.kind != "cell":
        return number in dict(tap.value.nodes)
    makers = [groups[name] for name, _ in tap.group_outputs if name in groups]
    return is_kept(tap.when, segment, count) and any(number in group.classes for group in makers)


def received_on(cut: Cut, index: int, grids: tuple[Grid, ...], level: int) -> list[tuple[Sent, int, int]]:
    """(what, segment, level) of all that a band finds when it begins a level: what others have sent on the
    level before; on its first level, all that they have sent so far."""
    start = level - 1
    if level == grids[index].levels.start:
        start = min(grid.levels.start for grid in grids)
    return [one for t in range(start, level) for one in arriving_on(cut, index, grids, t)]


def arriving_on(cut: Cut, index: int, grids: tuple[Grid, ...], level: int) -> list[tuple[Sent, int, int]]:
    """(what, segment, level) of all that others send a band on a level."""
    return [
        (sent, segment, level)
        for band, grid in zip(cut.bands, grids, strict=True)
        if band.index != index and level in grid.levels
        for sent, segment in sent_on(band, grid, level)
        if sent.target == index
    ]


__all__ = ["arriving_on", "received_on", "sent_on"]
