"""Crossing: what a run finds of the run before it, and what it leaves to the run after it.

    run of segments 0 .. 2              run of segments 3 .. 5
    cells (2, l) give A(2, l)  ->  state  ->  lanes hold A(2, l) when cells (3, l) are about to run
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rmtcompile.passes.emit.carried import Carried, CarriedCell, CarriedTap, Refill

Key = tuple[str, int]
"""Name of a carried value, and the segment that made it."""


class Crossing:
    """The values that cross the two borders of a run.

    Args:
        carried: what the program carries.
        first: the first segment that runs.
        border: the segment before which the next run starts; what its cells read is kept.
        values: what earlier segments have left.
        owned: whether values that are kept are memory of their own already (runs with gradients).
        is_whole: whether the inputs of the run, and its lists over segments, begin with segment 0 all the
            same: it is told what those lists hold.
        stamp: of a state that is divided among processes, whose part the values are; equal in all of them.
    """

    def __init__(
        self,
        carried: Carried,
        first: int,
        border: int,
        values: Mapping[Key, torch.Tensor],
        owned: bool,
        is_whole: bool = False,
        stamp: str = "",
    ) -> None:
        self.is_whole = is_whole
        self.stamp = stamp
        self.carried = carried
        self.first = first
        self.border = border
        self.values = values
        self._owned = owned
        self._found: dict[Key, torch.Tensor] = {}
        self._cells: dict[tuple[str, int], list[tuple[str, CarriedCell]]] = {}
        for cell in carried.cells:
            for group, output in cell.outputs:
                self._cells.setdefault((group, cell.layer), []).append((output, cell))
        self._taps = {tap.tap: tap for tap in carried.taps}
        self._oldest = border - max((cell.back for cell in carried.cells), default=0)
        self._refills: dict[int, list[Refill]] = {}
        for refill in carried.refills:
            self._refills.setdefault(refill.layer, []).append(refill)
        self._reach = first + max((refill.reach for refill in carried.refills), default=0)

    def copied(self) -> Crossing:
        """The same, with a memory of its own for what is found."""
        other = copy.copy(self)
        other._found = dict(self._found)
        return other

    def like(self, values: Mapping[Key, torch.Tensor]) -> Crossing:
        """The same borders, with these values in front of them."""
        return Crossing(self.carried, self.first, self.border, values, self._owned, stamp=self.stamp)

    # ---- leaving -------------------------------------------------------------------------------------------

    def keep_cells(
        self, group: str, layers: Sequence[int], segments: Sequence[int], outputs: Mapping[str, torch.Tensor]
    ) -> None:
        """Keep what a group's cells have given for segments after the border.

        Args:
            layers, segments: of the rows of the outputs.
        """
        for row, (layer, segment) in enumerate(zip(layers, segments, strict=True)):
            if not self._oldest <= segment < self.border:
                continue
            for output, cell in self._cells.get((group, layer), ()):
                if self.border - cell.back <= segment < self.border:
                    self._keep((cell.name, segment), outputs[output][row])

    def keep_tap(self, tap: str, segment: int, value: Any) -> None:
        """Keep a value that is read outside the cells, if segments after the border read it."""
        known = self._taps.get(tap)
        if known is not None and segment < self.border and isinstance(value, torch.Tensor):
            if self.border - known.back <= segment or segment in known.at:
                self._keep((known.name, segment), value)

    def _keep(self, key: Key, value: torch.Tensor) -> None:
        self._found[key] = value if self._owned else value.clone()

    @property
    def found(self) -> Mapping[Key, torch.Tensor]:
        """What was kept on the way."""
        return self._found

    def take(self, values: Mapping[Key, torch.Tensor]) -> None:
        """Keep what another run of the same borders has kept."""
        self._found.update(values)

    def left(self) -> dict[Key, torch.Tensor]:
        """What segments after the border read of those before it."""
        wanted: set[Key] = set()
        for one in self.carried.kept:
            wanted |= {(one.name, s) for s in range(self.border - one.back, self.border)}
            if isinstance(one, CarriedTap):
                wanted |= {(one.name, s) for s in one.at if s < self.border}
        known = {**self.values, **self._found}
        return {key: known[key] for key in sorted(wanted) if key in known}

    # ---- going on ------------------------------------------------------------------------------------------

    def taps(self) -> list[tuple[str, int, torch.Tensor]]:
        """(tap, segment, value) of what earlier segments have left outside the cells."""
        found = []
        for tap in self.carried.taps:
            found += [(tap.tap, s, value) for (name, s), value in self.values.items() if name == tap.name]
        return found

    def refills(self, segment: int, layer: int) -> list[tuple[str, torch.Tensor]]:
        """(lane, value) of what a cell reads that was made before the run."""
        found: list[tuple[str, torch.Tensor]] = []
        if segment >= self._reach:
            return found
        for refill in self._refills.get(layer, ()):
            if segment - self.first < refill.reach:
                value = self.values.get((refill.name, segment - refill.back))
                if value is not None:
                    found.append((refill.lane, value))
        return found

    def rows(self) -> list[tuple[str, str, int, int, torch.Tensor]]:
        """(group, output, layer, segment, value) of what earlier cells have left."""
        found = []
        for cell in self.carried.cells:
            mine = [(s, value) for (name, s), value in self.values.items() if name == cell.name]
            for group, output in cell.outputs:
                found += [(group, output, cell.layer, s, value) for s, value in mine]
        return found
