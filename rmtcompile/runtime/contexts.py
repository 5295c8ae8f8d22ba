"""Contexts: the modes of torch in which programs run, whatever the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from rmtcompile.ir.modes import autocast_as

_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip


@contextmanager
def own_modes() -> Iterator[None]:
    """The kernels of attention in the order that programs want, and no autocast."""
    with sdpa_kernel(_ATTENTION, set_priority=True), autocast_as():
        yield


@contextmanager
def same_numbers(device: torch.device) -> Iterator[None]:
    """The random numbers that are drawn within it are drawn again behind it: what is tried, measured or
    recorded does not show in what the caller draws."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _as_it_is(value: torch.Tensor) -> torch.Tensor:
    return value


@contextmanager
def unseen() -> Iterator[None]:
    """What is kept for backward within it is kept as it is, and is nothing to a checkpoint around the call:
    what a first call does besides, or what several processes have to do together."""
    # Compiled forms are made anew for other hooks, so that there are none where nobody has any.
    with saved_tensors_hooks(_as_it_is, _as_it_is) if has_hooks() else nullcontext():
        yield


def has_hooks() -> bool:
    """Whether something around the call wants to keep in a way of its own what backward needs."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


@contextmanager
def plain_tensors() -> Iterator[None]:
    """No gradients, and tensors that both inference mode and normal mode may write: one set of compiled forms
    and one storage serve both."""
    with torch.inference_mode(False), torch.no_grad():
        yield
