"""In place: cells store their results where the next level reads them, instead of having them copied there.

    A' = cell(A); lane[l] = A'         ->   cell writes A' over A                   placement "in_place"
    x' = cell(x); lane[l + 1] = x'     ->   cell writes x' into the other buffer    placement "double"

A lane stays "copy" where neither is legal.

Requires: a routed program. Ensures: same values; only where they are stored differs. Legal are
  in_place  every feed goes to the layer that made the value: of all cells of a level only that cell reads the
            place, and it reads before it writes.
  double    every feed arrives one level later and comes from a cell: what a level reads was written by the
            level before, or is filled in before the level, so two buffers that change roles suffice.
"""

from __future__ import annotations

from dataclasses import replace

from rmtcompile.ir.program import Lane, Program


def in_place(program: Program) -> Program:
    """Choose the placement of each lane; the same object where all are copied, or where all segments of a
    layer run at once and nothing is written over."""
    if not program.alpha:
        return program
    lanes = tuple(_placed(lane, program) for lane in program.lanes)
    if all(new is old for new, old in zip(lanes, program.lanes, strict=True)):
        return program
    return replace(program, lanes=lanes)


def can_overwrite(lane: Lane) -> bool:
    """Whether each place is written only by the cell that reads it."""
    return all(feed.group and feed.offset[1] == 0 for feed in lane.feeds)


def can_alternate(lane: Lane, alpha: int) -> bool:
    """Whether what a level reads was written by the level before."""
    return all(feed.group and alpha * feed.offset[0] + feed.offset[1] == 1 for feed in lane.feeds)


def _placed(lane: Lane, program: Program) -> Lane:
    moved_on = any(
        feed.source == lane.name and not feed.group for other in program.lanes for feed in other.feeds
    )
    if not lane.feeds or moved_on or lane.grows:
        return lane
    if can_overwrite(lane):
        return replace(lane, placement="in_place")
    if can_alternate(lane, program.alpha):
        return replace(lane, placement="double", spare=_unread(lane, program))
    return lane


def _unread(lane: Lane, program: Program) -> tuple[int, ...]:
    """Where results of the feeding groups go that no cell reads: what leaves the top layer, say."""
    layers = {group.name: group.layers for group in program.groups}
    written = {layer + feed.offset[1] for feed in lane.feeds for layer in layers.get(feed.group, feed.layers)}
    return tuple(sorted(written - set(lane.layers)))
