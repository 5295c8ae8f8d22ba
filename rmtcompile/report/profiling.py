"""Profile: measured time of each level, by phase and by kind of operation, as a table and for the viewer."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rmtcompile.binding.arguments import tensors_of
from rmtcompile.errors import RMTCompileError
from rmtcompile.passes.flat.attention import KERNELS
from rmtcompile.report.backward import backward_us
from rmtcompile.report.kinds import kinds_of, level_kinds, timed
from rmtcompile.runtime.base import Level, OnLevel
from rmtcompile.schedule import Schedule
from rmtcompile.viewer import ProfileView

if TYPE_CHECKING:
    from rmtcompile.dispatch.entries import Entry
    from rmtcompile.optimized import Optimized

@dataclasses.dataclass(frozen=True, repr=False)
class Profile:
    """Measured time of one call.

    Attributes:
        schedule: the schedule that ran.
        device: what it ran on, and how.
        level_us: microseconds of each level, what enters before it and leaves after it included, median of
            the repeats. On CUDA by the device's clock, with all of a level's kernels queued before the first
            begins; elsewhere each level is waited for, so the sum may be more than `total_us`.
        outside_us: microseconds of such a call that are no level's: what is the same for all segments before
            the first level, and results put together after the last.
        total_us: microseconds of a whole call without waiting between levels.
        sequential_us: microseconds of the model as it is, called in turn with the program.
        kind_us: microseconds of each kind of operation over one call.
        flops: floating-point operations of the matrix products and attentions of each level.
        peak: floating-point operations a second of one large matrix product on this device.
        repeats: timed calls.
        level_kinds: for each level, microseconds of each kind of operation; empty where that is not known.
        backward_us: microseconds of each level's part of backward, its forward included where it is computed
            again; empty where no gradients are recorded.
        backward_total_us: of all of backward, launched, with a gradient of one for each result.
    """

    schedule: Schedule
    device: str
    level_us: tuple[float, ...]
    outside_us: float
    total_us: float
    sequential_us: float
    kind_us: dict[str, float]
    flops: tuple[int, ...]
    peak: float
    repeats: int
    level_kinds: tuple[dict[str, float], ...] = ()
    backward_us: tuple[float, ...] = ()
    backward_total_us: float = 0.0

    @property
    def speedup(self) -> float:
        """How many times as fast as the model as it is."""
        return self.sequential_us / self.total_us

    @property
    def utilisation(self) -> tuple[float, ...]:
        """For each level, its floating-point rate as a share of `peak`, at most 1."""
        return _shares(self.flops, self.level_us, self.peak)

    def view(self) -> ProfileView | None:
        """For the viewer: the time of a whole call, divided as the levels were timed one by one.

        None where the levels could not be timed apart.
        """
        if not self.level_us:
            return None
        scale = self.total_us / (sum(self.level_us) + self.outside_us)
        levels = tuple(us * scale for us in self.level_us)
        used = _shares(self.flops, levels, self.peak)
        kinds = tuple({kind: us * scale for kind, us in one.items()} for one in self.level_kinds)
        outside = self.outside_us * scale
        measured = levels, self.kind_us, used, self.sequential_us, outside, kinds
        return ProfileView(*measured, self.backward_us)

    def to_json(self, *, indent: int | None = None) -> str:
        """The measured numbers."""
        fields = dataclasses.fields(self)
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields if f.name != "schedule"}
        data |= {"speedup": self.speedup, "utilisation": self.utilisation, "widths": self.schedule.widths}
        return json.dumps(data, indent=indent)

    def to_chrome_trace(self) -> str:
        """Trace events with the measured times, for Perfetto."""
        return self.schedule.to_chrome_trace(self.level_us or None, self.backward_us)

    def __str__(self) -> str:
        from rmtcompile.report.profile_text import to_text

        return to_text(self)

    def __repr__(self) -> str:
        levels = f"{self.schedule.n_levels} levels" if self.level_us else "levels not timed"
        times = f"{self.total_us / 1e3:.2f} ms a call, {self.speedup:.2f} x as fast as the model as it is"
        return f"<Profile {times}, {levels}, {self.device}>"

    def _repr_html_(self) -> str:
        from rmtcompile.report.profile_text import to_html_fragment

        return to_html_fragment(self)


def _shares(flops: Sequence[int], level_us: Sequence[float], peak: float) -> tuple[float, ...]:
    if not peak or not level_us or not any(flops):
        return ()
    return tuple(min(1.0, n / (us * 1e-6) / peak) for n, us in zip(flops, level_us, strict=True))


def profile(fast: Optimized, args: tuple[Any, ...], kwargs: dict[str, Any], repeats: int = 5) -> Profile:
    """Run the program several times, in turn with the model as it is, and measure; no effect is left behind.

    Gradients are recorded if they are at a call now: wrap it in `torch.no_grad()` to measure inference.

    Args:
        fast: what `optimize` gave.
        args, kwargs: of the call.
        repeats: timed calls of each.
    """
    from rmtcompile.binding.state import Contents, Snapshot, roots_of

    if fast.options.has_bands:
        raise RMTCompileError("levels of bands overlap: measure the program without devices")
    entry, count, tensors = _prepared(fast, args, kwargs)
    executor = entry.executor
    device = executor.device

    def program() -> None:
        executor.run(count, tensors)

    def level_by_level(on_level: OnLevel) -> Any:
        return executor.run(count, tensors, graphs=False, on_level=on_level)

    def model() -> None:
        snapshot = Snapshot(roots_of(fast.model))
        contents = Contents(snapshot)
        try:
            fast.model(*args, **kwargs)
        finally:
            snapshot.restore()
            contents.restore()

    program()
    program()  # the second run of a length records it
    model()
    # In turn: a machine that others use changes its pace from second to second.
    turns = [
        (timed(program, device), timed(model, device), *_levels(level_by_level, device))
        for _ in range(repeats)
    ]
    wholes, sequentials, levels, outsides = zip(*turns, strict=True)
    kinds = kinds_of(program, device)
    flops = _flops(level_by_level, executor)
    peak = _peak(device, next((t.dtype for t in fast_parameters(fast)), torch.float32))
    schedule = fast.schedule
    fits = all(len(times) == schedule.n_levels for times in levels)
    times = tuple(statistics.median(times) for times in zip(*levels, strict=True)) if fits else ()
    result = Profile(
        schedule,
        _device_name(device, executor.backend),
        times,
        statistics.median(outsides),
        statistics.median(wholes),
        statistics.median(sequentials),
        kinds,
        tuple(flops) if len(flops) == schedule.n_levels else (),
        peak,
        repeats,
        level_kinds(level_by_level, device, times),
        *backward_us(level_by_level, [*tensors, *executor.held().values()], device, repeats),
    )
    fast.last_profile = result
    return result


def fast_parameters(fast: Optimized) -> Iterator[torch.Tensor]:
    """The floating-point tensors of the model that the last program reads."""
    return (leaf.tensor for leaf in fast.compiled.leaves.values() if leaf.tensor.is_floating_point())


def _prepared(
    fast: Optimized, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Entry, int, list[torch.Tensor]]:
    """The program of a call, its number of segments and its inputs."""
    fast.prepare(*args, **kwargs)
    assert fast._last is not None
    return *fast._last, tensors_of(args, kwargs)


def level_us(
    fast: Optimized, args: tuple[Any, ...], kwargs: dict[str, Any], repeats: int = 5
) -> tuple[float, ...]:
    """Microseconds of each level as in `Profile`, without anything else; empty where levels cannot be timed
    apart."""
    entry, count, tensors = _prepared(fast, args, kwargs)

    def run(on_level: OnLevel | None = None) -> None:
        entry.executor.run(count, tensors, graphs=False, on_level=on_level)

    run()
    turns = [_levels(run, entry.executor.device)[0] for _ in range(repeats)]
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


def _flops(program: Callable[[OnLevel], None], executor: Any) -> list[int]:
    """Counted once on the uncompiled cell functions."""
    from torch.utils.flop_counter import FlopCounterMode

    counts: list[int] = []

    def counted(run: Any, level: int, step: Level) -> None:
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
            step(run, level)
        counts.append(int(counter.get_total_flops()))

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


def _peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    size = 4096 if device.type == "cuda" else 512
    a = torch.ones(size, size, dtype=dtype, device=device)
    times = [timed(lambda: torch.mm(a, a), device) for _ in range(6)]
    return 2 * size**3 / (min(times) * 1e-6)


def _device_name(device: torch.device, backend: Any) -> str:
    how = backend if isinstance(backend, str) else getattr(backend, "__name__", "custom backend")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {how}"
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}, {how}"
