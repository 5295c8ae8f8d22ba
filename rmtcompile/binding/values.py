"""Values: whether the tensors from which a captured forward read numbers still hold what they held.

    span.item() = 0.7  at capture          x[:, -3:]  in the program
    span.fill_(0.2), optimizer.step()      the bytes differ: captured anew

The contents themselves are compared at each call, all small ones at once: versions of tensors do not show
writes through `.data`, NumPy or another framework. The whole tensor counts and not the elements that were
read: a longer input may read further ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rmtcompile.binding.captured import Leaf

_LARGE = 1 << 16
"""Elements from which on a tensor is compared by itself, and not copied to lie beside others."""


class Values:
    """The tensors that decided numbers, and their contents.

    Args:
        leaves: where the model keeps them.

    Attributes:
        leaves: as given.
    """

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self.leaves = list(leaves)
        with torch.inference_mode(False), torch.no_grad():
            self._kept = [leaf.fetch().detach().clone() for leaf in leaves]
            self._small = _by_device([_bytes(x) for x in self._kept if x.numel() < _LARGE])

    def changed(self) -> str | None:
        """What differs now, in words, or None."""
        if not self.leaves:
            return None
        for leaf in self.leaves:
            if not leaf.fits():
                return f"{leaf.name}, from which the forward reads numbers, is another tensor"
        with torch.inference_mode(False), torch.no_grad():
            now = [leaf.fetch().detach() for leaf in self.leaves]
            return self._difference(now) if self._differ(now) else None

    def _differ(self, now: list[torch.Tensor]) -> bool:
        """Whether anything differs; waits once for each device."""
        pairs = [(x, y) for x, y in zip(now, self._kept, strict=True) if x.numel() >= _LARGE]
        small = _by_device([_bytes(x) for x in now if x.numel() < _LARGE])
        pairs += [(small[device], kept) for device, kept in self._small.items()]
        flags = _by_device([_differs(x, y) for x, y in pairs])
        return any(bool(flag.any()) for flag in flags.values())

    def _difference(self, now: list[torch.Tensor]) -> str:
        for leaf, new, old in zip(self.leaves, now, self._kept, strict=True):
            if bool(_differs(new, old).any()):
                if new.numel() > 1:
                    return f"the forward reads numbers from {leaf.name}, which holds others now"
                values = f"which was {old.item()} and is {new.item()}"
                return f"the forward reads a number from {leaf.name}, {values}"
        raise AssertionError("the contents were written while they were compared")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Contents as they lie in memory: NaN equals itself, and tensors of all types can lie in one."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _by_device(parts: list[torch.Tensor]) -> dict[torch.device, torch.Tensor]:
    found: dict[torch.device, list[torch.Tensor]] = {}
    for part in parts:
        found.setdefault(part.device, []).append(part)
    return {device: torch.cat(group) for device, group in found.items()}


def _differs(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One flag, on the device."""
    kind = _INTEGERS.get(x.element_size(), torch.uint8)
    a, b = (_bytes(tensor).view(kind) for tensor in (x, y))
    return (a != b).any().reshape(1)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
"""Types to compare elements of so many bytes by."""
