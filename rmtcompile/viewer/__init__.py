"""The viewer: a schedule, its cells, the pipeline, the code and a profile as one HTML file.

view_model.py   what is shown, as frozen data
render.py       data and page -> one file
explorer.py     the same graphs for Google's Model Explorer
viewer.html, viewer.css
model.js        the data, state, words and small helpers
grid.js         the layer x segment grid and the strip of levels
cell.js         the panel of one cell
bands.js        bands of layers: borders in the grid, and their rows in the timeline
graph.js        dependences and carries
diff.js         line differences
passes.js       the passes, their texts and the differences of these
time.js         where the time goes;  timeline.js  the levels, to zoom into
memory.js       bytes alive by level, levels and bytes by number of segments
tabs.js         the code, the explanation, and the tabs
links.js        the state of the page in its address
main.js         keys, player, start
"""

from __future__ import annotations

from rmtcompile.viewer.explorer import to_explorer
from rmtcompile.viewer.render import render
from rmtcompile.viewer.view_model import (
    CellView,
    FunctionView,
    OpView,
    PassView,
    ProfileView,
    ValueView,
    ViewModel,
    WitnessView,
)

__all__ = [
    "CellView",
    "FunctionView",
    "OpView",
    "PassView",
    "ProfileView",
    "ValueView",
    "ViewModel",
    "WitnessView",
    "render",
    "to_explorer",
]
