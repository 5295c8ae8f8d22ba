"""What every run of an emitted program has: its grid, its arguments, what is kept of it, who looks on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch.utils import _pytree as pytree

from rmtcompile.ir.program import Lane, Program
from rmtcompile.runtime.crossing import Crossing
from rmtcompile.runtime.gradients import is_transformed
from rmtcompile.runtime.lookups import Divided, Embedded, Lookup
from rmtcompile.runtime.storage import TapStore, Target, dense
from rmtcompile.runtime.unread import Dependents, farthest, passing

Outputs = dict[str, torch.Tensor]
Level = Callable[[Any, int], None]
"""An emitted function: runs one level of a run."""

OnLevel = Callable[[Any, int, Level], None]
"""Called with (run, level, step) in place of step(run, level)."""

OnValue = Callable[[str, int, int, int, Any], None]
"""Called with (kind of region, segment, layer, place in the region's body, value) for what leaves a region;
-1 where a region has no segment or no layer."""


class Engine(Protocol):
    """How the cells of a run are executed: which functions, which storage."""

    @property
    def is_compiled(self) -> bool: ...
    def call(
        self,
        function: Callable[..., Any],
        width: int,
        args: tuple[torch.Tensor, ...],
        targets: Sequence[Target | None],
    ) -> tuple[torch.Tensor, ...]: ...
    def likened(
        self, function: Callable[..., Any], args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]: ...
    def region(
        self, function: Callable[..., Any], args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]: ...
    def divided(self, function: Callable[..., Any]) -> Divided | None: ...
    def dependents(self, function: Callable[..., Any], args: Sequence[Any]) -> Dependents | None: ...
    def prefers_mixed(self, width: int) -> bool: ...
    def mask(self, bits: tuple[bool, ...]) -> torch.Tensor: ...
    def buffers(self, lane: Lane) -> tuple[torch.Tensor, torch.Tensor] | None: ...


class BaseRun:
    """One run over S segments, as far as it is the same for every skew.

    Attributes:
        segments: S.
        first: the segment with which this run's inputs and its lists over segments begin.
        grid: its cells and their levels.
        inputs: tensor arguments of the forward, by placeholder name.
        leaves: parameters, buffers and constants by name.
        engine: executes the cells.
        init: what is the same for all segments, by its place in the body of init.
        stacked: values that are the same for all segments, stacked by layer.
        taps: values that are read outside the cells.
        on_level: called with (run, level, step) in place of step(run, level), if set.
        on_value: called with each value that leaves a region, in the order of the run, if set.
        crossing: what an earlier run has left, and what this one is to leave; None where neither is wanted.
        remainder: how much the last segment has of a whole one, where its cells run padded: an int64 tensor
            of no dims.
    """

    remainder: torch.Tensor | None = None

    def __init__(
        self,
        program: Program,
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
        engine: Engine,
        on_level: OnLevel | None = None,
        on_value: OnValue | None = None,
        crossing: Crossing | None = None,
    ) -> None:
        self.program = program
        self.segments = segments
        start = crossing.first if crossing is not None else 0
        self.first = 0 if crossing is not None and crossing.is_whole else start
        self.grid = program.grid(segments, start)
        self.crossing = crossing
        self.inputs = inputs
        self.leaves = leaves
        self.engine = engine
        self.on_level = on_level
        self.on_value = on_value
        self.init: dict[int, Any] = {}
        self.stacked: dict[str, torch.Tensor] = {}
        self.taps = {tap.name: TapStore(tap.keep, self.first, tap.pinned) for tap in program.taps}
        self._cell_taps = [tap for tap in program.taps if tap.value.kind == "cell"]
        self._handed: dict[tuple[str, int], tuple[Any, ...]] = {}
        self._embedded: dict[int, Embedded] = {}  # by the weight, which is one of the leaves
        for name, segment, value in crossing.taps() if crossing is not None else ():
            self.taps[name].put(segment, value)

    def level(self, level: int, step: Level) -> None:
        """Run one level by the emitted function `step`."""
        step = step if self.crossing is None else _resuming(step)
        if self.on_level is None:
            step(self, level)
        else:
            self.on_level(self, level, step)

    def is_last(self, level: int) -> bool:
        """Whether no other level follows that runs on the same segments."""
        return level == self.grid.levels.stop - 1

    def copied(self) -> Self:
        """This run as it is now, with values of its own places: what runs on does not change it. Runs with
        gradients only; nobody looks on."""
        other = copy.copy(self)
        other.on_level = other.on_value = None
        other.taps = {name: store.copied() for name, store in self.taps.items()}
        other._handed = dict(self._handed)
        other.crossing = self.crossing.copied() if self.crossing is not None else None
        return other

    def resume(self, level: int, crossing: Crossing) -> None:
        """Put what an earlier run has left where the cells of a level read it."""

    def class_of(self, layer: int, segment: int) -> int:
        """The class of a cell."""
        return int(self.program.rolled.classes[("cell", layer)].of(segment, self.segments))

    def set_init(self, indices: Sequence[int], values: Sequence[Any]) -> None:
        """Keep what is the same for all segments."""
        if self.on_value is not None:
            for index, value in zip(indices, values, strict=True):
                self.on_value("init", -1, -1, index, value)
        if self.engine.is_compiled:
            values = pytree.tree_map_only(torch.Tensor, dense, list(values))
        self.init = dict(zip(indices, values, strict=True))

    def parts(self, function: Callable[[Any, int], tuple[Any, ...]], segment: int) -> tuple[Any, ...]:
        """What a segment reads of values that hold all segments."""
        return function(self, segment)

    def region(
        self, function: Callable[..., tuple[torch.Tensor, ...]], *args: Any
    ) -> tuple[torch.Tensor, ...]:
        """Run the body of a prologue or an epilogue, in the form that the engine has compiled. With gradients
        rows of embeddings are looked up before it."""
        if torch.is_grad_enabled() and _any_requires_grad(args) and not is_transformed():
            found = self.engine.divided(function)
            if found is not None and any(args[lookup.weight].requires_grad for lookup in found.lookups):
                rows = (self._rows_of(lookup, args) for lookup in found.lookups)
                function, args = found.rest, (*args, *rows)
        return self.passing(function, args, lambda given: self.engine.region(function, given), True)

    def passing(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        call: Callable[[tuple[Any, ...]], tuple[torch.Tensor, ...]],
        always: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """The results of a cell or a body; no gradients are passed on of what nobody reads.

        Args:
            always: in a run of any length, and not only in a short one.
        """
        records = torch.is_grad_enabled() and _any_requires_grad(args) and not is_transformed()
        if records and (always or self.is_short):
            of = self.engine.dependents(function, args)
            if of is not None:
                return passing(call, args, of)
        return call(args)

    @cached_property
    def is_short(self) -> bool:
        """Whether the last segments are all there are, of those whose memories nobody reads."""
        return self.segments - self.first <= farthest(self.program)

    def _rows_of(self, lookup: Lookup, args: Sequence[torch.Tensor]) -> torch.Tensor:
        weight = args[lookup.weight]
        if id(weight) not in self._embedded:
            self._embedded[id(weight)] = Embedded(weight)
        return self._embedded[id(weight)].rows(args[lookup.indices], lookup.padding_idx)

    def keep(self, names: Sequence[str], segment: int, values: Sequence[Any]) -> None:
        """Keep a prologue's or epilogue's results for their readers."""
        for name, value in zip(names, values, strict=True):
            if self.on_value is not None:
                self._show_kept(name, segment, value)
            self.keep_tap(name, segment, value)

    def keep_tap(self, name: str, segment: int, value: Any) -> None:
        """Keep one value for its readers, those of a later run among them."""
        self.taps[name].put(segment, value)
        if self.crossing is not None:
            self.crossing.keep_tap(name, segment, value)

    def _show_kept(self, name: str, segment: int, value: Any) -> None:
        kept = next(tap.value for tap in self.program.taps if tap.name == name)
        number = self.program.rolled.classes[(kept.kind, -1)].of(segment, self.segments)
        index = dict(kept.nodes).get(number)
        if index is not None and self.on_value is not None:
            self.on_value(kept.kind, segment, -1, index, value)

    def show_cells(self, name: str, cells: Iterable[tuple[int, int, int]], outputs: Outputs) -> None:
        """Show what cells of a group have given, if somebody looks on.

        Args:
            cells: (layer, segment, class) of each row of the outputs.
        """
        if self.on_value is None:
            return
        group = next(group for group in self.program.groups if group.name == name)
        for row, (layer, segment, number) in enumerate(cells):
            for output, nodes in zip(group.outputs, group.values, strict=True):
                index = dict(nodes).get(number)
                if index is not None:
                    self.on_value("cell", segment, layer, index, outputs[output][row])

    def hand(self, name: str, segment: int, values: tuple[Any, ...]) -> None:
        """Keep what a body has made for the operations that follow it."""
        self._handed[name, segment] = values

    def handed(self, name: str, segment: int) -> tuple[Any, ...]:
        """What `hand` has kept, once."""
        return self._handed.pop((name, segment))

    def rest(self, function: Callable[[Any, int], None], segment: int) -> None:
        """Do what follows the body of a segment's prologue or epilogue."""
        function(self, segment)

    def mask(self, classes: Sequence[int], window: Any) -> torch.Tensor:
        """Whether each cell of the window belongs to one of the classes, bool [n]."""
        return self.engine.mask(tuple(c in classes for c in window.classes))


def _resuming(step: Level) -> Level:
    """A level that finds what an earlier run has left."""

    def resumed(run: Any, level: int) -> None:
        run.resume(level, run.crossing)
        step(run, level)

    return resumed


def _any_requires_grad(args: Sequence[Any]) -> bool:
    """Whether a tensor among arguments, or in a list of one a segment, requires gradients."""
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in pytree.tree_leaves(args))
