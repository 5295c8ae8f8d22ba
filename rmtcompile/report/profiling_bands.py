"""Measures a program in bands: when each band's levels begin and end, on its own device or rank.

    band 0   [0][1][2][3]            busy: within its levels
    band 1         [2][3] [4][5]     waiting: between them;  ramps: before the first one and after the last

On CUDA levels of several devices overlap. Bands that share a device, as all do on the CPU of one process,
take turns, and wait for each other. Under ranks each one measures its own levels, and all get the whole.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rmtcompile.report.backward import backward_us
from rmtcompile.report.calls import Call
from rmtcompile.report.clocks import DeviceClock, offsets
from rmtcompile.report.kinds import kinds_of, timed
from rmtcompile.report.profiled import Profile
from rmtcompile.report.rates import flops_of, name_of, peak_of
from rmtcompile.runtime.base import Level, OnLevel
from rmtcompile.schedule import BandTimes, Span


@dataclass(frozen=True)
class Launched:
    """One run, level by level.

    Attributes:
        bands: when the levels of each ran.
        whole_us: all of it.
        exact_us: how far clocks of bands may be apart.
    """

    bands: tuple[BandTimes, ...]
    whole_us: float
    exact_us: float

    def level_us(self, levels: int) -> tuple[float, ...]:
        """Microseconds of each level, on the device or rank that took longest for it."""
        by_place: dict[str, list[float]] = {}
        for band in self.bands:
            taken = by_place.setdefault(band.place, [0.0] * levels)
            for span in band.spans:
                taken[span.level] += span.end - span.begin
        return tuple(max(times) for times in zip(*by_place.values(), strict=True))


class BandProfiler:
    """Runs a program in bands, from one process or on each rank of a group, and measures.

    Args:
        executor: runs all bands, or this rank's.
        is_ranked: whether it is one of several ranks; all of them measure at the same time.

    Attributes:
        working: the devices on which this process runs bands.
        devices: these, and where the model is.
    """

    def __init__(self, executor: Any, is_ranked: bool) -> None:
        self._devices = [member.way.device for member in executor.members]
        self.gathered: Callable[[Any], list[Any]] = _alone
        if is_ranked:
            self.gathered = partial(executor.mail.gathered, "measure a profile")
        self._places = [f"rank {p}" if is_ranked else str(one) for p, one in enumerate(self._devices)]
        self._offsets = offsets(self.gathered) if is_ranked else [(0.0, 0.0)]
        self.working = tuple(dict.fromkeys(self._devices))
        self.devices = tuple(dict.fromkeys([executor.home, *self._devices]))

    def launched(self, program: Callable[[OnLevel], Any]) -> Launched:
        """One run, level by level. The clocks are compared while all devices are idle."""
        clocks = {device: DeviceClock(device) for device in self.working}
        marks: dict[tuple[int, int], tuple[Any, Any]] = {}

        def marked(run: Any, level: int, step: Level) -> None:
            band = run.band.index
            clock = clocks[self._devices[band]]
            begun = clock.mark()
            step(run, level)
            marks[band, level] = begun, clock.mark()

        whole = timed(lambda: program(marked), *self.devices)
        mine = []
        for (band, level), (begun, done) in marks.items():
            clock = clocks[self._devices[band]]
            mine.append((band, level, clock.at(begun), clock.at(done)))
        exact = max(clock.exact_us for clock in clocks.values())
        told, wholes, exacts = zip(*self.gathered((mine, whole, exact)), strict=True)
        spans: list[list[Span]] = [[] for _ in self._places]
        for levels, (ahead, _) in zip(told, self._offsets, strict=True):
            for band, level, begun, done in levels:
                spans[band].append(Span(level, begun - ahead, done - ahead))
        off = max(device + rank for device, (_, rank) in zip(exacts, self._offsets, strict=True))
        is_one = len(clocks) * len(told) == 1
        return Launched(_from_first(spans, self._places), max(wholes), 0.0 if is_one else 2 * off)

    def slowest(self, us: float) -> float:
        """The longest time that a process says."""
        return float(max(self.gathered(us)))

    def together(self, mine: Mapping[Any, Any]) -> dict[Any, Any]:
        """The sums of what all processes say, by key."""
        found: dict[Any, Any] = {}
        for one in self.gathered(dict(mine)):
            for key, value in one.items():
                found[key] = found.get(key, 0) + value
        return found


def _alone(mine: Any) -> list[Any]:
    return [mine]


def _from_first(spans: Sequence[Sequence[Span]], places: Sequence[str]) -> tuple[BandTimes, ...]:
    """The times of each band, from the begin of the first level of any."""
    zero = min(span.begin for band in spans for span in band)
    total = max(span.end for band in spans for span in band) - zero
    return tuple(
        BandTimes(place, tuple(Span(level, a - zero, b - zero) for level, a, b in sorted(band)), total)
        for place, band in zip(places, spans, strict=True)
    )


def profile_bands(call: Call, repeats: int) -> Profile:
    """Measure a program in bands; see `profile`. Where ranks run them, each one has to call it.

    A model that is kept in the host's memory, for bands on CUDA devices, is not run as it is.
    """
    executor, is_ranked = call.executor, call.fast.options.group is not None
    bands = BandProfiler(executor, is_ranked)
    devices, can_run = bands.devices, executor.home.type == executor.device.type
    for run in (call.program, call.program, call.level_by_level, *[call.model] * can_run):
        run()
    turns = [
        (
            bands.slowest(timed(call.program, *devices)),
            bands.slowest(timed(call.model, *devices)) if can_run else 0.0,
            bands.launched(call.level_by_level),
        )
        for _ in range(repeats)
    ]
    wholes, sequentials, runs = zip(*turns, strict=True)
    middle = sorted(runs, key=lambda run: run.bands[0].total_us)[repeats // 2]
    schedule = call.fast.schedule
    fits = all(
        [span.level for span in times.spans] == list(schedule.band_grid(p).levels)
        for p, times in enumerate(middle.bands)
    )
    level_us = middle.level_us(schedule.n_levels) if fits else ()
    flops = bands.together(flops_of(call.level_by_level, executor))
    backward = backward_us(call.level_by_level, call.leaves, devices, repeats, by_level=not is_ranked)
    return Profile(
        schedule=schedule,
        device=_named(executor, is_ranked),
        level_us=level_us,
        outside_us=max(0.0, middle.whole_us - sum(level_us)),
        total_us=statistics.median(wholes),
        sequential_us=statistics.median(sequentials),
        kind_us=bands.together(kinds_of(call.program, *devices)),
        flops=tuple(flops[level] for level in sorted(flops)) if fits else (),
        peak=sum(bands.gathered(sum(peak_of(device, call.dtype) for device in bands.working))),
        repeats=repeats,
        backward_us=backward[0] if fits else (),
        backward_total_us=bands.slowest(backward[1]),
        bands=middle.bands if fits else (),
        launched_us=middle.whole_us,
        exact_us=middle.exact_us,
    )


def _named(executor: Any, is_ranked: bool) -> str:
    places = dict.fromkeys(str(member.way.device) for member in executor.members)
    where = "one a rank" if is_ranked else f"on {', '.join(places)}"
    bands = len(executor.members)
    return f"{bands} band{'s' * (bands > 1)} {where}: {name_of(executor.device, executor.backend)}"
