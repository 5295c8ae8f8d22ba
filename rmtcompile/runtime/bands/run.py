"""One band's part of a run: its own layers' cells, what it sends to other bands and what it receives.

    level t       cells of these layers run; what other bands read of them is noted, with t
    level t + 1   what was sent on level t is put where these cells look for it, before anything runs

A band that finds all that was sent before its level does what the whole program does there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch.utils import _pytree as pytree

from rmtcompile.ir.bands import Band, Sent
from rmtcompile.runtime.base import Level, Outputs
from rmtcompile.runtime.run import Run, Stored, Window, _rows
from rmtcompile.runtime.storage import LaneStore, Target


@dataclass(frozen=True)
class Message:
    """A value that was sent.

    Attributes:
        level: on which it was made.
        segment: of the cell, prologue or epilogue that made it.
        value: the value itself, or a `Value` that is on its way.
    """

    sent: Sent
    level: int
    segment: int
    value: Any


class BandRun(Run):
    """State of one band's part of a run; see `Run`. It is of no band before `join`.

    Attributes:
        outgoing: what was made for other bands and not taken yet.
    """

    takes_at_once: ClassVar[bool] = False
    """Whether what was made is taken before the next level writes anything."""

    def join(self, band: Band, whole: Mapping[str, tuple[int, ...]], functional: bool = False) -> Self:
        """Be a band's part of a run.

        Args:
            whole: the layers of the whole program's groups, by name.
            functional: whether gradients may be recorded.
        """
        self.band = band
        self.functional = functional
        self.outgoing: list[Message] = []
        self._whole = whole
        self._arrived: list[Message] = []
        self._now = self.grid.levels.start
        self._cells: dict[str, list[Sent]] = {}
        self._taps: dict[str, list[Sent]] = {}
        for sent in band.sends:
            by, key = (self._taps, sent.name) if sent.is_tap else (self._cells, sent.group)
            by.setdefault(key, []).append(sent)
        return self

    def copied(self) -> Self:
        """See `BaseRun`."""
        other = super().copied()
        other.outgoing, other._arrived = [], list(self._arrived)
        return other

    # ---- receiving -----------------------------------------------------------------------------------------

    def arrive(self, message: Message) -> None:
        """Take a value that a later level reads."""
        self._arrived.append(message)

    def level(self, level: int, step: Level) -> None:
        """Run one level, with all that was sent before it."""
        self.deliver(level)
        super().level(level, step)

    def deliver(self, level: int) -> None:
        """Put all that was sent before a level where its cells look for it."""
        self._now = level
        due = sorted((m for m in self._arrived if m.level < level), key=lambda m: m.level)
        self._arrived = [m for m in self._arrived if m.level >= level]
        for message in due:
            self.receive(message)
            message.value.done()

    def receive(self, message: Message) -> None:
        """Put a value where the cells of this band look for it."""
        sent, value = message.sent, message.value.take()
        if not sent.is_tap:
            self.lanes[sent.name].fill(sent.place, value)
        else:
            own = value.clone() if message.value.is_lent else value
            self.taps[sent.name].put(message.segment, own)

    # ---- sending -------------------------------------------------------------------------------------------

    def keep_cells(
        self, window: Window, outputs: Outputs, rows: range, stored: Mapping[Stored, Target]
    ) -> None:
        """See `Run`; what other bands read of it is noted, too."""
        super().keep_cells(window, outputs, rows, stored)
        for sent in self._cells.get(window.group, ()):
            if sent.layer in window.layers and (row := window.layers.index(sent.layer)) in rows:
                is_stored = (window.group, window.layers, sent.source) in stored and not self.takes_at_once
                self._send(sent, window.segments[row], outputs[sent.source][row], is_stored)

    def moves(self, level: int) -> list[tuple[LaneStore, list[int], torch.Tensor]]:
        """See `Run`."""
        for sent in self._cells.get("", ()):
            for segment, layer in self.alive(level, [sent.layer]):
                store = self.lanes[sent.source]
                self._send(sent, segment, store.read([layer])[0], not store.functional)
        return super().moves(level)

    def keep_tap(self, name: str, segment: int, value: Any) -> None:
        """See `BaseRun`."""
        super().keep_tap(name, segment, value)
        for sent in self._taps.get(name, ()):
            self._send(sent, segment, value, False)

    def _send(self, sent: Sent, segment: int, value: Any, is_overwritten: bool) -> None:
        """Note a value for another band; a copy, where its memory is written again."""
        if is_overwritten:
            value = pytree.tree_map_only(torch.Tensor, torch.clone, value)
        self.outgoing.append(Message(sent, self._now, segment, value))

    # ---- reading -------------------------------------------------------------------------------------------

    def invariant(self, name: str, window: Window) -> torch.Tensor:
        """See `Run`; these stacks hold all layers of the group."""
        layers = self._whole[window.group]
        return _rows(self.stacked[name], [layers.index(layer) for layer in window.layers])


__all__ = ["BandRun", "Message"]
