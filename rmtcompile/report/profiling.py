"""Measures a `Profile`: the program level by level, in turn with the model as it is."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from rmtcompile.report.backward import backward_us
from rmtcompile.report.calls import Call, call_of
from rmtcompile.report.kinds import kinds_of, level_kinds, timed
from rmtcompile.report.profiled import Profile
from rmtcompile.report.profiling_bands import profile_bands
from rmtcompile.report.rates import flops_of, name_of, peak_of
from rmtcompile.runtime.bands.execute import BandedExecutor
from rmtcompile.runtime.base import Level, OnLevel

if TYPE_CHECKING:
    from rmtcompile.optimized import Optimized


def profile(fast: Optimized, args: tuple[Any, ...], kwargs: dict[str, Any], repeats: int = 5) -> Profile:
    """Run the program several times, in turn with the model as it is, and measure; no effect is left behind.

    Gradients are recorded if they are at a call now: wrap it in `torch.no_grad()` to measure inference.

    Args:
        fast: what `optimize` gave.
        args, kwargs: of the call.
        repeats: timed calls of each.

    Where ranks run bands of the program, every rank has to call this, with the same arguments; all of them
    get the whole profile.
    """
    call = call_of(fast, args, kwargs)
    in_bands = isinstance(call.executor, BandedExecutor)
    fast.last_profile = profile_bands(call, repeats) if in_bands else _profile(call, repeats)
    return fast.last_profile


def _profile(call: Call, repeats: int) -> Profile:
    """Measure a program that one device runs."""
    executor, schedule = call.executor, call.fast.schedule
    device = executor.device
    call.program()
    call.program()  # the second run of a length records it
    call.model()
    # In turn: a machine that others use changes its pace from second to second.
    turns = [
        (timed(call.program, device), timed(call.model, device), *_levels(call.level_by_level, device))
        for _ in range(repeats)
    ]
    wholes, sequentials, levels, outsides = zip(*turns, strict=True)
    kinds = kinds_of(call.program, device)
    flops = flops_of(call.level_by_level, executor)
    peak = peak_of(device, call.dtype)
    fits = all(len(times) == schedule.n_levels for times in levels)
    times = tuple(statistics.median(times) for times in zip(*levels, strict=True)) if fits else ()
    return Profile(
        schedule,
        name_of(device, executor.backend),
        times,
        statistics.median(outsides),
        statistics.median(wholes),
        statistics.median(sequentials),
        kinds,
        tuple(flops[level] for level in sorted(flops)) if len(flops) == schedule.n_levels else (),
        peak,
        repeats,
        level_kinds(call.level_by_level, device, times),
        *backward_us(call.level_by_level, call.leaves, [device], repeats),
    )


def level_us(
    fast: Optimized, args: tuple[Any, ...], kwargs: dict[str, Any], repeats: int = 5
) -> tuple[float, ...]:
    """Microseconds of each level as in `Profile`, without anything else; empty where levels cannot be timed
    apart."""
    call = call_of(fast, args, kwargs)
    call.level_by_level()
    turns = [_levels(call.level_by_level, call.executor.device)[0] for _ in range(repeats)]
    if any(len(times) != fast.schedule.n_levels for times in turns):
        return ()
    return tuple(statistics.median(times) for times in zip(*turns, strict=True))


def _levels(program: Callable[[OnLevel], Any], device: torch.device) -> tuple[list[float], float]:
    """Microseconds of each level of one run, and of all that is no level."""
    if device.type == "cuda":
        return _levels_on_cuda(program, device)
    times: list[float] = []

    def by_itself(run: Any, level: int, step: Level) -> None:
        times.append(timed(lambda: step(run, level), device))

    whole = timed(lambda: program(by_itself), device)
    return times, max(0.0, whole - sum(times))


_BUSY = (8, 32, 128)
"""Products of two 4096 x 4096 matrices that keep a device busy while a level is queued, by attempt: 0.2 ms
each on a large GPU."""


def _levels_on_cuda(program: Callable[[OnLevel], Any], device: torch.device) -> tuple[list[float], float]:
    """The same by the device's clock.  It gets other work before each level, and comes to the level when all
    of its kernels are queued: it never waits for the host, as in a recorded run.  No levels where the host is
    too slow for that."""
    factor = torch.ones(4096, 4096, dtype=torch.float16, device=device)
    product = torch.empty_like(factor)
    marks: list[tuple[torch.cuda.Event, ...]] = []

    def occupy(n: int) -> None:
        for _ in range(n):
            torch.mm(factor, factor, out=product)

    for n in _BUSY:
        marks.clear()
        is_late = False

        def marked(run: Any, level: int, step: Level, n: int = n) -> None:
            nonlocal is_late
            reached, begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            reached.record()
            occupy(n)
            begun.record()
            step(run, level)
            is_late |= begun.query()  # the device was there before the last kernel was
            done.record()
            marks.append((reached, begun, done))

        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        occupy(n)
        first.record()
        program(marked)
        last.record()
        torch.cuda.synchronize(device)
        if not is_late:
            break
    if is_late or not marks:
        return [], first.elapsed_time(last) * 1e3
    outside = first.elapsed_time(marks[0][0]) + marks[-1][2].elapsed_time(last)
    return [begun.elapsed_time(done) * 1e3 for _, begun, done in marks], outside * 1e3
