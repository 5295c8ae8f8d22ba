"""Taps: what is kept of the cells and regions, one value a segment, until it is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rmtcompile.ir.program import Each, Source, Tap, Value
from rmtcompile.passes.grid.lane_allocation.drafts import GroupDraft
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, PROLOGUE
from rmtcompile.passes.grid.reroll import LiveIn


class Taps:
    """The values that are kept, each once, whoever reads them.

    Attributes:
        window: how many segments a value lives beside the way it has to go.
        taps: by region, layer and operation.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.taps: dict[Any, Tap] = {}

    def keep_live_in(self, live_in: LiveIn, reader: str, number: int) -> None:
        """Keep what the class `number` of a region reads; a class of the last segments reads those only."""
        for source in live_in.early.values():
            self.keep(source, reader)
        if isinstance(live_in.steady, Each):
            each = live_in.steady
            self._add(each.kind, each.layer, each.nodes, ("each",), None)
        elif live_in.steady is not None:
            last = number < 0 and live_in.steady.relative
            when = ("end", live_in.steady.segment - 1 - number) if last else ("each",)
            self.keep(live_in.steady, reader, when)

    def keep_result(self, output: Source | Each) -> None:
        """Keep what the forward returns or leaves behind."""
        if isinstance(output, Each):
            self._add(output.kind, output.layer, output.nodes, ("each",), None)
        else:
            self.keep(output, "end", ("end", output.segment))

    def keep(self, source: Source, reader: str, when: tuple[Any, ...] = ("each",)) -> None:
        """Keep a value for a region, an entry of a lane, or the end."""
        if source.kind not in (PROLOGUE, CELL, EPILOGUE):
            return
        if not source.relative:
            pinned = frozenset((source.segment,))
            self._add(source.kind, source.layer, source.nodes, ("at", source.segment), 0, pinned)
        else:
            keep = source.segment + (0 if reader == "end" else self.window)
            self._add(source.kind, source.layer, source.nodes, when, keep)

    def _add(
        self,
        kind: str,
        layer: int,
        nodes: tuple[tuple[int, int], ...],
        when: tuple[Any, ...],
        keep: int | None,
        pinned: frozenset[int] = frozenset(),
    ) -> None:
        key = (kind, layer, nodes)
        if key in self.taps:
            old = self.taps[key]
            when = when if when == old.when else ("each",)
            keep = None if keep is None or old.keep is None else max(keep, old.keep)
            pinned |= old.pinned
            name = old.name
        else:
            name = f"{kind}{layer}_{len(self.taps)}" if kind == CELL else f"{kind}_{len(self.taps)}"
        self.taps[key] = Tap(name, Value(kind, layer, nodes), (), when, keep, pinned)

    def ask(self, draft: GroupDraft) -> None:
        """Ask a group for the outputs that are kept of its cells."""
        for key, tap in list(self.taps.items()):
            if tap.value.kind == CELL and tap.value.layer in draft.layers:
                output = draft.output(dict(tap.value.nodes))
                if output is not None:
                    outputs = (*tap.group_outputs, (draft.name, output))
                    self.taps[key] = replace(tap, group_outputs=outputs)
