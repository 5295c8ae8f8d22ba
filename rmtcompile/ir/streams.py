"""Streams on which CUDA graphs are recorded: one a device, since memory of a pool is bound to a stream."""

from __future__ import annotations

import functools

import torch


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream to record on; None stands for torch's own, which is one of the first device."""
    if device.type != "cuda" or not device.index:
        return None
    return torch.cuda.Stream(device)


__all__ = ["capture_stream"]
