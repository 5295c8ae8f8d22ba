"""The viewer: a schedule, its cells, the pipeline, the code and a profile as one HTML file.

view_model.py   what is shown, as frozen data
render.py       data and page -> one file
viewer.html, viewer.css
model.js        the data, state, words and small helpers
grid.js         the layer x segment grid and the strip of levels
cell.js         the panel of one cell
graph.js        dependences and carries
tabs.js         pipeline, code, time
main.js         keys, player, start
"""

from __future__ import annotations

from rmtcompile.viewer.render import render
from rmtcompile.viewer.view_model import (
    CellView,
    OpView,
    PassView,
    ProfileView,
    ValueView,
    ViewModel,
    WitnessView,
)

__all__ = ["CellView", "OpView", "PassView", "ProfileView", "ValueView", "ViewModel", "WitnessView", "render"]
