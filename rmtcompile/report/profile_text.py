"""A `Profile` as text, and as HTML for notebooks."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from rmtcompile.schedule.bands import words

if TYPE_CHECKING:
    from rmtcompile.report.profiled import Profile


_BAND_HEADS = (
    "band", "where", "layers", "busy ms", "busy", "waits ms", "ramps ms", "total ms", "behind ms",
)  # fmt: skip


def to_text(found: Profile) -> str:
    """The table as text, without a final newline."""
    return "\n".join(_table(found))


def _table(found: Profile) -> Iterator[str]:
    schedule, used = found.schedule, found.utilisation
    beside = f"the model as it is {found.sequential_us / 1e3:.2f} ms: {found.speedup:.2f} x as fast"
    beside = beside if found.sequential_us else "the model as it is was not run in the host's memory"
    yield f"profile   {found.total_us / 1e3:.2f} ms a call, {beside}"
    yield f"          {found.device}, median of {found.repeats}"
    if found.backward_total_us:
        by_level = ", level by level from the last one" * bool(found.backward_us)
        yield f"          backward {found.backward_total_us / 1e3:.2f} ms{by_level}"
    yield ""
    if found.bands:
        yield from _band_lines(found)
        yield ""
    if not found.level_us:
        yield "  the program does not run level by level, so levels have no times of their own"
        yield from _kind_lines(found)
        return
    more = "  of peak" * bool(used) + "  backward ms" * bool(found.backward_us)
    yield f"  {'level':>5}  {'phase':<9}  {'cells':>5}  {'ms':>9}  {'us a cell':>9}{more}"
    phases = schedule.phases
    for level, us in enumerate(found.level_us):
        width = schedule.widths[level]
        share = f"  {used[level]:>7.1%}" if used else ""
        share += f"  {found.backward_us[level] / 1e3:>11.3f}" if found.backward_us else ""
        yield f"  {level:>5}  {phases.of(level):<9}  {width:>5}  {us / 1e3:>9.3f}  {us / width:>9.1f}{share}"
    yield ""
    whole = sum(found.level_us) + found.outside_us
    for name, levels in zip(("ramp-up", "steady", "ramp-down"), phases, strict=True):
        if levels:
            us = sum(found.level_us[level] for level in levels)
            yield f"  {name:<22} {us / 1e3:>9.3f} ms  {us / whole:>6.1%}"
    yield f"  {'outside of levels':<22} {found.outside_us / 1e3:>9.3f} ms  {found.outside_us / whole:>6.1%}"
    yield from _kind_lines(found)


def _band_lines(found: Profile) -> Iterator[str]:
    wide = max(len("where"), *(len(band.place) for band in found.bands))
    for name, place, layers, *numbers in [_BAND_HEADS, *_bands(found)]:
        row = "  ".join(f"{number:>9}" for number in numbers)
        yield f"  {name:>5}  {place:<{wide}}  {layers:<8}  {row}"
    for note in _notes(found):
        yield f"  {note}"


def _bands(found: Profile) -> Iterator[tuple[str, ...]]:
    """A row a band: where, its layers, what its time was spent on, and how long after those of the band
    before its levels begin, in the middle."""
    behind = _behind(found)
    for p, band in enumerate(found.bands):
        layers = words(found.schedule.bands[p]).partition(" ")[2]
        times = (band.waiting_us, band.ramps_us, band.total_us, *behind[p])
        busy = f"{band.busy_us / 1e3:.3f}", f"{band.busy_us / band.total_us:.1%}"
        yield (str(p), band.place, layers, *busy, *(f"{us / 1e3:.3f}" for us in times))


def _behind(found: Profile) -> list[tuple[float, ...]]:
    """By how much the levels of each band begin after the same ones of the band before, in the middle."""
    rows: list[tuple[float, ...]] = [()]
    for low, high in pairwise(found.bands):
        begins = {span.level: span.begin for span in low.spans}
        lags = [span.begin - begins[span.level] for span in high.spans if span.level in begins]
        rows.append((statistics.median(lags),) if lags else ())
    return rows


def _notes(found: Profile) -> Iterator[str]:
    """What has to be known to read the times of bands."""
    yield f"of a call whose levels are launched one by one, {found.launched_us / 1e3:.2f} ms in all"
    yield "bands wait for what others send, for a device that they share, and for the host that launches"
    places = [band.place for band in found.bands]
    shared = [place for place in dict.fromkeys(places) if places.count(place) > 1]
    if shared:
        yield f"bands share {', '.join(shared)}: their levels come one after the other"
    if found.exact_us:
        yield f"clocks of two bands may be {found.exact_us / 1e3:.3f} ms apart"


def _kind_lines(found: Profile) -> Iterator[str]:
    total = sum(found.kind_us.values())
    for name, us in sorted(found.kind_us.items(), key=lambda item: -item[1]):
        yield f"  {name:<22} {us / 1e3:>9.3f} ms  {us / total:>6.1%}"


def to_html_fragment(found: Profile) -> str:
    """A table for a notebook cell, with the total above it: no script, no network."""
    total = f"<b>{found.total_us / 1e3:.2f} ms</b> a call"
    if found.sequential_us:
        total += (
            f", the model as it is {found.sequential_us / 1e3:.2f} ms: <b>{found.speedup:.2f} x as fast</b>"
        )
    total += f"<br>{escape(found.device)}, median of {found.repeats}"
    if found.backward_total_us:
        total += f"<br>backward <b>{found.backward_total_us / 1e3:.2f} ms</b>"
    tables = ""
    if found.bands:
        tables = _html_table(_BAND_HEADS, _bands(found)) + f"<p>{'<br>'.join(map(escape, _notes(found)))}</p>"
    tables += _html_table(("", "ms", "share"), _html_parts(found))
    if found.level_us:
        used = found.utilisation
        more = [*(["of peak"] if used else []), *(["backward ms"] if found.backward_us else [])]
        heads = ("level", "phase", "cells", "ms", "us a cell", *more)
        levels = _html_table(heads, _html_levels(found))
        tables += f"<details><summary>{len(found.level_us)} levels</summary>{levels}</details>"
    return f'<div style="overflow-x:auto;max-width:100%"><p>{total}</p>{tables}</div>'


def _html_parts(found: Profile) -> Iterator[tuple[str, ...]]:
    """Phases, then kinds of operations, each as a share of its own whole."""
    if found.level_us:
        whole = sum(found.level_us) + found.outside_us
        for name, levels in zip(("ramp-up", "steady", "ramp-down"), found.schedule.phases, strict=True):
            if levels:
                us = sum(found.level_us[level] for level in levels)
                yield name, f"{us / 1e3:.3f}", f"{us / whole:.1%}"
        yield "outside of levels", f"{found.outside_us / 1e3:.3f}", f"{found.outside_us / whole:.1%}"
    total = sum(found.kind_us.values())
    for name, us in sorted(found.kind_us.items(), key=lambda item: -item[1]):
        yield name, f"{us / 1e3:.3f}", f"{us / total:.1%}"


def _html_levels(found: Profile) -> Iterator[tuple[str, ...]]:
    used, phases = found.utilisation, found.schedule.phases
    for level, us in enumerate(found.level_us):
        width = found.schedule.widths[level]
        share = [f"{used[level]:.1%}"] if used else []
        share += [f"{found.backward_us[level] / 1e3:.3f}"] if found.backward_us else []
        yield (str(level), phases.of(level), str(width), f"{us / 1e3:.3f}", f"{us / width:.1f}", *share)


def _html_table(heads: Sequence[str], rows: Iterator[tuple[str, ...]]) -> str:
    left, right = 'style="text-align:left"', 'style="text-align:right"'

    def line(tag: str, cells: Sequence[str]) -> str:
        found = (
            f"<{tag} {left if any(c.isalpha() for c in cell) else right}>{escape(cell)}</{tag}>"
            for cell in cells
        )
        return f"<tr>{''.join(found)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', heads)}</thead><tbody>{body}</tbody></table>"
