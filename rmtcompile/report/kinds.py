"""Time by kind of operation, from torch's profiler: over a whole run, and for each level."""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rmtcompile.runtime.base import Level, OnLevel

_KINDS = (
    ("attention", ("attention", "flash", "fmha", "sdpa")),
    ("matrix products", (
        "mm", "matmul", "linear", "einsum", "gemm", "dot", "cutlass", "nvjet", "conv", "gated_product",
    )),
    ("norms and reductions", ("mean", "sum", "norm", "softmax", "var", "max", "min", "cumsum", "any", "all")),
    ("data movement", (
        "copy", "cat", "stack", "clone", "contiguous", "index", "gather", "roll", "embedding", "fill", "zero",
        "empty", "slice", "select", "view", "reshape", "expand", "transpose", "permute", "as_strided",
        "squeeze", "unbind", "split", "memcpy", "memset", "arange", "to", "detach", "alias", "resize", "t",
    )),
)  # fmt: skip


def wait(*devices: torch.device) -> None:
    """Until the devices have done what was queued."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], *devices: torch.device) -> float:
    """Microseconds of a call, until the devices have done it."""
    wait(*devices)
    start = time.perf_counter()
    run()
    wait(*devices)
    return (time.perf_counter() - start) * 1e6


@contextmanager
def recording(*devices: torch.device) -> Iterator[Any]:
    """torch's profiler over a block, to its end on the devices."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes its progress to standard error
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * are_cuda(devices)
    with profile(activities=activities, acc_events=True) as found:
        yield found
        wait(*devices)


def are_cuda(devices: Sequence[torch.device]) -> bool:
    """Whether work is done on CUDA devices, so that their clocks count."""
    return any(device.type == "cuda" for device in devices)


def kind_of(name: str) -> str:
    """The kind of an operation or kernel, by its name."""
    words = name.removeprefix("aten::").strip("_").lower()
    parts = words.replace("::", "_").split("_")
    for kind, keys in _KINDS:
        if any((key in words) if len(key) > 5 else key in parts or words.endswith(key) for key in keys):
            return kind
    return "pointwise"


def kinds_of(program: Callable[[], None], *devices: torch.device) -> dict[str, float]:
    """Microseconds of each kind of operation over one run, on all devices together."""
    from torch.autograd import DeviceType

    cuda = are_cuda(devices)
    with recording(*devices) as events:
        program()
    found: dict[str, float] = {}
    for event in events.key_averages():
        if cuda:  # kernels only: the operations that launched them count the same time again
            us = event.self_device_time_total if event.device_type == DeviceType.CUDA else 0
        else:
            us = event.self_cpu_time_total if event.key.startswith("aten::") else 0
        if us > 0:
            kind = kind_of(event.key)
            found[kind] = found.get(kind, 0.0) + us
    return found


_MARK = "rmtcompile level"


def level_kinds(
    program: Callable[[OnLevel], Any], device: torch.device, level_us: Sequence[float]
) -> tuple[dict[str, float], ...]:
    """For each level, microseconds of each kind of operation, together at most the level's.

    Empty where levels have no times.  One more run, in which each level is waited for: what begins between
    the marks of a level is the level's.
    """
    if not level_us:
        return ()
    from torch.autograd import DeviceType
    from torch.profiler import record_function

    cuda = device.type == "cuda"

    def marked(run: Any, level: int, step: Level) -> None:
        with record_function(_MARK):
            step(run, level)
            wait(device)

    with recording(device) as recorded:
        program(marked)
    events = recorded.events() or ()
    marks = sorted(
        (e.time_range.start, e.time_range.end)
        for e in events
        if e.name == _MARK and e.device_type == DeviceType.CPU
    )
    if len(marks) != len(level_us):
        return ()
    starts = [start for start, _ in marks]
    found: list[dict[str, float]] = [{} for _ in marks]
    for event in events:
        at = bisect_right(starts, event.time_range.start) - 1
        if event.name == _MARK or at < 0 or event.time_range.start > marks[at][1]:
            continue
        if cuda:
            us = event.time_range.elapsed_us() if event.device_type == DeviceType.CUDA else 0
        else:
            us = event.self_cpu_time_total if event.name.startswith("aten::") else 0
        if us > 0:
            kind = kind_of(event.name)
            found[at][kind] = found[at].get(kind, 0.0) + us
    # Recording slows a CPU down, so shares count there; kernels take on a device what they take.
    spans = [sum(one.values()) if cuda else end - start for one, (start, end) in zip(found, marks)]
    return tuple(
        {kind: us * (min(1.0, whole / span) if cuda else whole / span) for kind, us in one.items()}
        for one, whole, span in zip(found, level_us, spans)
    )
