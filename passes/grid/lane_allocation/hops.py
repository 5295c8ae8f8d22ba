"""Hops: how a value gets from one cell to another in time, on levels alpha * s + l."""

from __future__ import annotations

from rmtcompile.errors import DependenceError


def hops(offset: tuple[int, int], alpha: int) -> list[tuple[int, int]]:
    """The fewest steps that a value takes on its way, each arriving before its place is written again.

    (2,0) at alpha 1 -> (1,0) (1,0)      (2,-1) at alpha 1 -> (2,-1)     (1,3) at alpha 2 -> (0,2) (0,1) (1,0)

    Steps up go first, one segment at a time follows, and the last step goes down. A step (a, b) takes
    alpha*a + b levels, 1 to alpha; segments never run backward and layers stay between the two ends. With
    alpha = 0 nothing is written over, and one step does.

    Raises:
        DependenceError: the reader runs no later than the writer.
    """
    ds, dl = offset
    levels = alpha * ds + dl
    if levels < 1 or ds < 0:
        raise DependenceError(f"a value with offset {offset} cannot reach its reader on levels {alpha}*s + l")
    if levels <= max(alpha, 1) or not alpha:
        return [offset]
    if dl < 0:
        waits = (levels - 1) // alpha
        return [(1, 0)] * waits + [(ds - waits, dl)]
    up = [(0, alpha)] * (dl // alpha) + [(0, dl % alpha)] * (dl % alpha > 0)
    return up + [(1, 0)] * ds
