"""The levels of one rank, launched one by one, or replayed.

    level t     receive what others have made before it, run its cells, give what others read of them

Either way the same values go the same ways, in the same order. A replayed level knows the shapes of all that
it receives, so that receives can be posted ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from rmtcompile.ir.bands import Cut, Sent
from rmtcompile.runtime.bands.links import Value
from rmtcompile.runtime.bands.mail import Mail
from rmtcompile.runtime.bands.posted import Posts
from rmtcompile.runtime.bands.recorded import RecordedBand
from rmtcompile.runtime.bands.run import BandRun, Message
from rmtcompile.runtime.bands.traffic import arriving_on, received_on, sent_on
from rmtcompile.runtime.bands.trail import Trail
from rmtcompile.runtime.blocks import Block
from rmtcompile.schedule import Grid

Made = dict[tuple[Sent, int], Any]
"""What a level has made for other bands, by (what, segment)."""


class Traffic:
    """What one rank receives and sends in runs of so many segments, known before they begin.

    Attributes:
        grid: of the rank's part of the run.
        received: (what, segment, level) of all that has to be there when a level begins.
        arriving: (what, segment, level) of all that others send on a level, as far as it is still read.
        sent: (what, segment) of all that others are sent after a level, as far as they still read it.
        last: the level on which the last rank ends.
        from_before: what earlier ranks send, if they also receive something from later ones.
    """

    def __init__(self, cut: Cut, rank: int, grids: tuple[Grid, ...]) -> None:
        band, self.grid = cut.bands[rank], grids[rank]
        sources = {sent: one.index for one in cut.bands for sent in one.sends}
        self.from_before = {sent for sent, source in sources.items() if cut.goes_down and source < rank}
        self.last = max(grid.levels[-1] for grid in grids)
        self.received = cache(lambda level: received_on(cut, rank, grids, level))
        self.arriving = cache(
            lambda level: arriving_on(cut, rank, grids, level) if level < self.grid.levels[-1] else []
        )
        self.sent = cache(
            lambda level: [
                (sent, segment)
                for sent, segment in sent_on(band, self.grid, level)
                if level < grids[sent.target].levels[-1]
            ]
        )


class Levels(Protocol):
    """How one rank's levels run."""

    def receive(self, level: int) -> list[Message]:
        """What the level reads of other ranks'; called once a level, in order, whatever goes wrong."""

    def run(self, level: int, messages: Sequence[Message]) -> Made | None:
        """Run the level, and give what it has made; None: the run has to be launched instead."""

    def before_sends(self, level: int) -> None:
        """Called between a level and the sends after it, whatever has gone wrong."""

    def send(self, sent: Sent, value: Any, level: int) -> None:
        """Start to send a value; None where there is none, since something has failed."""


class Launched:
    """Levels of a run that are launched.

    Where two ranks send each other something on one level, the earlier rank sends first and the later one
    receives first, and so the gradients go back: NCCL keeps an order between two ranks, and a large message
    waits to be received.

    Args:
        run: None where it could not begin: then nothing is run.
        trail: of a run with gradients.
    """

    def __init__(
        self, run: BandRun | None, step: Any, traffic: Traffic, mail: Mail, trail: Trail | None
    ) -> None:
        self._run, self._step, self._traffic = run, step, traffic
        self._mail, self._trail = mail, trail
        self._early: list[Message] | None = None

    def receive(self, level: int) -> list[Message]:
        """See `Levels`."""
        wanted, early = self._traffic.received(level), self._early
        if early is None:  # the first level
            return self._received(wanted)
        return early + self._received([one for one in wanted if one[0] not in self._traffic.from_before])

    def _received(self, wanted: Iterable[tuple[Sent, int, int]]) -> list[Message]:
        return [Message(sent, at, s, Value(self._value(sent, at))) for sent, s, at in wanted]

    def _value(self, sent: Sent, level: int) -> Any:
        value, trail = self._mail.receive(sent, level), self._trail
        if trail is None:
            return value
        source = self._mail.source(sent)
        return pytree.tree_map_only(torch.Tensor, lambda x: trail.received(x, source, level), value)

    def before_sends(self, level: int) -> None:
        """See `Levels`: receive what earlier ranks have made on this level."""
        after = level + 1
        wanted = self._traffic.received(after) if after in self._traffic.grid.levels else []
        self._early = self._received([one for one in wanted if one[0] in self._traffic.from_before])

    def run(self, level: int, messages: Sequence[Message]) -> Made | None:
        """See `Levels`."""
        run = self._run
        assert run is not None
        if any(message.value.take() is None for message in messages if not message.sent.is_tap):
            return None  # who should have made it has failed, and says so
        for message in messages:
            run.arrive(message)
        try:
            run.level(level, self._step)
            return {(m.sent, m.segment): m.value for m in run.outgoing}
        finally:
            run.outgoing.clear()

    def send(self, sent: Sent, value: Any, level: int) -> None:
        """See `Levels`."""
        value = self._mail.send(sent, value, level)
        if self._trail is not None:
            for part in pytree.tree_leaves(value):
                self._trail.sent(part, sent.target, level)


