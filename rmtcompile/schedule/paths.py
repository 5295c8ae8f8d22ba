"""Offsets and longest paths on the segment x layer grid.

Cells are `(segment, layer)`; a dependence offset `(ds, dl)` is consumer minus producer, so cell `(s, l)`
waits for `(s - ds, l - dl)` wherever that cell exists.  Plain integer work that knows no other class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rmtcompile.errors import DependenceError

Cell = tuple[int, int]
Offset = tuple[int, int]


def check_offsets(offsets: Iterable[Offset]) -> frozenset[Offset]:
    """The offsets as a set, or a refusal when some cell would have to wait for itself.

    Legal offsets point forward: to a later segment, or to a higher layer of the same segment.  They then
    follow the order in which the program itself runs (segments, then layers), so no cycle can exist.
    """
    found = frozenset((int(ds), int(dl)) for ds, dl in offsets)
    backward = sorted(o for o in found if o[0] < 0 or (o[0] == 0 and o[1] <= 0))
    if backward:
        raise DependenceError(
            "a cell depends on a cell that runs after it, so no order of cells is legal",
            evidence=[_backward_line(o, found) for o in backward],
            remedy="each layer may read earlier segments and lower layers of its own segment; a value read "
            "from elsewhere is usually state shared between layers: check where the named layer writes it",
        )
    return found


def _backward_line(offset: Offset, found: frozenset[Offset]) -> str:
    ds, dl = offset
    head = f"offset ({ds},{dl})"
    if offset == (0, 0):
        return f"{head}: cell (s, l) depends on itself"
    if ds < 0:
        return f"{head}: cell (s, l) reads cell (s+{-ds}, {_shifted('l', -dl)}), a later segment"
    line = f"{head}: layer {-dl} of a segment feeds layer 0 of the same segment"
    opposite = next((o for o in sorted(found) if o[0] == 0 and o[1] > 0), None)
    if opposite is not None:
        line += f", while offset (0,{opposite[1]}) feeds layer 0 to layer {opposite[1]}: a cycle"
    return line


def _shifted(name: str, by: int) -> str:
    return name if by == 0 else f"{name}{by:+d}"


def producers(cell: Cell, offsets: Iterable[Offset], n_layers: int, n_segments: int) -> Iterator[Cell]:
    """The cells of the grid that `cell` waits for, one for each offset that stays inside."""
    for ds, dl in offsets:
        segment, layer = cell[0] - ds, cell[1] - dl
        if 0 <= segment < n_segments and 0 <= layer < n_layers:
            yield segment, layer


def consumers(cell: Cell, offsets: Iterable[Offset], n_layers: int, n_segments: int) -> Iterator[Cell]:
    """The cells of the grid that wait for `cell`."""
    return producers(cell, ((-ds, -dl) for ds, dl in offsets), n_layers, n_segments)


def longest_path_levels(offsets: Iterable[Offset], n_layers: int, n_segments: int) -> dict[Cell, int]:
    """The earliest level of each cell: the number of dependences on the longest path that ends in it.

    One pass in program order, which is a topological order of every legal set of offsets.
    """
    legal = sorted(check_offsets(offsets))
    level: dict[Cell, int] = {}
    for s in range(n_segments):
        reach = [(ds, dl) for ds, dl in legal if ds <= s]
        for layer in range(n_layers):
            best = 0
            for ds, dl in reach:
                before = level.get((s - ds, layer - dl), -1) + 1
                if before > best:
                    best = before
            level[s, layer] = best
    return level
