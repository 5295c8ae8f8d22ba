"""Give every cell a level, so that all cells of one level can run together.

    before   cells (s, l) and dependence offsets {(0,1), (1,0)}
    after    level(s, l) = alpha * s + l        layer 2 | 2 3 4 5
                                                layer 1 | 1 2 3 4      alpha = 1: the wavefronts are diagonals
                                                layer 0 | 0 1 2 3
                                                          s = 0 1 2 3

Requires: offsets that hold for every cell whose producer lies in the grid (dependence).
Ensures:  each cell runs once and each dependence goes from a lower level to a higher one (`Schedule.verify`).

With alpha = 0 all segments of a layer are one level, block by block (`block_size`).

The level function is affine because the runtime replays one step: a skew is the classic unimodular
transformation of a loop nest (Wolf and Lam, "A Loop Transformation Theory and an Algorithm to Maximize
Parallelism", 1991), and the wavefront of two nested loops is Lamport's hyperplane method (1974).  Where the
longest path is shorter than the affine makespan, `Schedule.is_optimal` says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rmtcompile.schedule import Carry, Offset, Schedule, skew
from rmtcompile.schedule.paths import check_offsets

BLOCK = 32  # segments that run together at least, where there are as many and alpha is 0


def block_size(n_layers: int) -> int:
    """How many segments run together at most with alpha 0, so that a run's memory does not grow with S.

    S segments take ceil(S / block) * n_layers levels; with block >= n_layers these are never more than the
    S + n_layers - 1 levels of alpha 1, which hold as many cells at once.
    """
    return max(n_layers, BLOCK)


def wavefront(
    offsets: Iterable[Offset],
    n_layers: int,
    n_segments: int,
    *,
    alpha: int | None = None,
    block: int = 0,
    carries: Sequence[Carry] = (),
    segment_variants: Sequence[str] = (),
    layer_kinds: Sequence[str] = (),
) -> Schedule:
    """The verified schedule of a grid.

    Args:
        offsets: dependence offsets (ds, dl), consumer minus producer.
        n_layers, n_segments: size of the grid.
        alpha: a skew larger than the smallest legal one (`n_layers` asks for the sequential order).
        block: with alpha 0, how many segments run together at most; 0: all of them.
        carries, segment_variants, layer_kinds: kept in the schedule, see `Schedule`.
    """
    legal = check_offsets(offsets)
    schedule = Schedule(
        n_layers=n_layers,
        n_segments=n_segments,
        alpha=skew(legal, n_layers) if alpha is None else alpha,
        offsets=legal,
        carries=tuple(carries),
        segment_variants=tuple(segment_variants),
        layer_kinds=tuple(layer_kinds),
        block=block,
    )
    schedule.verify()
    return schedule
