"""CUDA graphs of blocks of levels: what `runtime/recorded.py` needs of a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from rmtcompile.binding.captured import Leaf
from rmtcompile.runtime.block_run import Device
from rmtcompile.runtime.graphs import Recordings, Started
from rmtcompile.runtime.padded import PaddedBlocks
from rmtcompile.runtime.recorded import Ending, RecordedBlocks
from rmtcompile.runtime.workspaces import can_choose, no_workspaces, own_workspaces


class BlockRecorder(Recordings):
    """Records the blocks of a program, and replays runs of any length."""

    MOST = 3
    """Times that the blocks are recorded, the first one counted; a model whose weights move ever again is
    recorded by whole runs."""

    def __init__(
        self,
        leaves: Mapping[str, Leaf],
        replaced: frozenset[str],
    ) -> None:
        super().__init__(leaves, replaced)
        self.seconds: dict[str, float] = {}
        """Of a block of steady levels, "with" and "without" cuBLAS's workspace; empty if not measured. What
        another process has measured may be put here before anything is recorded."""
        self._times = 0
        self._blocks: RecordedBlocks | None = None
        self._state: dict[str, torch.Tensor] = {}
        self._addresses: dict[str, int] = {}
        self._kept: list[torch.Tensor] = []
        self._workspaces = own_workspaces

    @property
    def wants(self) -> bool:
        """Whether blocks are to be recorded now."""
        return self._blocks is None and self._times < self.MOST

    def prepare(
        self,
        make: Callable[[Device, Mapping[str, torch.Tensor]], RecordedBlocks],
        inputs: Callable[[int], Mapping[str, torch.Tensor]],
    ) -> None:
        """Record all blocks, in the way that is measured to be the faster one; all forms are compiled.

        Args:
            make: gives the blocks of the program for a device, and for the leaves as recordings read them.
            inputs: gives arguments of the forward of so many segments.
        """
        self._times += 1
        leaves = {name: leaf.fetch() for name, leaf in self.leaves.items()}
        self._state = {name: leaves[name].clone() for name in sorted(self.replaced)}
        self._addresses = {name: x.data_ptr() for name, x in leaves.items() if name not in self._state}
        self._kept = [x.detach() for x in leaves.values()]
        blocks = make(self, {**leaves, **self._state})
        with self.alone():
            blocks.begin(inputs(blocks.example_segments))
        if can_choose():
            self.seconds = self.seconds or self._measured(blocks)
            is_without = self.seconds["without"] < self.seconds["with"]
            self._workspaces = no_workspaces if is_without else own_workspaces
        blocks.record_all()
        self._blocks = blocks

    def _measured(self, blocks: RecordedBlocks) -> dict[str, float]:
        """See `seconds`."""
        graphs = {}
        for name, workspaces in (("with", own_workspaces), ("without", no_workspaces)):
            self._workspaces = workspaces
            graphs[name] = blocks.steady()
        return self.timed(graphs)

    def record(self, body: Callable[[], list[torch.Tensor]]) -> tuple[Any, list[torch.Tensor]]:
        """See `Device`. The values' memory is free for the recordings that follow, since it is copied out
        before another one is replayed."""
        graph, values = self.captured(body, self._workspaces)
        return graph, [unowned(value) for value in values]

    def record_again(self, segments: int) -> None:
        """Record a short length once more, since there are faster forms for its width now."""
        if self._blocks is not None:
            self._blocks.record_again(segments)

    @property
    def wants_padded(self) -> bool:
        """Whether last blocks of any rest could be recorded, too, beside the others."""
        return self._blocks is not None and self._blocks.padded is None

    @property
    def is_padded(self) -> bool:
        """Whether last blocks of any rest are recorded."""
        return self._blocks is not None and self._blocks.padded is not None

    def prepare_padded(self, make: Callable[[RecordedBlocks], PaddedBlocks]) -> None:
        """Record last blocks of any rest, in the way that was the faster one for the others."""
        assert self._blocks is not None
        with self.alone():
            blocks = make(self._blocks)
            blocks.warm_up()
        blocks.record_all()
        self._blocks.padded = blocks

    def drop_padded(self) -> None:
        """Launch last blocks of incomplete segments after all."""
        if self._blocks is not None:
            self._blocks.padded = None

    def forget(self) -> None:
        """Drop all recordings: weights have moved."""
        self._blocks = None

    def replay(
        self, segments: int, inputs: Mapping[str, torch.Tensor], ending: Ending | None = None
    ) -> Started | None:
        """Start a run; None where nothing is recorded, or where values have other shapes than recorded.

        Args:
            ending: launches the last levels, where those are not recorded.
        """
        state = self.state_like(self._state) if self._blocks is not None else None
        if self._blocks is None or state is None:
            return None
        with self.alone():
            for place, value in zip(self._state.values(), state, strict=True):
                place.copy_(value)
            outputs = self._blocks.run(segments, inputs, ending)
        if outputs is None:
            return None
        return Started(lambda: self.at_addresses(self._addresses), lambda: outputs)


class _Bytes:
    """Device memory, in the form that torch makes tensors of."""

    def __init__(self, value: torch.Tensor) -> None:
        size = value.untyped_storage().nbytes()
        pointer = value.untyped_storage().data_ptr()
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 3, "strides": None
        }  # fmt: skip


def unowned(value: torch.Tensor) -> torch.Tensor:
    """The same tensor, without a hold on its memory."""
    if not value.numel():
        return value
    flat = torch.as_tensor(_Bytes(value), device=value.device).view(value.dtype)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset())


__all__ = ["BlockRecorder", "unowned"]
