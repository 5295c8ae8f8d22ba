"""What there is to look at in a program: schedule, code, reports, the viewer, times."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.dispatch.entries import Entry
from rmtcompile.errors import RMTCompileError
from rmtcompile.schedule import Schedule

if TYPE_CHECKING:
    from rmtcompile.optimized import Optimized
    from rmtcompile.report import Explanation, Profile


class Inspected:
    """What `Optimized` shows of its last call's program; reports are imported when they are asked for."""

    _last: tuple[Entry, int] | None
    _refused: str
    last_profile: Profile | None

    @property
    def _optimized(self) -> Optimized:
        return cast("Optimized", self)

    @property
    def compiled(self) -> Compiled:
        """The program of the last call."""
        return self._ran[0].compiled

    @property
    def schedule(self) -> Schedule:
        """The schedule of the last call."""
        from rmtcompile.report.plans import bands_of
        from rmtcompile.report.scheduled import schedule_of

        entry, count = self._ran
        return schedule_of(entry.compiled, count, bands=bands_of(entry.executor))

    @property
    def _ran(self) -> tuple[Entry, int]:
        """The program of the last call and its number of segments."""
        if self._last is None and self._refused:
            raise RMTCompileError(f"the model runs as it is, without a program: {self._refused}")
        if self._last is None:
            raise RMTCompileError("nothing is captured yet: call the optimized model once")
        return self._last

    @property
    def code(self) -> str:
        """The generated Python module that the last call ran."""
        return self.compiled.emitted.source

    def explain(self) -> Explanation:
        """What was found in the model, and why it runs as it does, for the last call."""
        from rmtcompile.report import explain_last

        return explain_last(self._optimized)

    def dump(self, folder: str | Path) -> list[Path]:
        """Write one numbered file a pass; the last one is the module that runs."""
        from rmtcompile.report import dump

        return dump(self._optimized, folder)

    def use(self, path: str | Path) -> None:
        """Run a dumped, perhaps edited, module in place of the generated one, in the last call's program."""
        from rmtcompile.report import use

        use(self._optimized, path)

    def view(self, path: str | Path, *, capture: bool = False) -> Path:
        """Write the viewer of the last call's program as one HTML file.

        Args:
            capture: capture the forward once more, so that the page has the texts of the first passes, too;
                their graphs are not kept.
        """
        from rmtcompile.report import save_view

        return save_view(self._optimized, path, capture=capture)

    def profile(self, *args: Any, **kwargs: Any) -> Profile:
        """Run the model and measure each level; later `view`s and `explain`s show the times.

        Where ranks run bands of the program, every rank has to call this, with the same arguments.
        """
        from rmtcompile.report import profile

        return profile(self._optimized, args, kwargs)


__all__ = ["Inspected"]
