"""Trail: the messages of one run with gradients, as nodes of autograd, on which gradients go back.

    forward     rank 0  level t ── value ──> rank 1  level t + 1
    backward    rank 0  level t <─ gradient ─ rank 1  level t + 1

Autograd runs nodes in the reverse of the order in which they were made, so that gradients come in the reverse
of the order of the messages: what a rank waits for has been sent by one that waited for nothing later.
A rank whose backward fails goes on as if it had not, with zeros, until all gradients of messages are sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rmtcompile.runtime.bands.mail import Mail


@dataclass(frozen=True)
class _Note:
    """A message.

    Attributes:
        is_sent: by this rank; its gradient comes back. Else that of a received one is sent back.
        peer: the other rank.
        level: on which its value was made.
        like: such a value without memory.
    """

    is_sent: bool
    peer: int
    level: int
    like: torch.Tensor


class Trail:
    """The messages of one run.

    Attributes:
        anchor: what all of them depend on.
        tokens: what all of them lead to: roots of backward, besides results.
    """

    def __init__(self, mail: Mail) -> None:
        self._mail = mail
        self.anchor = torch.zeros((), device=mail.device, requires_grad=True)
        self.tokens: list[torch.Tensor] = []
        self._notes: list[_Note] = []
        self._left = 0  # of the notes, in backward

    def sent(self, value: Any, target: int, level: int) -> None:
        """Note a tensor whose gradient will come back."""
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            index = self._noted(True, target, level, value)
            self.tokens.append(_Sent.apply(value, self.anchor, self, index))

    def received(self, value: torch.Tensor, source: int, level: int) -> torch.Tensor:
        """A tensor whose gradient will be sent back."""
        if not (value.is_floating_point() or value.is_complex()):
            return value
        index = self._noted(False, source, level, value)
        found: torch.Tensor
        found, token = _Received.apply(value, self.anchor, self, index)
        self.tokens.append(token)
        return found

    def _noted(self, is_sent: bool, peer: int, level: int, value: torch.Tensor) -> int:
        self._notes.append(_Note(is_sent, peer, level, torch.empty_like(value, device="meta")))
        return len(self._notes) - 1

    # ---- backward ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Called before backward."""
        self._left = len(self._notes)

    def gradient_of(self, index: int) -> torch.Tensor:
        """The gradient of a message that was sent, which comes back."""
        note = self._at(index)
        like = torch.empty_like(note.like, device=self._mail.device)
        return self._mail.receive_part(like, note.peer, note.level)

    def send_gradient(self, index: int, grad: torch.Tensor) -> None:
        """Start to send the gradient of a message that was received."""
        note = self._at(index)
        self._mail.send_part(grad, note.peer, note.level)
        self._mail.wait(note.level)

    def _at(self, index: int) -> _Note:
        self._left = index
        return self._notes[index]

    def where(self) -> str:
        """Which level backward is at."""
        coming = self._notes[self._left - 1] if self._left else None
        last = self._notes[self._left] if self._left < len(self._notes) else None
        if coming is not None and not coming.is_sent:  # it was made on the level before it was read
            return f"backward of level {coming.level + 1}"
        known = last or coming
        return f"backward of level {known.level}" if known is not None else "backward"

    def abandon(self) -> None:
        """Send and receive what other ranks wait for and send, after backward has failed on this one."""
        for index in reversed(range(self._left)):
            note = self._notes[index]
            if note.is_sent:
                self.gradient_of(index)
            else:
                self.send_gradient(index, torch.zeros_like(note.like, device=self._mail.device))


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, anchor: torch.Tensor, trail: Trail, index: int
    ) -> torch.Tensor:
        ctx.at = trail, index
        return anchor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        trail, index = ctx.at
        return trail.gradient_of(index), None, None, None


class _Received(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, anchor: torch.Tensor, trail: Trail, index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.at = trail, index
        return value.detach(), anchor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> Any:
        trail, index = ctx.at
        trail.send_gradient(index, grad)
        return None, None, None, None


__all__ = ["Trail"]
