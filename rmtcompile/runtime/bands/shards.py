"""Shards: which values of a run state stay with the rank whose layers read them, and how all ranks get all.

    rank 0    what cells of layers 0 .. 7 leave, what is read outside of cells
    rank 1    what cells of layers 8 .. 15 leave, what is read outside of cells

With gradients all ranks have the whole state: gradients of what is the same on all of them are added up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from rmtcompile.ir.bands import Cut
from rmtcompile.passes.emit.carried import Carried
from rmtcompile.runtime.bands.copies import Way
from rmtcompile.runtime.bands.mail import Mail, kinds_of
from rmtcompile.runtime.crossing import Key
from rmtcompile.runtime.state import Part


class Shards:
    """How the states of a program are divided among ranks.

    Args:
        way: from the model's device to this rank's.
    """

    def __init__(self, carried: Carried, cut: Cut, mail: Mail, way: Way) -> None:
        self._mail, self._way = mail, way
        readers: dict[str, set[int]] = defaultdict(set)
        for refill in carried.refills:
            readers[refill.name].add(refill.layer)
        outside = {tap.name for tap in carried.taps}
        self._keepers = {
            cell.name: band.index
            for cell in carried.cells
            for band in cut.bands
            if cell.layer in band.layers and readers[cell.name] <= set(band.layers)
            if cell.name not in outside
        }

    def stays(self, key: Key) -> bool:
        """Whether a value is read by the layers of the rank alone that makes it."""
        return key[0] in self._keepers

    def own(self, values: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
        """Those that do not stay with another rank."""
        mine = self._mail.rank
        return {key: value for key, value in values.items() if self._keepers.get(key[0], mine) == mine}

    def part(self) -> Part | None:
        """Which part of the state this rank has that the call leaves which all of them run now; None where
        each has all of it."""
        mail = self._mail
        if mail.count == 1 or not self._keepers:
            return None
        return Part(str(mail.words.calls), mail.rank, mail.count, self._whole)

    def _whole(self, part: Part, values: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
        told = {"stamp": part.stamp, "kinds": kinds_of(values)}
        everyone = self._mail.gathered("gather a run state", told)
        if len({one["stamp"] for one in everyone}) > 1:
            lines = [f"rank {rank}: that of call {one['stamp']}" for rank, one in enumerate(everyone)]
            self._mail.words.differ("they gather parts of other states", lines)
        found: dict[Key, torch.Tensor] = {}
        for rank, one in enumerate(everyone):
            kinds = {key: kind for key, kind in one["kinds"].items() if key not in found}
            mine = {key: self._way.to(values[key]) for key in kinds} if rank == self._mail.rank else {}
            found |= self._mail.spread(rank, mine, kinds)
        back: dict[Key, torch.Tensor] = self._way.back(found)
        return dict(sorted(back.items()))


__all__ = ["Shards"]
