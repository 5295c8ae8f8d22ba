"""The profile of one steady step: what runs, how often, how long, and what it could take.

Two runs are profiled, one some segments longer than the other.  What the longer one does more, divided by the
number of segments, is one steady step: no hook in the program is needed, and ramps cancel.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rmtcompile.bench.measure import in_turn

KINDS = {
    "compiled": r"^triton_",
    "attention": r"flash|fmha|sdpa|attention",
    "product": r"^gated_product|gemm|nvjet|cutlass|cublas|xmma|gemv|::(add|b|badd)?mm$|aten::(linear|matmul)",
    "copy": r"memcpy|memset|copy",
}
"""Kinds of kernels, by the first expression that is found in the name."""


def kind_of(name: str) -> str:
    """One of `KINDS`, or "other"."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def counted(function: Callable[[], Any], cuda: bool) -> dict[str, tuple[int, float]]:
    """Count and microseconds of each kernel (on a CPU: of each operation's own time) of one run."""
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiled:
        function()
        if cuda:
            torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for event in profiled.key_averages():
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        if time > 0 and not event.is_user_annotation:
            count, total = found[event.key]
            found[event.key] = (count + event.count, total + time)
    return dict(found)


def steady_step(run: Callable[[int], Any], segments: int, more: int, device: torch.device) -> dict[str, Any]:
    """The profile of one steady step.

    Args:
        run: runs a number of segments; both lengths are prepared.
        segments, more: the lengths are `segments` and `segments + more`.

    Returns:
        `kernels` (kernel, kind, count, us, share), `kinds` (us by kind), `us` (all kernels) and `step_us`:
        what a step takes by the clock, without the profiler; what it takes more than its kernels is gaps.
    """
    cuda = device.type == "cuda"
    lengths = {"short": lambda: run(segments), "long": lambda: run(segments + more)}
    times = in_turn(lengths, device, rounds=3)
    clock = (statistics.median(times["long"]) - statistics.median(times["short"])) / more * 1e6
    counted(lengths["short"], cuda)  # the profiler's own first time
    short, long = (counted(function, cuda) for function in lengths.values())
    rows: list[dict[str, Any]] = []
    for name in long.keys() | short.keys():
        (n1, t1), (n2, t2) = short.get(name, (0, 0.0)), long.get(name, (0, 0.0))
        if n2 != n1:
            rows.append(
                {"kernel": name, "kind": kind_of(name), "count": (n2 - n1) / more, "us": (t2 - t1) / more}
            )
    rows.sort(key=lambda row: -row["us"])
    total = sum(row["us"] for row in rows)
    kinds: dict[str, float] = defaultdict(float)
    for row in rows:
        row["share"] = row["us"] / total if total else 0.0
        kinds[row["kind"]] += row["us"]
    lengths_run = [segments, segments + more]
    return {"segments": lengths_run, "step_us": clock, "us": total, "kinds": dict(kinds), "kernels": rows}
