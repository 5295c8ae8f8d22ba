"""Packed texts in bands: one wavefront of several texts, cut by layers.

    band 0    level 4    layers 1 0  run the cells  (3, 1) of text 0  and  (0, 0) of text 1
    band 1    level 4    layers 3 2  run the cells  (1, 3) (2, 2) of text 0

Each band has a pack of its own, with the parts of all texts on the lanes of its layers, and all packs are on
the same level. What a part sends goes to the part of the same text in another band.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rmtcompile.errors import InternalError
from rmtcompile.runtime.bands.run import BandRun
from rmtcompile.runtime.contexts import plain_tensors
from rmtcompile.runtime.packed import Member, Pack, Snapshot

if TYPE_CHECKING:
    from rmtcompile.runtime.bands.execute import BandedExecutor
    from rmtcompile.runtime.bands.execute import Member as BandMember


class Part(Member, BandRun):
    """What one band runs of a text."""

    def take(self, level: int) -> None:
        """See `Member`: what other bands have sent."""
        self.deliver(level)

    def end(self) -> None:
        """See `Member`: what the forward returns is made of all parts."""
        self.is_done = True


class Text:
    """One text of a pack in bands.

    Attributes:
        name, leaves, snapshots, error, final, outputs: see `Member`.
        executor: what runs it.
        parts: a run for each band.
    """

    snapshots: Sequence[Snapshot] = ()

    def __init__(
        self,
        executor: BandedExecutor,
        name: Any,
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
        parts: Sequence[Part],
    ) -> None:
        self.executor, self.name, self.segments = executor, name, segments
        self.inputs, self.leaves = inputs, leaves
        self.parts = parts
        self.error: Exception | None = None
        self.final: Exception | None = None
        self.outputs: tuple[Any, ...] = ()


class BandedPack:
    """Texts that run in one wavefront, in bands; see `Pack`."""

    def __init__(self, executor: BandedExecutor) -> None:
        self._executor = executor
        self._packs = [Pack(member.band.program) for member in executor.members]
        self.members: list[Text] = []

    def text(
        self,
        executor: BandedExecutor,
        name: Any,
        segments: int,
        inputs: list[torch.Tensor],
        after: Snapshot | None = None,
        snapshots: Sequence[Snapshot] = (),
    ) -> Text:
        """See `Pack`; texts share no beginnings here."""
        if after is not None or snapshots:
            raise InternalError("texts in bands share no beginnings")
        executor.compile_forms(segments, inputs)
        with plain_tensors():
            leaves, named = executor.held(), executor.named(inputs)
            weights = executor.stacks.current(leaves)
            parts = [
                part_of(executor, member, pack, name, segments, named, leaves, weights)
                for member, pack in zip(executor.members, self._packs, strict=True)
            ]
        return Text(executor, name, segments, named, leaves, parts)

    def admit(self, text: Text) -> None:
        """Put a text behind those that have entered."""
        first = self._packs[0]
        first.admit(text.parts[0])
        for part, pack in zip(text.parts[1:], self._packs[1:], strict=True):
            part.start = text.parts[0].start
            pack.members.append(part)
        self.members.append(text)

    @property
    def has_room(self) -> bool:
        """Whether the next level has no segment to enter."""
        return self._packs[0].has_room

    def drain(self) -> None:
        """See `Pack`."""

    def step(self) -> list[Text]:
        """Run one level of all bands; gives the texts that have ended with it, or have failed.

        Raises:
            Exception: cells have failed, which may be those of any text.
        """
        executor = self._executor
        for member, pack in zip(executor.members, self._packs, strict=True):
            with member.current():
                pack.step()
                for text in self.members:
                    executor.send(member, text.parts[member.band.index], text.parts)
        for text in self.members:
            text.error = next((part.error for part in text.parts if part.error is not None), None)
        ended = [one for one in self.members if one.error or all(part.is_done for part in one.parts)]
        for text in ended:
            if text.error is None:
                given = text.parts, text.segments, text.inputs, text.leaves, None
                text.outputs = text.executor.outputs_of(*given)
        if ended and not executor.has_held():
            ended = list(self.members)  # what all of them have read
            for text in ended:
                text.error = text.error or RuntimeError("weights were written while texts were on their way")
        self._drop(ended)
        return ended

    def _drop(self, texts: Sequence[Text]) -> None:
        gone = {id(part) for text in texts for part in text.parts}
        for pack in self._packs:
            pack.members = [part for part in pack.members if id(part) not in gone]
        self.members = [text for text in self.members if text not in texts]


def part_of(
    executor: BandedExecutor,
    member: BandMember,
    pack: Pack,
    name: Any,
    segments: int,
    inputs: Mapping[str, torch.Tensor],
    leaves: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
) -> Part:
    """A band's part of a text, on the lanes of the band's pack."""
    executor.engine_of(member.band).mixes_often = True
    member.copies.begin()
    given = executor.given_to(member, inputs, leaves, weights, False)
    part = Part(name, member.band.program, segments, *given, member.functions, pack.lanes)
    return part.join(member.band, executor.whole)


__all__ = ["BandedPack", "Part", "Text", "part_of"]
