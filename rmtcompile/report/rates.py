"""Devices: what one is called, and its rate; the floating-point operations of each level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rmtcompile.passes.flat.attention import KERNELS
from rmtcompile.report.kinds import timed
from rmtcompile.runtime.base import Level, OnLevel


def flops_of(program: Callable[[OnLevel], None], executor: Any) -> dict[int, int]:
    """Those of each level by its number, counted once on the uncompiled cell functions. A level of several
    bands has those of all."""
    from torch.utils.flop_counter import FlopCounterMode

    counts: dict[int, int] = {}

    def counted(run: Any, level: int, step: Level) -> None:
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
            step(run, level)
        counts[level] = counts.get(level, 0) + int(counter.get_total_flops())

    with executor.uncompiled():
        program(counted)
    return counts


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Of shapes [B, H, T, D]; torch's own count refuses fewer heads of keys than of queries."""
    batch, heads, rows, size = query
    return 2 * batch * heads * rows * key[2] * (size + value[3])


ATTENTION_FLOPS = dict.fromkeys((kernel.overloadpacket for kernel in KERNELS), _attention_flops)


def peak_of(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    size = 4096 if device.type == "cuda" else 512
    a = torch.ones(size, size, dtype=dtype, device=device)
    times = [timed(lambda: torch.mm(a, a), device) for _ in range(6)]
    return 2 * size**3 / (min(times) * 1e-6)


def name_of(device: torch.device, backend: Any) -> str:
    """A device, and how cells run on it."""
    how = backend if isinstance(backend, str) else getattr(backend, "__name__", "custom backend")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {how}"
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}, {how}"
