"""Profile: measured time of each level, by phase and by kind of operation, as a table and for the viewer."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.schedule import Schedule
from rmtcompile.viewer import ProfileView

if TYPE_CHECKING:
    from rmtcompile.api import Optimized

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


@dataclasses.dataclass(frozen=True)
class Profile:
    """Measured time of one call.

    Attributes:
        schedule: the schedule that ran.
        device: what it ran on, and how.
        level_us: microseconds of each level, what enters before it and leaves after it included, median of
            the repeats; the device is waited for after each level, so the sum may be more than `total_us`.
        outside_us: microseconds of such a call that are no level's: what is the same for all segments before
            the first level, and results put together after the last.
        total_us: microseconds of a whole call without waiting between levels.
        sequential_us: microseconds of the model as it is, called in turn with the program.
        kind_us: microseconds of each kind of operation over one call.
        flops: floating-point operations of the matrix products and attentions of each level.
        peak: floating-point operations a second of one large matrix product on this device.
        repeats: timed calls.
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
        return ProfileView(levels, self.kind_us, used, self.sequential_us, self.outside_us * scale)

    def to_json(self, *, indent: int | None = None) -> str:
        """The measured numbers."""
        fields = dataclasses.fields(self)
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields if f.name != "schedule"}
        data |= {"speedup": self.speedup, "utilisation": self.utilisation, "widths": self.schedule.widths}
        return json.dumps(data, indent=indent)

    def to_chrome_trace(self) -> str:
        """Trace events with the measured times, for Perfetto."""
        return self.schedule.to_chrome_trace(self.level_us or None)

    def __str__(self) -> str:
        return "\n".join(_table(self))


def _shares(flops: Sequence[int], level_us: Sequence[float], peak: float) -> tuple[float, ...]:
    if not peak or not level_us or not any(flops):
        return ()
    return tuple(min(1.0, n / (us * 1e-6) / peak) for n, us in zip(flops, level_us, strict=True))


def _table(found: Profile) -> Iterator[str]:
    schedule, used = found.schedule, found.utilisation
    yield (
        f"profile   {found.total_us / 1e3:.2f} ms a call, the model as it is "
        f"{found.sequential_us / 1e3:.2f} ms: {found.speedup:.2f} x as fast"
    )
    yield f"          {found.device}, median of {found.repeats}"
    yield ""
    if not found.level_us:
        yield "  the program does not run level by level, so levels have no times of their own"
        yield from _kind_lines(found)
        return
    yield f"  {'level':>5}  {'phase':<9}  {'cells':>5}  {'ms':>9}  {'us a cell':>9}" + "  of peak" * bool(
        used
    )
    phases = schedule.phases
    for level, us in enumerate(found.level_us):
        width = schedule.widths[level]
        share = f"  {used[level]:>7.1%}" if used else ""
        yield f"  {level:>5}  {phases.of(level):<9}  {width:>5}  {us / 1e3:>9.3f}  {us / width:>9.1f}{share}"
    yield ""
    whole = sum(found.level_us) + found.outside_us
    for name, levels in zip(("ramp-up", "steady", "ramp-down"), phases, strict=True):
        if levels:
            us = sum(found.level_us[level] for level in levels)
            yield f"  {name:<22} {us / 1e3:>9.3f} ms  {us / whole:>6.1%}"
    yield f"  {'outside of levels':<22} {found.outside_us / 1e3:>9.3f} ms  {found.outside_us / whole:>6.1%}"
    yield from _kind_lines(found)


def _kind_lines(found: Profile) -> Iterator[str]:
    total = sum(found.kind_us.values())
    for name, us in sorted(found.kind_us.items(), key=lambda item: -item[1]):
        yield f"  {name:<22} {us / 1e3:>9.3f} ms  {us / total:>6.1%}"


