"""The page: one template, one style sheet, a few scripts and the data, put into one file."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files

from rmtcompile.viewer.view_model import ViewModel, to_dict

# In the order in which they are joined; they share one scope.
_SCRIPTS = (
    "model.js", "links.js", "bands.js", "grid.js", "cell.js", "graph.js", "diff.js", "passes.js", "time.js",
    "timeline.js", "memory.js", "tabs.js", "main.js",
)  # fmt: skip


def render(view: ViewModel) -> str:
    """The viewer as one HTML file that needs no network."""
    folder = files("rmtcompile.viewer")
    script = "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS)
    parts = {
        "{{title}}": escape(view.title),
        "{{style}}": folder.joinpath("viewer.css").read_text(encoding="utf-8"),
        "{{data}}": _embedded(to_dict(view)),
        "{{script}}": f'(() => {{\n"use strict";\n{script}\n}})();',
    }
    page = folder.joinpath("viewer.html").read_text(encoding="utf-8")
    # Split once, so that nothing in the data can be taken for a placeholder.
    for name in parts:
        head, _, tail = page.partition(name)
        page = f"{head}\0{name}\0{tail}"
    return "".join(parts.get(piece, piece) for piece in page.split("\0"))


def _embedded(data: object) -> str:
    """JSON that may stand inside a script element: no `<`, so no end tag and no comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")
