"""Packed texts between processes: one wavefront of several texts, of which each rank runs its own layers.

    rank 0    level 4    layers 1 0  run the cells  (3, 1) of text 0  and  (0, 0) of text 1
    rank 1    level 4    layers 3 2  run the cells  (1, 3) (2, 2) of text 0

All ranks read the same texts, in the same order, and run the same levels. Before a text enters they agree on
it; when its last segment has left the last layer, all of them get its result. What is sent on a level is
received before it is over, so that nothing is on its way between two levels. A text that fails on one rank
goes on as zeros until its last level, where all ranks hear of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rmtcompile.errors import InternalError, RankError
from rmtcompile.ir.bands import Sent
from rmtcompile.runtime.bands.faults import Fault
from rmtcompile.runtime.bands.levels import Made, Traffic
from rmtcompile.runtime.bands.links import Value
from rmtcompile.runtime.bands.packed import Part, Text, part_of
from rmtcompile.runtime.bands.rank_results import shared
from rmtcompile.runtime.bands.run import Message
from rmtcompile.runtime.contexts import plain_tensors
from rmtcompile.runtime.packed import Pack, Snapshot, version, written_over

if TYPE_CHECKING:
    from rmtcompile.runtime.bands.ranks import RankExecutor


class RankText(Text):
    """One text of a pack, and this rank's part of it.

    Attributes:
        start: the level of the pack that is level 0 of the text.
        traffic: what this rank receives and sends.
        stopped: what has gone wrong with it on this rank; there may be no part then.
    """

    executor: RankExecutor
    start = 0

    def __init__(
        self,
        executor: RankExecutor,
        name: Any,
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
        part: Part | Fault,
    ) -> None:
        parts = [part] if isinstance(part, Part) else []
        super().__init__(executor, name, segments, inputs, leaves, parts)
        self.stopped = part if isinstance(part, Fault) else None
        self.traffic: Traffic = executor.traffic_of(segments, 0)
        self._versions = self._written()

    @property
    def part(self) -> Part | None:
        """This rank's part, if it has begun."""
        return self.parts[0] if self.parts else None

    def _written(self) -> tuple[int, int]:
        return version(self.inputs.values()), version(self.leaves.values())

    def were_written(self) -> tuple[bool, bool]:
        """Whether arguments, and what is read of the model, were written here since the text entered."""
        inputs, leaves = self._written()
        return inputs != self._versions[0], leaves != self._versions[1]

    def made(self, level: int) -> Made:
        """What a level has made for other ranks; what has gone wrong on it is noted."""
        part = self.part
        if part is None or self.stopped is not None:
            return {}
        if part.error is not None:
            self.stopped = Fault(f"rank {self.executor.rank}, level {level}", part.error)
        made = {(m.sent, m.segment): m.value for m in part.outgoing}
        part.outgoing.clear()
        return made if self.stopped is None else {}


class RankPack:
    """Texts that run in one wavefront, in bands of several processes; see `Pack`."""

    def __init__(self, executor: RankExecutor) -> None:
        self._executor = executor
        self._member = executor.members[executor.rank]
        self._pack = Pack(self._member.band.program)
        self._is_off = False  # cells have failed here
        self.members: list[RankText] = []

    def text(
        self,
        executor: RankExecutor,
        name: Any,
        segments: int,
        inputs: list[torch.Tensor],
        after: Snapshot | None = None,
        snapshots: Sequence[Snapshot] = (),
    ) -> RankText:
        """See `Pack`; texts share no beginnings here.

        Raises:
            UnsupportedError: ranks are about to run different things.
            RankError: a rank has failed, or does not answer any more.
        """
        if after is not None or snapshots:
            raise InternalError("texts in bands share no beginnings")
        with executor.mail.words.call(), plain_tensors():
            executor.compile_forms(segments, inputs)
            held = executor.held()
            executor.agreement.reached(segments, inputs, held, None, [], can_replay=False)
            named = executor.named(inputs)
            part = self._begun(executor, name, segments, named, held)
            return RankText(executor, name, segments, named, held, part)

    def _begun(
        self,
        executor: RankExecutor,
        name: Any,
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
    ) -> Part | Fault:
        member = executor.members[executor.rank]
        try:
            given = inputs, leaves, executor.stacks.current(leaves)
            return part_of(executor, member, self._pack, name, segments, *given)
        except Exception as error:
            return Fault(f"rank {executor.rank}, before its first level", error)

    def admit(self, text: RankText) -> None:
        """Put a text behind those that have entered."""
        text.start = self._pack.place(range(text.segments))
        if text.part is not None:
            text.part.start = text.start
            self._pack.members.append(text.part)
        self.members.append(text)

    @property
    def has_room(self) -> bool:
        """Whether the next level has no segment to enter."""
        return self._pack.has_room

    def drain(self) -> None:
        """No text enters any more; to be called before the levels that are left.

        Raises:
            UnsupportedError: other ranks are about to do something else.
        """
        self._executor.mail.gathered("run the texts that are on their way to their end", None)

    def step(self) -> list[RankText]:
        """Run one level; gives the texts that have ended with it, or have failed.

        Raises:
            RankError: a rank does not answer any more.
            RuntimeError: cells have failed on some rank, which may be those of any text, or weights were
                written while texts were on their way.
        """
        pack, level = self._pack, self._pack.level
        with self._member.current():
            try:
                if not self._is_off:
                    pack.step()
            except Exception:  # the texts on their way run again by themselves, which says what it is
                self._is_off = True
            pack.level = level + 1
            self._exchange(level)
            ended = [text for text in self.members if text.start + text.traffic.last == level]
            for text in ended:
                self._end(text)
        self.members = [text for text in self.members if text not in ended]
        return ended

    def _exchange(self, level: int) -> None:
        """Send what the level has made, and receive what it has made on other ranks."""
        mail = self._executor.mail
        self._receive(level, lambda text, sent: sent in text.traffic.from_before)
        for text in self.members:
            own = level - text.start
            made = text.made(own)
            for sent, segment in text.traffic.sent(own):
                mail.send(sent, None if self._is_off else made.get((sent, segment)), own)
        self._receive(level, lambda text, sent: sent not in text.traffic.from_before)
        mail.wait(level)

    def _receive(self, level: int, is_wanted: Callable[[RankText, Sent], bool]) -> None:
        for text in self.members:
            for sent, segment, own in text.traffic.arriving(level - text.start):
                if is_wanted(text, sent):
                    value = self._executor.mail.receive(sent, own)
                    if text.part is not None and text.stopped is None:
                        text.part.arrive(Message(sent, own, segment, Value(value)))

    def _end(self, text: RankText) -> None:
        """Give every rank the result of a text, or what has gone wrong with it."""
        ranks, part = text.executor, text.part
        self._executor.mail.wait(self._pack.level, all_of_them=True)
        everyone = ranks.mail.gathered("end a text of a queue", text.were_written())
        if writers := [f"rank {rank} has written it" for rank, (inputs, _) in enumerate(everyone) if inputs]:
            text.final = written_over(writers)
            return
        is_off = self._is_off or any(leaves for _, leaves in everyone) or not self._member.copies.hold()
        try:
            is_whole = shared(ranks, part, {}, set(), text.stopped, is_off)
        except RankError as error:
            text.error = error
            return
        if not is_whole:
            raise RuntimeError("cells have failed, or weights were written while texts were on their way")
        assert part is not None
        given = [part] * ranks.count, text.segments, text.inputs, text.leaves, None
        text.outputs = ranks.outputs_of(*given)


__all__ = ["RankPack", "RankText"]
