"""Bands of a schedule: layers that run on a device of their own, and when their levels run.

    slot          0   1   2   3   4   5   6          two bands, one level behind the other
    layers 2..3           2   3   4   5              band 1 begins with level 2, a slot late
    layers 0..1   0   1   2   3                      each number is a level
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rmtcompile.schedule.data import Schedule

PLANNED_US = 100.0
"""How long a level is drawn whose time is not known."""


class Span(NamedTuple):
    """A level of a band, from begin to end, in microseconds since the first level of any band began."""

    level: int
    begin: float
    end: float


@dataclasses.dataclass(frozen=True)
class BandTimes:
    """When the levels of one band ran.

    Attributes:
        place: where they ran: a device, or a rank.
        spans: its levels, in order.
        total_us: from the begin of the first level of any band to the end of the last one of any.
    """

    place: str
    spans: tuple[Span, ...]
    total_us: float

    @property
    def busy_us(self) -> float:
        """Within its levels."""
        return sum(span.end - span.begin for span in self.spans)

    @property
    def waiting_us(self) -> float:
        """Between its levels: for what other bands send, with taking and sending it; on a device that bands
        share, for the others; and for a host that launches more slowly than the device works."""
        return sum(max(0.0, b.begin - a.end) for a, b in pairwise(self.spans))

    @property
    def ramps_us(self) -> float:
        """Before its first level and after its last one, while other bands are at work."""
        return max(0.0, self.total_us - self.busy_us - self.waiting_us)

    @property
    def idle_us(self) -> float:
        """Not within its levels."""
        return self.waiting_us + self.ramps_us

    def scaled(self, factor: float) -> BandTimes:
        """The same, each time so many times as long."""
        spans = tuple(Span(level, begin * factor, end * factor) for level, begin, end in self.spans)
        return BandTimes(self.place, spans, self.total_us * factor)


def check_bands(bands: Sequence[range], n_layers: int, alpha: int) -> tuple[range, ...]:
    """The bands as a tuple; `ValueError` unless they hold all layers in order and levels can overlap."""
    layers = [layer for band in bands for layer in band]
    if bands and (layers != list(range(n_layers)) or not all(bands)):
        raise ValueError(f"bands hold the layers 0..{n_layers - 1} in order, none is empty: {list(bands)}")
    if bands and not alpha:
        raise ValueError("bands need alpha above 0: levels of alpha = 0 run one layer after the other")
    return tuple(bands)


def goes_down(schedule: Schedule) -> bool:
    """Whether a band reads what a later one has made: then none runs ahead of another."""
    return any(
        schedule.band_of(layer - offset[1]) > schedule.band_of(layer)
        for offset in schedule.offsets
        for layer in schedule.readers(offset)
    )


def planned(schedule: Schedule, times: Sequence[float] | None = None) -> tuple[BandTimes, ...]:
    """When the levels of each band run if each band is `schedule.lag` levels behind the one before.

    In each slot every band runs one level; the slot is as long as the longest of them.

    Args:
        times: microseconds of each level, the same in each band.
    """
    lag = schedule.lag
    durations = list(times) if times is not None else [PLANNED_US] * schedule.n_levels
    slots: dict[int, float] = {}
    for p in range(len(schedule.bands)):
        for level in schedule.band_grid(p).levels:
            slots[level + lag * p] = max(durations[level], slots.get(level + lag * p, 0.0))
    begins, total = {}, 0.0
    for slot in sorted(slots):
        begins[slot] = total
        total += slots[slot]
    found = []
    for p in range(len(schedule.bands)):
        starts = [(level, begins[level + lag * p]) for level in schedule.band_grid(p).levels]
        spans = tuple(Span(level, start, start + durations[level]) for level, start in starts)
        found.append(BandTimes("", spans, total))
    return tuple(found)


def words(layers: range) -> str:
    """`layers 0..7`, `layer 3`."""
    return f"layers {layers[0]}..{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
