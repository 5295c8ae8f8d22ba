"""The path of a file that was written, which shows the file in a notebook."""

from __future__ import annotations

from html import escape
from pathlib import Path

_LARGEST = 20_000_000


class Shown(type(Path())):  # type: ignore[misc]
    """A path like any other; a notebook shows the page or the picture behind it."""

    def __repr__(self) -> str:
        return f"{type(Path()).__name__}({self.as_posix()!r})"

    def __reduce__(self) -> tuple[type[Path], tuple[str, ...]]:
        return Path, (str(self),)

    def _repr_html_(self) -> str | None:
        """The page in a frame of its own, or a link to a very large one; None for other files."""
        suffix = self.suffix.lower()
        if suffix not in (".html", ".htm", ".svg") or not self.is_file():
            return None
        if self.stat().st_size > _LARGEST:
            return f'<a href="{escape(self.as_posix())}">{escape(self.as_posix())}</a>'
        text = self.read_text(encoding="utf-8")
        if suffix == ".svg":
            return str(text)
        return (
            f'<iframe srcdoc="{escape(text)}" title="{escape(self.name)}" sandbox="allow-scripts" '
            'style="width:100%;height:720px;border:1px solid #8884;border-radius:8px"></iframe>'
        )