class Replayed:
    """Levels of a run that are replayed.

    Args:
        host: the run, as far as the host has to do with it.
        begin: does what comes before the first level; whether the recordings hold.
        outer: taps that are read outside of levels.
        runs_ahead: whether no rank waits for a later one: then each begins a level after the one before.
    """

    def __init__(
        self,
        band: RecordedBand,
        blocks: Sequence[Block],
        host: Any,
        begin: Callable[[], bool],
        outer: frozenset[str],
        traffic: Traffic,
        mail: Mail,
        posts: Posts,
        runs_ahead: bool,
    ) -> None:
        self._band, self._host, self._begin = band, host, begin
        self._blocks = {block.levels.start: block for block in blocks}
        self._outer, self._traffic = outer, traffic
        self._mail, self._posts, self._runs_ahead = mail, posts, runs_ahead
        self._next: list[Message] | None = None
        self._kept: dict[tuple[str, int], Any] = {}  # by the host, on this level
        names = {sent.name for sent in band.band.sends if self._is_outer(sent)}
        host.peers = {name: [self._noting(name)] for name in names}

    def _is_outer(self, sent: Sent) -> bool:
        return sent.is_tap and sent.name in self._outer

    def _noting(self, name: str) -> Callable[[int, Any], None]:
        return lambda segment, value: self._kept.update({(name, segment): value})

    def receive(self, level: int) -> list[Message]:
        """See `Levels`; what the next level reads is posted, too."""
        traffic, is_first = self._traffic, self._next is None
        now = self._posts.post(traffic.received(level)) if self._next is None else self._next
        is_last = level == traffic.grid.levels[-1]
        self._next = [] if is_last else self._posts.post(traffic.received(level + 1))
        if is_first and self._runs_ahead:
            for message in self._next:
                message.value.wait()
        return now

    def run(self, level: int, messages: Sequence[Message]) -> Made | None:
        """See `Levels`."""
        if level == self._traffic.grid.levels[0] and not self._begin():
            return None
        read = []
        for message in messages:
            if self._is_outer(message.sent):
                own = pytree.tree_map_only(torch.Tensor, torch.clone, message.value.take())
                self._host.taps[message.sent.name].put(message.segment, own)
            if not message.sent.is_tap or message.sent.name in self._band.levels_read:
                read.append(message)
            else:
                message.value.done()
        self._kept.clear()
        sends = self._band.play(self._blocks[level], self._host, read)
        if sends is None:
            return None
        made = {(sent, s): self._kept.get((sent.name, s)) for sent, s in self._traffic.sent(level)}
        return made | {(m.sent, m.segment): m.value for m in sends}

    def before_sends(self, level: int) -> None:
        """See `Levels`."""

    def send(self, sent: Sent, value: Any, level: int) -> None:
        """See `Levels`."""
        value = self._band.like(sent) if value is None else value
        parts = [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
        self._mail.send_tensors(sent, parts, level)


__all__ = ["Launched", "Levels", "Made", "Replayed", "Traffic"]
