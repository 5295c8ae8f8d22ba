"""Agreement: whether all ranks are about to run the same, found out before a run's first level.

    rank 0    program, segments, shapes, samples of values and weights ──┐
    rank 1    the same .................................................─┴── equal, or refused by what differs
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rmtcompile.runtime.bands.control import RUN
from rmtcompile.runtime.bands.copies import version
from rmtcompile.runtime.bands.mail import Mail
from rmtcompile.runtime.crossing import Crossing, Key

_SAMPLES = 64
_RECORDED = "is recorded"
_WEIGHTS = "the weights and buffers"


class Agreement:
    """What a rank says of the runs of one program.

    Args:
        source: of the program, without the rank's device.
    """

    def __init__(self, mail: Mail, source: str) -> None:
        self._mail = mail
        self._program = _hashed([source])
        self._known: dict[str, tuple[Any, str]] = {}  # of each leaf: where it lies and its writes; its digest

    def reached(
        self,
        segments: int,
        inputs: Sequence[torch.Tensor],
        held: Mapping[str, torch.Tensor],
        crossing: Crossing | None,
        wanted: Sequence[str],
        can_replay: bool,
    ) -> bool:
        """Find out whether all ranks are about to run the same.

        Args:
            held: parameters, buffers and constants, by name.
            wanted: names of what has gradients.
            can_replay: whether this rank has recorded what the run needs.

        Returns:
            Whether all of them have.

        Raises:
            UnsupportedError: they are not.
        """
        # Of a state in parts each rank has other values.
        state = crossing.values if crossing is not None and not crossing.stamp else {}
        mine = {
            "rmtcompile's program": self._program,
            "torch": torch.__version__,
            "the number of segments": segments,
            "the arguments' shapes": [(tuple(x.shape), str(x.dtype)) for x in inputs],
            "the arguments' values": _sampled(inputs),
            _WEIGHTS: self._digest(held),
            "the state": None if crossing is None else _shown(crossing, state),
            "the state's values": _sampled([value for _, value in sorted(state.items())]),
            "what has gradients": list(wanted),
        }
        everyone = self._mail.gathered(RUN, {**mine, _RECORDED: can_replay})
        if any(one[_WEIGHTS] != mine[_WEIGHTS] for one in everyone):
            self._known.clear()  # what comes by a broadcast is no write that torch counts
            mine[_WEIGHTS] = self._digest(held)
            digests = self._mail.gathered("compare weights", mine[_WEIGHTS])
            everyone = [{**one, _WEIGHTS: digest} for one, digest in zip(everyone, digests, strict=True)]
        for what, value in mine.items():
            said = [one[what] for one in everyone]
            if any(other != value for other in said):
                self._mail.words.differ(what, [f"rank {rank}: {other}" for rank, other in enumerate(said)])
        return all(one[_RECORDED] for one in everyone)

    def _digest(self, held: Mapping[str, torch.Tensor]) -> str:
        """Equal where these are, as far as samples show; taken again where a write was counted."""
        for name, x in held.items():
            at = x.data_ptr(), version(x)
            if self._known.get(name, (None, ""))[0] != at:
                self._known[name] = at, _sampled([x])
        return _hashed([self._known[name][1] for name in sorted(held)])


def anywhere(source: str, home: torch.device) -> str:
    """The source of a program without the device of this rank."""
    return source.replace(f'torch.device("{home}")', "home")


def _shown(crossing: Crossing, state: Mapping[Key, torch.Tensor]) -> tuple[Any, ...]:
    """What ranks see of each other's state where these differ."""
    held = f"a rank's part of that of call {crossing.stamp}" if crossing.stamp else sorted(state)
    return crossing.first, crossing.border, held


def _hashed(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _sampled(values: Sequence[torch.Tensor]) -> str:
    """Equal for tensors of the same values, as far as evenly spaced samples show."""
    digest = hashlib.sha256()
    for value in values:
        flat = value.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLES)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes() if some.numel() else b"")
    return digest.hexdigest()[:16]


__all__ = ["Agreement", "anywhere"]
