"""Replays: what an executor has recorded as CUDA graphs, and how a run is put together of it.

    by blocks of levels     once, for runs of any length: head, steady blocks, tail       (recorded.py)
      with a varying end    the head and the steady blocks; the tail with padded cells      (padded.py), or
                            launched, while the device is at work on the others
    by whole runs           where levels cannot be recorded apart from their numbers: a length when it comes
                            again                                                         (graphs.py)
    by parts of texts       runs that go on: a part when one of its kind comes again      (recorded_part.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.errors import RecordingWarning, warn
from rmtcompile.ir.modes import autocast_as
from rmtcompile.runtime.block_recorder import BlockRecorder
from rmtcompile.runtime.block_run import Device
from rmtcompile.runtime.contexts import own_modes, same_numbers
from rmtcompile.runtime.crossing import Crossing
from rmtcompile.runtime.graphs import Recorder, Started, Workspaces
from rmtcompile.runtime.padded import PaddedBlocks, difference
from rmtcompile.runtime.recorded import Ending, RecordedBlocks
from rmtcompile.runtime.recorded_part import Outputs, PartRecorder
from rmtcompile.runtime.workspaces import no_workspaces, own_workspaces

if TYPE_CHECKING:
    from rmtcompile.runtime.execute import Executor


@dataclass
class _Shared:
    """What executors of one code share whose programs differ in the last segments only."""

    blocks: BlockRecorder | None = None
    has_failed: bool = False
    unpadded: str = ""  # why the last levels are launched


class Replays:
    """The recordings of one executor.

    Args:
        executor: whose runs they are.
        like: those of an executor of the same code at other sizes. Blocks are shared with it where these
            sizes are of the last segments alone; else these runs are recorded as whole ones.

    Attributes:
        are_shared: whether blocks, and the lanes that they work on, are those of `like`.
        ends_vary: whether the last segments depend on sizes that vary from run to run.
        whole: gives the same program with a last segment as long as the others, for padded cells.
    """

    def __init__(self, executor: Executor, like: Replays | None) -> None:
        self._executor = executor
        self._runs: Recorder | None = None
        self._parts: PartRecorder | None = None
        borders, sizes = executor.compiled.emitted.borders, executor.compiled.sizes
        self.are_shared = like is not None and not borders.obstacle and like.are_of(sizes)
        self.ends_vary = not borders.obstacle and not borders.sizes.issuperset(sizes)
        self._shared: _Shared = like._shared if like is not None and self.are_shared else _Shared()
        is_open = not borders.obstacle and executor.compiled.rolled.fixed is None
        is_open = is_open and executor.compiled.numbers is None  # each number is met once
        self._has_parts = is_open
        self._by_blocks = is_open and (like is None or self.are_shared)
        self.whole: Callable[[], Compiled] | None = None

    def are_of(self, sizes: Mapping[str, int]) -> bool:
        """Whether all but the last segments are the same at these sizes."""
        compiled = self._executor.compiled
        return all(sizes[name] == compiled.sizes[name] for name in compiled.emitted.borders.sizes)

    @property
    def blocks(self) -> BlockRecorder | None:
        """The recordings of blocks of levels, if there are any."""
        return self._shared.blocks

    def __str__(self) -> str:
        """How runs are recorded, in words."""
        kinds = self._parts.count if self._parts is not None else 0
        parts = f"; {kinds} kind{'s' * (kinds > 1)} of parts of texts are recorded, too" if kinds else ""
        return self._of_runs() + parts

    def _of_runs(self) -> str:
        if self._shared.has_failed:
            return "nothing is recorded as CUDA graphs, since that has failed; levels are launched one by one"
        if not self._by_blocks:
            borders = self._executor.compiled.emitted.borders
            why = borders.obstacle or "another program of the same code is recorded by blocks of levels"
            return f"a length is recorded as one CUDA graph when it comes again: {why}"
        if self.ends_vary and self.is_padded:
            return (
                "recorded as CUDA graphs by blocks of levels, for any length; cells of an incomplete last "
                "segment run at the size of a whole one"
            )
        if self.ends_vary:
            why = self._shared.unpadded or self._executor.compiled.emitted.padding.obstacle
            return (
                "recorded as CUDA graphs by blocks of levels, for any length; the last levels, and all of a "
                f"short text, are launched, since the last segment varies{why and f' ({why})'}"
            )
        return "recorded as CUDA graphs by blocks of levels, for any number of segments"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What is launched here runs after all that was launched on the same storage."""
        with ExitStack() as stack:
            for recorder in (self.blocks, self._runs, self._parts):
                if recorder is not None:
                    stack.enter_context(recorder.alone())
            yield

    def start(self, segments: int, inputs: list[torch.Tensor]) -> Started | None:
        """Start a run of this length, if what it needs is recorded."""
        started, executor = None, self._executor
        if self.blocks is not None and not executor.gets_form(segments):
            executor.has_seen(segments)
            ending = self._ending() if self.ends_vary else None
            with own_modes() if ending else autocast_as():
                started = self.blocks.replay(segments, executor.named(inputs), ending)
        if started is None and self._runs is not None:
            started = self._runs.replay(segments, inputs)
        return started

    def run(self, segments: int, inputs: list[torch.Tensor]) -> tuple[Any, ...]:
        """Run, from recordings as far as there are any; a length that is recorded as a whole is so when it
        comes again."""
        started = self.start(segments, inputs)
        if started is not None and started.is_current():
            outputs: tuple[Any, ...] = started.results()
            return outputs
        executor = self._executor
        is_launched = self._shared.has_failed or (self._by_blocks and self.ends_vary)
        if self._by_blocks and not self._shared.has_failed:
            self._block_recorder()  # its storage is theirs: they wait for each other
        if self._runs is None and not is_launched:
            program = executor.program
            self._runs = Recorder(executor.compiled.leaves, executor.replaced, program.n_layers)
        with self.alone():
            outputs = executor.launch(segments, inputs)
        levels = executor.program.grid(segments).n_levels
        if self._runs is not None and not is_launched and self._runs.wants(segments, levels):
            with same_numbers(executor.device):
                self._runs.record(segments, inputs, lambda ins, held: executor.launch(segments, ins, held))
        return outputs

    def advance(
        self, segments: int, inputs: list[torch.Tensor], crossing: Crossing, launch: Callable[[], Outputs]
    ) -> Outputs:
        """Run a part of a text, from a recording if there is one of its kind; a kind that comes again is
        recorded.

        Args:
            segments: all of the text so far.
            launch: runs the part level by level.
        """
        executor = self._executor
        if not self._has_parts or self._shared.has_failed:
            return launch()
        if self._by_blocks:
            self._block_recorder()  # its storage is theirs: they wait for each other
        if self._parts is None:
            compiled = executor.compiled
            self._parts = PartRecorder(
                executor.program, compiled.emitted.borders, compiled.namespace, executor.engine,
                compiled.leaves, executor.replaced, executor.stacks.current,
            )  # fmt: skip
        recorder, named = self._parts, executor.named(inputs)
        kind = recorder.kind(segments, named, crossing)
        with self.alone(), own_modes():
            outputs = recorder.replay(kind, segments, named, crossing)
            if outputs is not None:
                return outputs
            outputs = launch()
        if recorder.wants(kind, outputs):
            try:
                with own_modes(), same_numbers(executor.device):
                    recorder.record(kind, segments, named, crossing, self._workspaces)
            except RuntimeError as error:  # the run itself was right: what follows runs as it did
                self._has_parts, self._parts = False, None
                said = str(error).partition("\n")[0]
                warn(f"parts of texts are not recorded as CUDA graphs: {said}", RecordingWarning)
        return outputs

    @property
    def _workspaces(self) -> Workspaces:
        """How products are recorded where it was measured on blocks of levels."""
        seconds = self.measured
        return no_workspaces if seconds and seconds["without"] < seconds["with"] else own_workspaces

    @property
    def wants(self) -> bool:
        """Whether there is anything to record that runs of any length need."""
        if not self._by_blocks or self._shared.has_failed:
            return False
        recorder = self._block_recorder()
        return recorder.wants or (self.ends_vary and self._can_pad and recorder.wants_padded)

    def record(self, inputs: list[torch.Tensor]) -> None:
        """Record what `wants` says."""
        executor, recorder = self._executor, self._block_recorder()
        try:
            if recorder.wants:
                recorder.prepare(self._make_blocks, lambda n: executor.named(executor.resized(n, inputs)))
        except RuntimeError as error:  # the run itself was right: what follows runs as it did
            self._shared.has_failed, self._shared.blocks = True, None
            said = str(error).partition("\n")[0]
            warn(f"runs are not recorded as CUDA graphs: {said}", RecordingWarning)
            return
        if self.wants:
            self._record_padded(recorder, inputs)

    @property
    def is_padded(self) -> bool:
        """Whether last blocks of any rest are recorded."""
        return self.blocks is not None and self.blocks.is_padded

    @property
    def _can_pad(self) -> bool:
        """Whether cells have padded forms that can be compared with launched ones at this rest."""
        compiled = self._executor.compiled
        padding = compiled.emitted.padding
        if padding.obstacle or self._shared.unpadded or self.whole is None:
            return False
        return compiled.sizes[padding.rest] >= padding.least

    def _record_padded(self, recorder: BlockRecorder, inputs: list[torch.Tensor]) -> None:
        """Record last blocks with padded cells, and compare them once with launched ones."""
        executor = self._executor
        segments = executor.segmentation.count([x.shape for x in inputs])[0]
        given = executor.named(inputs)
        try:
            launched = recorder.replay(segments, given, self._ending())
            expected = launched.results() if launched else executor.launch(segments, inputs)
            recorder.prepare_padded(self._make_padded)
            replayed = recorder.replay(segments, given, self._ending())
            if replayed is not None and (found := difference(expected, replayed.results())):
                self._shared.unpadded = f"padded cells give other values, {found}"
        except RuntimeError as error:
            self._shared.unpadded = "recording has failed: " + str(error).partition("\n")[0]
        if self._shared.unpadded:
            recorder.drop_padded()
            warn(
                f"the last levels of texts that end within a segment are launched: {self._shared.unpadded}",
                RecordingWarning,
            )

    def _make_padded(self, blocks: RecordedBlocks) -> PaddedBlocks:
        assert self.whole is not None
        compiled = self.whole()
        return PaddedBlocks(blocks, compiled, self._executor.engine.at_sizes(compiled.program))

    def record_again(self, segments: int) -> None:
        """Record a short length once more, since there are faster forms for its width now."""
        if self.blocks is not None:
            self.blocks.record_again(segments)

    def forget(self) -> None:
        """Drop all recordings: weights have moved."""
        for recorder in (self.blocks, self._runs, self._parts):
            if recorder is not None:
                recorder.forget()

    def workspace_seconds(self, segments: int) -> dict[str, float]:
        """Seconds of what was recorded "with" and "without" cuBLAS's workspace; empty if not measured."""
        if self.blocks is not None and self.blocks.seconds:
            return self.blocks.seconds
        return self._runs.workspace_seconds(segments) if self._runs is not None else {}

    @property
    def measured(self) -> dict[str, float]:
        """What was measured of blocks of levels, for another process; see `BlockRecorder.seconds`."""
        return self.blocks.seconds if self.blocks is not None else {}

    def trust(self, measured: Mapping[str, float]) -> None:
        """Take over what another process has measured, where nothing was measured here."""
        if measured and self._by_blocks and not self._block_recorder().seconds:
            self._block_recorder().seconds = dict(measured)

    def _block_recorder(self) -> BlockRecorder:
        executor = self._executor
        if self._shared.blocks is None:
            self._shared.blocks = BlockRecorder(executor.compiled.leaves, executor.replaced)
        return self._shared.blocks

    def _ending(self) -> Ending:
        executor = self._executor
        compiled = executor.compiled
        return Ending(executor.program, compiled.namespace, executor.engine, compiled.sizes)

    def _make_blocks(self, device: Device, leaves: Mapping[str, torch.Tensor]) -> RecordedBlocks:
        executor = self._executor
        return RecordedBlocks(
            executor.program,
            executor.compiled.emitted.borders,
            executor.compiled.namespace,
            executor.engine,
            device,
            leaves,
            executor.stacks.current,
            has_ends=not self.ends_vary,
        )


__all__ = ["Replays"]
