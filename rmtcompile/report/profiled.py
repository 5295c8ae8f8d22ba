"""Profile: the measured time of a call, of its levels and of its kinds of operations, as data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from rmtcompile.schedule import BandTimes, Schedule
from rmtcompile.viewer import ProfileView


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
        sequential_us: microseconds of the model as it is, called in turn with the program; 0 where it was not
            run, since bands on CUDA devices have it kept in the host's memory.
        kind_us: microseconds of each kind of operation over one call.
        flops: floating-point operations of the matrix products and attentions of each level.
        peak: floating-point operations a second of one large matrix product on this device.
        repeats: timed calls.
        level_kinds: for each level, microseconds of each kind of operation; empty where that is not known.
        backward_us: microseconds of each level's part of backward, its forward included where it is computed
            again; empty where no gradients are recorded, and where ranks run the bands.
        backward_total_us: of all of backward, launched, with a gradient of one for each result.
        bands: when the levels of each band ran, in that of the repeats whose levels took the median time;
            empty where the layers are not cut. A level's time in `level_us` is then that of the device that
            took longest for it, and kinds and floating-point operations are those of all bands.
        launched_us: of the call that `bands` shows: levels are launched one by one, not replayed.
        exact_us: how far the clocks of two bands may be apart.
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
    bands: tuple[BandTimes, ...] = ()
    launched_us: float = 0.0
    exact_us: float = 0.0

    @property
    def speedup(self) -> float:
        """How many times as fast as the model as it is."""
        return self.sequential_us / self.total_us

    @property
    def utilisation(self) -> tuple[float, ...]:
        """For each level, its floating-point rate as a share of `peak`, at most 1."""
        return _shares(self.flops, self.level_us, self.peak)

    def view(self) -> ProfileView | None:
        """For the viewer: the time of a whole call, divided as the levels were timed.

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
        return ProfileView(*measured, self.backward_us, tuple(band.scaled(scale) for band in self.bands))

    def to_json(self, *, indent: int | None = None) -> str:
        """The measured numbers."""
        fields = dataclasses.fields(self)
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields if f.name != "schedule"}
        data["bands"] = [_of_band(band) for band in self.bands]
        data |= {"speedup": self.speedup, "utilisation": self.utilisation, "widths": self.schedule.widths}
        return json.dumps(data, indent=indent)

    def to_chrome_trace(self) -> str:
        """Trace events with the measured times, for Perfetto; a process a band."""
        times = None if self.bands else self.level_us or None
        return self.schedule.to_chrome_trace(times, self.backward_us, self.bands)

    def __str__(self) -> str:
        from rmtcompile.report.profile_text import to_text

        return to_text(self)

    def __repr__(self) -> str:
        levels = f"{self.schedule.n_levels} levels" if self.level_us else "levels not timed"
        times = f"{self.total_us / 1e3:.2f} ms a call"
        if self.sequential_us:
            times += f", {self.speedup:.2f} x as fast as the model as it is"
        return f"<Profile {times}, {levels}, {self.device}>"

    def _repr_html_(self) -> str:
        from rmtcompile.report.profile_text import to_html_fragment

        return to_html_fragment(self)


def _shares(flops: Sequence[int], level_us: Sequence[float], peak: float) -> tuple[float, ...]:
    if not peak or not level_us or not any(flops):
        return ()
    return tuple(min(1.0, n / (us * 1e-6) / peak) for n, us in zip(flops, level_us, strict=True))


def _of_band(band: BandTimes) -> dict[str, Any]:
    sums = {name: getattr(band, name) for name in ("busy_us", "waiting_us", "ramps_us", "idle_us")}
    return dataclasses.asdict(band) | sums | {"spans": [list(span) for span in band.spans]}
