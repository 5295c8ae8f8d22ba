"""What a band reads of the model's memory, on the band's own device.

The model stays whole where it is (its home). There a band reads the model's memory itself; elsewhere it has
copies of its layers' weights, which are made once, and again when a weight was written, replaced or moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

_SAMPLES = 64
"""Elements of each copied tensor that are compared at each run: writes that torch does not count (through
`.data`) are seen by them, as far as they write most of a tensor."""


def is_elsewhere(value: torch.Tensor, home: torch.device, device: torch.device) -> bool:
    """Whether a tensor lies where the model does, and that is not this device. Others (numbers in the host's
    memory) stay where they are."""
    return value.device == home and home != device


@dataclass(frozen=True)
class Way:
    """From the model's device to a band's."""

    home: torch.device
    device: torch.device

    def to(self, value: Any) -> Any:
        """A value on the band's device; differentiable."""
        return pytree.tree_map_only(torch.Tensor, lambda x: _moved(x, self.home, self.device), value)

    def moving(self, _: str, value: torch.Tensor) -> Any:
        """A value by name, on the band's device."""
        return self.to(value)

    def back(self, value: Any) -> Any:
        """A value on the model's device; differentiable."""
        return pytree.tree_map_only(torch.Tensor, lambda x: _moved(x, self.device, self.home), value)


def _moved(value: torch.Tensor, origin: torch.device, device: torch.device) -> torch.Tensor:
    return _to(value, device) if is_elsewhere(value, origin, device) else value


def _to(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    return value.to(device, non_blocking=value.is_cuda and device.type == "cuda")


class OnDevice(Mapping[str, torch.Tensor]):
    """Tensors by name, moved when they are first read."""

    def __init__(self, values: Mapping[str, torch.Tensor], move: Callable[[str, torch.Tensor], Any]) -> None:
        self._values = values
        self._move = move
        self._found: dict[str, torch.Tensor] = {}

    @property
    def read(self) -> Mapping[str, torch.Tensor]:
        """Those that were read so far, where they are read."""
        return self._found

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._found:
            self._found[name] = self._move(name, self._values[name])
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass
class _Copy:
    pointer: int
    versions: list[int]
    sample: torch.Tensor
    value: torch.Tensor


class Copies:
    """Copies of what does not change from run to run, on one band's device."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self._copies: dict[str, _Copy] = {}
        self._read: dict[str, torch.Tensor] = {}  # in this run: what copies were made of
        self._began: torch.cuda.Event | None = None
        self._side: torch.cuda.Stream | None = None

    def begin(self) -> None:
        """A run begins that has read nothing yet."""
        self._read = {}

    def of(self, name: str, value: torch.Tensor, written: Sequence[torch.Tensor]) -> torch.Tensor:
        """A copy of a tensor; the tensor itself where it is no other device's.

        Args:
            written: the tensors that are written where this one changes: itself, or the parts of a stack.
        """
        if not is_elsewhere(value, self.way.home, self.way.device):
            return value
        if detect_fake_mode() is not None:
            moved: torch.Tensor = self.way.to(value)
            return moved
        if not self._read and value.is_cuda:
            self._began = torch.cuda.current_stream(value.device).record_event()
        pointer, versions = value.data_ptr(), [version(x) for x in written]
        known = self._copies.get(name)
        if known is None or known.pointer != pointer or known.versions != versions:
            room = known.value if known is not None and _alike(known.value, value) else None
            copy = self.way.to(value) if room is None else room.copy_(value)
            known = self._copies[name] = _Copy(pointer, versions, _sampled(value).clone(), copy)
        self._read[name] = value
        return known.value

    def hold(self) -> bool:
        """Whether what this run has read still is a copy of the model's memory; copies that are not are made
        again by the next run."""
        read, self._read = self._read, {}
        if not read:
            return True
        with self._beside():
            same = torch.stack([(_sampled(x) == self._copies[name].sample).all() for name, x in read.items()])
            stale = [name for name, is_same in zip(read, same.tolist(), strict=True) if not is_same]
        for name in stale:
            self._copies[name].versions = []  # made again in the same place, which recordings read
        return not stale

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Look at the weights as they were when the run began, while the device is at work on it."""
        if self._began is None:
            yield
            return
        if self._side is None:
            self._side = torch.cuda.Stream(self.way.home)
        self._side.wait_event(self._began)
        with torch.cuda.stream(self._side):
            yield


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def version(value: torch.Tensor) -> int:
    """How often a tensor was written, as far as torch counts it."""
    return -1 if value.is_inference() else value._version


def _sampled(value: torch.Tensor) -> torch.Tensor:
    """Evenly spaced elements, of each row if there are rows, as bytes."""
    flat = value.detach().reshape(value.shape[0] if value.dim() > 1 else 1, -1)
    return flat[:, :: max(1, flat.shape[1] // _SAMPLES)].contiguous().view(torch.uint8)


__all__ = ["Copies", "OnDevice", "Way", "is_elsewhere", "version"]