def profile(fast: Optimized, args: tuple[Any, ...], kwargs: dict[str, Any], repeats: int = 5) -> Profile:
    """Run the program several times, in turn with the model as it is, and measure; no effect is left behind.

    Gradients are recorded if they are at a call now: wrap it in `torch.no_grad()` to measure inference.

    Args:
        fast: what `optimize` gave.
        args, kwargs: of the call.
        repeats: timed calls of each.
    """
    from rmtcompile.state import Contents, Snapshot, roots_of

    fast.prepare(*args, **kwargs)
    assert fast._last is not None
    entry, count = fast._last
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    executor, namespace = entry.executor, entry.compiled.namespace
    device = executor.device

    def program() -> None:
        executor.run(count, tensors)

    def level_by_level() -> None:
        executor.run(count, tensors, graphs=False)

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
        (_timed(program, device), _timed(model, device), *_levels(level_by_level, namespace, device))
        for _ in range(repeats)
    ]
    wholes, sequentials, levels, outsides = zip(*turns, strict=True)
    kinds = _kinds(program, device)
    flops = _flops(level_by_level, executor, namespace)
    peak = _peak(device, next((t.dtype for t in fast_parameters(fast)), torch.float32))
    schedule = fast.schedule
    fits = all(len(times) == schedule.n_levels for times in levels)
    result = Profile(
        schedule,
        _device_name(device, executor.backend),
        tuple(statistics.median(times) for times in zip(*levels, strict=True)) if fits else (),
        statistics.median(outsides),
        statistics.median(wholes),
        statistics.median(sequentials),
        kinds,
        tuple(flops) if len(flops) == schedule.n_levels else (),
        peak,
        repeats,
    )
    fast.last_profile = result
    return result


def fast_parameters(fast: Optimized) -> Iterator[torch.Tensor]:
    """The floating-point tensors of the model that the last program reads."""
    return (leaf.tensor for leaf in fast.compiled.leaves.values() if leaf.tensor.is_floating_point())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return (time.perf_counter() - start) * 1e6


@contextmanager
def _around_levels(namespace: dict[str, Any], wrap: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
    """Wrap the emitted function that runs one level."""
    step = namespace["step"]
    namespace["step"] = wrap(step)
    try:
        yield
    finally:
        namespace["step"] = step


def _levels(
    program: Callable[[], None], namespace: dict[str, Any], device: torch.device
) -> tuple[list[float], float]:
    """Microseconds of each level of one run, and of all that is no level."""
    times: list[float] = []

    def wrap(step: Callable[..., Any]) -> Any:
        return lambda *args: times.append(_timed(lambda: step(*args), device))

    with _around_levels(namespace, wrap):
        whole = _timed(program, device)
    return times, max(0.0, whole - sum(times))


def _flops(program: Callable[[], None], executor: Any, namespace: dict[str, Any]) -> list[int]:
    """Counted once on the uncompiled cell functions."""
    from torch.utils.flop_counter import FlopCounterMode

    counts: list[int] = []

    def wrap(step: Callable[..., Any]) -> Any:
        def counted(*args: Any) -> None:
            with FlopCounterMode(display=False) as counter:
                step(*args)
            counts.append(int(counter.get_total_flops()))

        return counted

    kept, executor._engine = executor._engine, executor.new_engine("eager", keeps_buffers=False)
    try:
        with _around_levels(namespace, wrap):
            program()
    finally:
        executor._engine = kept
    return counts


def kind_of(name: str) -> str:
    """The kind of an operation or kernel, by its name."""
    words = name.removeprefix("aten::").strip("_").lower()
    parts = words.replace("::", "_").split("_")
    for kind, keys in _KINDS:
        if any((key in words) if len(key) > 5 else key in parts or words.endswith(key) for key in keys):
            return kind
    return "pointwise"


def _kinds(program: Callable[[], None], device: torch.device) -> dict[str, float]:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes its progress to standard error
    cuda = device.type == "cuda"
    with record(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as events:
        program()
        _wait(device)
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


def _peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    size = 4096 if device.type == "cuda" else 512
    a = torch.ones(size, size, dtype=dtype, device=device)
    times = [_timed(lambda: torch.mm(a, a), device) for _ in range(6)]
    return 2 * size**3 / (min(times) * 1e-6)


def _device_name(device: torch.device, backend: Any) -> str:
    how = backend if isinstance(backend, str) else getattr(backend, "__name__", "custom backend")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {how}"
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}, {how}"
