"""Packed: several texts in one wavefront, the segments of each right behind the last of the one before.

    text       0 0 0 0 1 1 2 2 2           segments, counted in each text: 0 1 2 3 0 1 0 1 2
    level 4    layers 3 2 1 0  run the cells  (1, 3) (2, 2) (3, 1) of text 0  and  (0, 0) of text 1

Each text is a run of its own: its inputs, what is the same for all of its segments, what is kept for readers
outside the cells. The lanes are common to all. A program writes what the first cells of a text read into
their lanes before they run, or masks what stands there, so a text finds nothing of the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.program import Program
from rmtcompile.passes.emit.carried import Carried
from rmtcompile.runtime.base import Engine, Outputs
from rmtcompile.runtime.contexts import plain_tensors
from rmtcompile.runtime.crossing import Crossing, Key
from rmtcompile.runtime.run import Run, Window, move
from rmtcompile.runtime.storage import LaneStore, as_slice

if TYPE_CHECKING:
    from rmtcompile.runtime.execute import Executor


class Snapshot:
    """What a text has left before one of its segments, for texts that begin alike.

    Args:
        carried: what its program carries over a border.
        border: the segment.

    Attributes:
        values: what later segments read; by name and segment.
        lists: by tap, the values of earlier segments that are collected over all.
        is_ready: whether all earlier segments have left the last layer.
    """

    def __init__(self, carried: Carried, border: int) -> None:
        self.carried = carried
        self.border = border
        self.values: Mapping[Key, torch.Tensor] = {}
        self.lists: dict[str, dict[int, Any]] = {}
        self.is_ready = False
        self._crossing: Crossing | None = None

    def begin(self, after: Snapshot | None) -> None:
        """The text's run begins, behind what another one has left."""
        first, values = (after.border, after.values) if after is not None else (0, {})
        self._crossing = Crossing(self.carried, first, self.border, values, owned=False)

    def keep_cells(self, window: Window, rows: range, outputs: Outputs) -> None:
        """See what cells of the text have given."""
        if self._crossing is not None:
            part = slice(rows.start, rows.stop)
            given = {name: value[part] for name, value in outputs.items()}
            self._crossing.keep_cells(window.group, window.layers[part], window.segments[part], given)

    def keep_tap(self, tap: str, segment: int, value: Any) -> None:
        """See what is kept outside the cells."""
        if self._crossing is not None:
            self._crossing.keep_tap(tap, segment, value)

    def close(self, member: Member) -> None:
        """All earlier segments have left the last layer."""
        assert self._crossing is not None
        self.values, self._crossing, self.is_ready = self._crossing.left(), None, True
        for name, store in member.taps.items():
            if store.keep is None or store.pinned:
                self.lists[name] = {s: value for s, value in store.values.items() if s < self.border}


class Member(Run):
    """One text of a pack.

    Args:
        functions: the emitted module's namespace.
        lanes: those of the pack.
        after: what another text that begins alike has left; only what follows runs.
        snapshots: what is to be kept for others.

    Attributes:
        name: what the caller calls it.
        start: the level of the pack that is level 0 of this run.
        error: what it has raised; its cells do not run any more.
        final: what stands for its result, where it is not to run again by itself.
    """

    def __init__(
        self,
        name: Any,
        program: Program,
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        engine: Engine,
        functions: Mapping[str, Any],
        lanes: Mapping[str, LaneStore],
        after: Snapshot | None = None,
        snapshots: Sequence[Snapshot] = (),
    ) -> None:
        crossing = None
        if after is not None:
            given = after.carried, after.border, after.border, after.values
            crossing = Crossing(*given, owned=False, is_whole=True)
        given_to_all = program, segments, inputs, leaves, weights, engine
        super().__init__(*given_to_all, functional=False, crossing=crossing, lanes=lanes)
        for tap, values in after.lists.items() if after is not None else ():
            self.taps[tap].values.update(values)
        self.snapshots = list(snapshots)
        for snapshot in snapshots:
            snapshot.begin(after)
        self.name = name
        self.functions = functions
        self.start = 0
        self.error: Exception | None = None
        self.final: Exception | None = None
        self.outputs: tuple[Any, ...] = ()
        self.is_done = False

    def keep_tap(self, name: str, segment: int, value: Any) -> None:
        """See `BaseRun`."""
        super().keep_tap(name, segment, value)
        for snapshot in self.snapshots:
            snapshot.keep_tap(name, segment, value)

    def begin(self, level: int) -> None:
        """What comes before a level's cells."""
        if level == self.grid.levels.start:
            self.functions["setup"](self)
        self.take(level)
        if self.crossing is not None:
            self.resume(level, self.crossing)
        if (segment := self.entering(level)) is not None:
            self.functions["enter"](self, segment)
        self.functions["fill"](self, level)

    def finish(self, level: int) -> None:
        """What comes after them."""
        if (segment := self.leaving(level)) is not None:
            self.functions["leave"](self, segment)
            self.rest(self.functions["leave_rest"], segment)
            for snapshot in self.snapshots:
                if segment == snapshot.border - 1:
                    snapshot.close(self)
        if level == self.grid.levels.stop - 1:
            self.end()

    def take(self, level: int) -> None:
        """What others have made for this level is put where it is read."""

    def end(self) -> None:
        """What comes after the last level."""
        self.outputs, self.is_done = self.functions["outputs"](self), True


@dataclass(frozen=True)
class _Call:
    """A window with cells of several texts.

    Attributes:
        window: layers ascending; each row's segment is counted in its own text.
        owner: the run that calls the cells.
        rows: of each text, which rows are its cells.
    """

    window: Window
    owner: Member
    rows: tuple[tuple[Member, range], ...]


