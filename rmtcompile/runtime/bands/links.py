"""Links: how values get from band to band within one process.

    device a   level t, copy to a slot, level t + 1 ...        its own stream
                              peer copy                       a stream of the link
    device b   level t ................ level t + 1 reads it   its own stream

Nothing waits but who reads: the copy runs beside the next level. A slot is used again when its value was
read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.ir.bands import Sent


class Value:
    """A value on its way; on one device it simply is there."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def take(self) -> Any:
        """The value, on the device that reads it; memory that may be written again after `done`."""
        return self._value

    def done(self) -> None:
        """All that reads the value has been launched."""

    @property
    def is_lent(self) -> bool:
        """Whether its memory is written again."""
        return False


@dataclass
class _Slot:
    here: torch.Tensor
    there: torch.Tensor
    sent: torch.cuda.Event
    arrived: torch.cuda.Event
    freed: torch.cuda.Event
    is_out: bool = True


class _Lent(Value):
    def __init__(self, slot: _Slot) -> None:
        self._slot = slot

    def take(self) -> torch.Tensor:
        torch.cuda.current_stream(self._slot.there.device).wait_event(self._slot.arrived)
        return self._slot.there

    def done(self) -> None:
        self._slot.freed.record(torch.cuda.current_stream(self._slot.there.device))
        self._slot.is_out = False

    @property
    def is_lent(self) -> bool:
        return True


class PeerLink:
    """From one CUDA device to another."""

    SLOTS = 4
    """Of each value that is sent; more only while so many are on their way."""

    def __init__(self, source: torch.device, target: torch.device) -> None:
        self.source, self.target = source, target
        self._from, self._to = torch.cuda.Stream(source), torch.cuda.Stream(target)
        self._slots: dict[Any, list[_Slot]] = {}

    def send(self, sent: Sent, value: Any) -> Value:
        """Start on a value's way. It is copied at once: its own memory may be written again."""
        if not isinstance(value, torch.Tensor) or value.device != self.source:
            return Value(pytree.tree_map_only(torch.Tensor, self._moved, value))
        slots = self._slots.setdefault((sent, value.shape, value.dtype), [])
        own = torch.cuda.current_stream(self.source)
        if len(slots) >= self.SLOTS and not slots[0].is_out:
            slot = slots.pop(0)
            own.wait_event(slot.sent)
            self._to.wait_event(slot.freed)
        else:
            slot = self._slot(value)
        slots.append(slot)
        slot.is_out = True
        slot.here.copy_(value)
        self._from.wait_event(own.record_event())
        with torch.cuda.stream(self._to), torch.cuda.stream(self._from):
            slot.there.copy_(slot.here, non_blocking=True)
        slot.sent.record(self._from)
        slot.arrived.record(self._to)
        return _Lent(slot)

    def _moved(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.target) if value.device == self.source else value

    def _slot(self, value: torch.Tensor) -> _Slot:
        here = torch.empty_like(value, memory_format=torch.contiguous_format)
        there = torch.empty(value.shape, dtype=value.dtype, device=self.target)
        self._to.wait_stream(torch.cuda.current_stream(self.target))  # whoever had this memory before
        with torch.cuda.device(self.source):
            sent = torch.cuda.Event()
        with torch.cuda.device(self.target):
            return _Slot(here, there, sent, torch.cuda.Event(), torch.cuda.Event())


class Links:
    """All links of a run's bands, by their devices."""

    def __init__(self) -> None:
        self._links: dict[tuple[torch.device, torch.device], PeerLink] = {}

    def send(self, sent: Sent, value: Any, source: torch.device, target: torch.device) -> Value:
        """See `PeerLink.send`; on one device the value itself goes on, which nothing may write again."""
        if source == target or source.type != "cuda":
            return Value(value)
        if (source, target) not in self._links:
            self._links[source, target] = PeerLink(source, target)
        return self._links[source, target].send(sent, value)


__all__ = ["Links", "PeerLink", "Value"]
