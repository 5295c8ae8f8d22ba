"""The schedule: which cells run together, as data that prints, draws, exports and checks itself.

paths.py    offsets, longest paths
skew.py     skew, blocking offsets
grid.py     Grid, Phases: the one definition of levels
parts.py    Carry, Window
data.py     Schedule
bands.py    Span, BandTimes: layers on devices of their own, and when their levels run
memory.py   bytes that are alive on each level
text.py     str(schedule)
svg.py      the grid as a picture;  html.py  the notebook form
serial.py   JSON and its schema
graph.py    networkx and Graphviz
trace.py    trace events for Perfetto
files.py    save(path), by suffix
"""

from __future__ import annotations

from rmtcompile.schedule.bands import BandTimes, Span
from rmtcompile.schedule.data import Schedule
from rmtcompile.schedule.grid import Grid, Phases
from rmtcompile.schedule.parts import Carry, Operation, Window, short_type
from rmtcompile.schedule.paths import Cell, Offset, longest_path_levels
from rmtcompile.schedule.skew import blocking, blocking_reason, skew

__all__ = [
    "BandTimes",
    "Carry",
    "Cell",
    "Grid",
    "Offset",
    "Operation",
    "Phases",
    "Schedule",
    "Span",
    "Window",
    "blocking",
    "blocking_reason",
    "longest_path_levels",
    "short_type",
    "skew",
]
