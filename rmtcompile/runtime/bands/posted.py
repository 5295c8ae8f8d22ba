"""Posted receives: what a rank will read is asked for a level before, and arrives beside a level's work.

    level t        receives of what is made on level t are posted; cells run; what was posted before was read
    level t + 1    waits for them, as a rule for nothing: its sender is a level ahead

On CUDA a receive is a kernel, which spins while there is nothing to receive.  So a rank begins a level after
the one before it: then what is posted is there, or nearly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.ir.bands import Sent
from rmtcompile.runtime.bands.links import Value
from rmtcompile.runtime.bands.mail import Mail
from rmtcompile.runtime.bands.run import Message

SLOTS = 4
"""Of each value, at least: what is posted, what is read, and some that are on their way."""


class _Slot:
    """Room for one value that is received again and again."""

    def __init__(self, room: Any, device: torch.device) -> None:
        self.room = room
        self.is_out = False
        self.freed = torch.cuda.Event() if device.type == "cuda" else None


class _Posted(Value):
    """A value that is being received."""

    def __init__(self, slot: _Slot, wait: Callable[[], None]) -> None:
        self._slot, self._wait = slot, wait

    def wait(self) -> None:
        """Let what is launched next wait until it has arrived."""
        self._wait()

    def take(self) -> Any:
        self._wait()
        return self._slot.room

    def done(self) -> None:
        if self._slot.freed is not None:
            self._slot.freed.record()
        self._slot.is_out = False

    @property
    def is_lent(self) -> bool:
        return True


class Posts:
    """The receives of one rank.

    Args:
        like: gives room for a value that is sent: tensors of its shapes.
    """

    def __init__(self, mail: Mail, like: Callable[[Sent], Any]) -> None:
        self._mail, self._like = mail, like
        self._slots: dict[Sent, deque[_Slot]] = {}
        is_cuda = mail.device.type == "cuda"
        self._stream = torch.cuda.Stream(mail.device) if is_cuda else None

    def post(self, wanted: Iterable[tuple[Sent, int, int]]) -> list[Message]:
        """Start to receive values.

        Args:
            wanted: (what, segment, level) of each, in the order in which they are sent.
        """
        with torch.cuda.stream(self._stream):
            return [Message(sent, level, s, self._posted(sent, level)) for sent, s, level in wanted]

    def _posted(self, sent: Sent, level: int) -> _Posted:
        slots = self._slots.setdefault(sent, deque())
        if len(slots) < SLOTS or slots[0].is_out:
            slots.appendleft(_Slot(self._like(sent), self._mail.device))
        slot = slots.popleft()
        slots.append(slot)
        if self._stream is not None and slot.freed is not None:
            self._stream.wait_event(slot.freed)
        slot.is_out = True
        parts = [x for x in pytree.tree_leaves(slot.room) if isinstance(x, torch.Tensor)]
        return _Posted(slot, self._mail.expect(sent, parts, level))


__all__ = ["Posts"]