class Pack:
    """Texts that run in one wavefront.

    Args:
        program: one whose groups and lanes, but for open ones, are those of all texts.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        kept = [lane for lane in program.lanes if lane.name not in program.open_lanes]
        self.lanes = {lane.name: LaneStore(lane, functional=False) for lane in kept}
        self.members: list[Member] = []
        self.level = 0
        self.segments = 0

    def text(
        self,
        executor: Executor,
        name: Any,
        segments: int,
        inputs: list[torch.Tensor],
        after: Snapshot | None = None,
        snapshots: Sequence[Snapshot] = (),
    ) -> Member:
        """A run of an executor's program over a text, on the lanes of the pack, which is not recorded; see
        `Member`."""
        executor.compile_forms(segments, inputs)
        executor.engine.mixes_often = True
        with plain_tensors():
            leaves = executor.held()
            weights, functions = executor.stacks.current(leaves), executor.compiled.namespace
            given = executor.named(inputs), leaves, weights, executor.engine, functions, self.lanes
            return Member(name, executor.program, segments, *given, after, snapshots)

    def admit(self, member: Member) -> None:
        """Put a text behind those that have entered."""
        member.start = self.place(range(member.grid.first, member.segments))
        self.members.append(member)

    def place(self, segments: range) -> int:
        """The level that is level 0 of the next text.

        Args:
            segments: those of the text that run.
        """
        skew = self.program.alpha
        self.segments = max(self.segments, -(-self.level // skew))
        start = skew * (self.segments - segments.start)
        self.segments += len(segments)
        return start

    @property
    def has_room(self) -> bool:
        """Whether the next level has no segment to enter."""
        return self.level >= self.program.alpha * self.segments

    def drain(self) -> None:
        """No text enters any more."""

    def step(self) -> list[Member]:
        """Run one level; gives the texts that have ended with it, or have failed.

        Raises:
            Exception: cells have failed, which may be those of any text.
        """
        each = self._each(Member.begin)
        windows = list(_windows(each, self.level, self.program))
        moved = [one for member in each for one in member.moves(self.level - member.start)]
        results: list[Outputs] = [
            one.owner.functions["CELLS"][one.window.group](one.owner, one.window) for one in windows
        ]
        move(moved)
        for one, outputs in zip(windows, results, strict=True):
            one.owner.store(one.window, outputs)
            for member, rows in one.rows:
                member.keep_cells(one.window, outputs, rows, one.owner.stored)
                for snapshot in member.snapshots:
                    snapshot.keep_cells(one.window, rows, outputs)
        stores = {id(store): store for member in each for store in member.lanes.values()}
        for store in {**stores, **{id(store): store for store in self.lanes.values()}}.values():
            store.turn()
        for member in each:
            member.stored.clear()
        self._each(Member.finish)
        self.level += 1
        ended = [member for member in self.members if member.is_done or member.error is not None]
        self.members = [member for member in self.members if member not in ended]
        return ended

    def _each(self, function: Callable[[Member, int], None]) -> list[Member]:
        """The texts with cells on this level for which the function has not failed."""
        for member in self.members:
            if self._runs(member):
                try:
                    function(member, self.level - member.start)
                except Exception as error:  # of one text, which the others do not see
                    member.error = error
        return [member for member in self.members if self._runs(member)]

    def _runs(self, member: Member) -> bool:
        return member.error is None and self.level - member.start >= member.grid.levels.start


def _windows(members: Sequence[Member], level: int, program: Program) -> Iterator[_Call]:
    """The cells of a level: those of one group together, as far as their layers are evenly spaced; those of
    segments whose shape is the text's own apart."""
    for group in program.groups:
        found = [
            (layer, segment, number, member)
            for member in members
            for window in member.windows(level - member.start)
            if window.group == group.name
            for layer, segment, number in zip(window.layers, window.segments, window.classes, strict=True)
        ]
        is_own = max(group.classes) < 0  # counted from the end: shapes may be those of the text's rest
        while found:
            found.sort(key=lambda cell: cell[0])
            taken = found[:1]
            for cell in found[1:]:
                ranks = [group.layers.index(layer) for layer, *_ in (*taken, cell)]
                if as_slice(ranks) is None or (is_own and cell[3] is not taken[0][3]):
                    break
                taken.append(cell)
            found = found[len(taken) :]
            layers, segments, numbers, owners = zip(*taken, strict=True)
            rows = tuple((owner, _rows_of(owner, owners)) for owner in dict.fromkeys(owners))
            yield _Call(Window(group.name, layers, segments, numbers), owners[0], rows)


def _rows_of(owner: Member, owners: Sequence[Member]) -> range:
    """Where a text's cells stand; those of one text are neighbours, since its layers follow each other."""
    mine = [row for row, other in enumerate(owners) if other is owner]
    return range(mine[0], mine[-1] + 1)


def version(tensors: Iterable[torch.Tensor]) -> int:
    """Another number once one of the tensors was written; those of inference mode do not tell."""
    return sum(tensor._version for tensor in tensors if not tensor.is_inference())


def written_over(evidence: Sequence[str] = ()) -> UnsupportedError:
    """What is told of a text whose arguments were written while it was on its way."""
    return UnsupportedError(
        "a document was written over while it was on its way",
        evidence,
        "pass tensors that stay as they are until the result is there",
    )


def go_together(one: Executor, other: Executor) -> bool:
    """Whether runs of both may stand in one pack: of one code, alike but for their last segments."""
    if one is other:
        return True
    return one.stacks is other.stacks and other.replays.are_of(one.compiled.sizes)


__all__ = ["Member", "Pack", "Snapshot", "go_together", "version", "written_over"]
