"""CUDA graphs of whole runs: one launch by the host for all levels of an input of some number of segments."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.binding.captured import Leaf
from rmtcompile.ir.streams import capture_stream
from rmtcompile.runtime.copies import copies_of, is_tensor
from rmtcompile.runtime.workspaces import can_choose, no_workspaces, own_workspaces

Forward = Callable[[list[torch.Tensor], dict[str, torch.Tensor]], Any]
"""Runs the program on inputs and leaves."""


_WARM_UP = 0.3
"""Seconds of work before a measurement, and of the measurement; more if three replays of each take longer."""

Workspaces = Callable[[], AbstractContextManager[None]]
"""How cuBLAS's workspace is set while a run is recorded."""


@dataclass
class Recording:
    """A recorded run.

    Attributes:
        graph: to be replayed.
        inputs: what the graph reads as the caller's inputs, to be filled before a replay.
        state: the same for tensors that the forward itself replaces in the model.
        addresses: of everything else that the graph reads, by leaf.
        kept: that memory, so that it stays readable if the model lets go of it.
        outputs: what the graph fills; a later replay overwrites it.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    state: dict[str, torch.Tensor]
    addresses: dict[str, int]
    kept: list[torch.Tensor]
    outputs: Any


@dataclass
class Started:
    """A recorded run that the device is at work on.

    Attributes:
        is_current: whether the model's tensors are where they were when it was recorded.
        results: the outputs, in memory of their own.
    """

    is_current: Callable[[], bool]
    results: Callable[[], Any]


class Recordings:
    """What recordings of one program share: a memory pool, since only one of them runs at a time; the leaves
    that they read; and how products are recorded.

    Args:
        leaves: parameters, buffers, state and constants of the program.
        replaced: names of those that the forward replaces by other tensors.
    """

    def __init__(self, leaves: Mapping[str, Leaf], replaced: frozenset[str]) -> None:
        self.leaves = leaves
        self.replaced = replaced
        self._pool = torch.cuda.graph_pool_handle()
        devices = (leaf.tensor.device for leaf in leaves.values())
        found = next((device for device in devices if device.type == "cuda"), torch.device("cpu"))
        self._stream: torch.cuda.Stream | None = capture_stream(found)
        self._done = torch.cuda.Event()

    def wait(self) -> torch.cuda.Stream:
        """Let what is launched next wait for every earlier run; gives the stream that it is launched on."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)
        return stream

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What is launched here runs after every earlier run, maybe on another stream: they share storage."""
        stream = self.wait()
        try:
            yield
        finally:
            self._done.record(stream)

    def at_addresses(self, addresses: Mapping[str, int]) -> bool:
        """Whether the model's tensors are at these addresses."""
        try:
            now = {name: self.leaves[name].fetch().data_ptr() for name in addresses}
        except (LookupError, AttributeError, TypeError):
            return False
        return now == addresses

    def state_like(self, state: Mapping[str, torch.Tensor]) -> list[torch.Tensor] | None:
        """What the model holds where the forward replaces tensors; None if that is something else by now."""
        try:
            values = [self.leaves[name].fetch() for name in state]
            fits = all(v.shape == x.shape for v, x in zip(values, state.values(), strict=True))
        except (LookupError, AttributeError, TypeError):
            return None
        return values if fits else None

    def captured(self, body: Callable[[], Any], workspaces: Workspaces) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A recording of what `body` launches, and what it returns.

        What is done at a first call only (compiling, tuning a kernel) cannot be recorded: where a recording
        fails, `body` is run as it is, and recorded once more.
        """
        try:
            return self.captured_once(body, workspaces)
        except RuntimeError:
            free_generators()
            body()
        try:
            return self.captured_once(body, workspaces)
        except RuntimeError:
            free_generators()
            raise

    def captured_once(
        self, body: Callable[[], Any], workspaces: Workspaces
    ) -> tuple[torch.cuda.CUDAGraph, Any]:
        """The same, and the error where it fails."""
        with workspaces(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
                result = body()
        return graph, result

    def timed(self, graphs: dict[str, Any]) -> dict[str, float]:
        """Median seconds of a replay of each, in turn and without a pause.

        A device that has rested is 5 to 10 % faster for some tenths of a second, so that it is kept at work
        for that long first.
        """
        with self.alone():
            once = max(_in_turn(graphs, 1).values(), key=max)[0]
            rounds = max(3, min(20, int(_WARM_UP / once / len(graphs))))
            _in_turn(graphs, rounds)
            taken = _in_turn(graphs, rounds)
        return {name: statistics.median(times) for name, times in taken.items()}


class Recorder(Recordings):
    """Records whole runs and replays them.

    A length is recorded when it is seen for the second time: the first run compiles and warms up everything,
    and inputs whose lengths do not come again cost no recording. What recordings return is copied out.

    Args:
        widest: segments from which on the steady wavefronts of all runs are of one width.
        limit: recordings kept; the least recently used one is dropped.
        longest: levels of a run that is recorded at most.
    """

    def __init__(
        self,
        leaves: Mapping[str, Leaf],
        replaced: frozenset[str],
        widest: int,
        limit: int = 16,
        longest: int = 4096,
    ) -> None:
        super().__init__(leaves, replaced)
        self.widest = widest
        self.limit = limit
        self.longest = longest
        self._recordings: OrderedDict[int, Recording] = OrderedDict()
        self._seen: Counter[int] = Counter()
        self._seconds: dict[int, dict[str, float]] = {}  # see `workspace_seconds`

    def replay(self, segments: int, inputs: list[torch.Tensor]) -> Started | None:
        """Start the recorded run of this length; None where there is none.

        Whether the model still holds the tensors that the recording reads is checked by `is_current`, which
        may wait until the device is at work.
        """
        recording = self._recordings.get(segments)
        state = self.state_like(recording.state) if recording is not None else None
        if recording is None or state is None:
            return None
        self._recordings.move_to_end(segments)
        with self.alone():
            places = (*recording.inputs, *recording.state.values())
            for place, value in zip(places, (*inputs, *state), strict=True):
                place.copy_(value)
            recording.graph.replay()
        return Started(lambda: self.at_addresses(recording.addresses), lambda: self._results(recording))

    def _results(self, recording: Recording) -> Any:
        """The outputs of the last replay, in memory of their own."""
        flat, spec = pytree.tree_flatten(recording.outputs)
        with self.alone():
            return pytree.tree_unflatten(_own(flat), spec)

    def wants(self, segments: int, levels: int) -> bool:
        """Whether to record this length now; counts how often it was seen."""
        self._seen[segments] += 1
        return levels <= self.longest and self._seen[segments] > 1

    def forget(self) -> None:
        """Drop all recordings: weights have moved."""
        self._recordings.clear()

    def record(self, segments: int, inputs: list[torch.Tensor], forward: Forward) -> None:
        """Record a run of this length; `forward` has run with it before, so that all is compiled.

        The first run of each number of segments up to `widest`, where wavefronts are of different widths, is
        recorded with and without cuBLAS's workspace, and what is faster is taken for all others of its width.
        """
        static = [x.clone() for x in inputs]
        leaves = {name: leaf.fetch() for name, leaf in self.leaves.items()}
        state = {name: leaves[name].clone() for name in sorted(self.replaced)}
        addresses = {name: x.data_ptr() for name, x in leaves.items() if name not in state}
        kept = [x.detach() for x in leaves.values()]
        self.wait()

        def recorded(workspaces: Workspaces) -> Recording:
            graph, outputs = self.captured(lambda: forward(static, {**leaves, **state}), workspaces)
            return Recording(graph, static, state, addresses, kept, outputs)

        seconds = self.workspace_seconds(segments)
        if seconds or not can_choose():
            is_without = bool(seconds) and seconds["without"] < seconds["with"]
            self._recordings[segments] = recorded(no_workspaces if is_without else own_workspaces)
        else:
            made = {"with": recorded(own_workspaces), "without": recorded(no_workspaces)}
            seconds.update(self.timed({kind: recording.graph for kind, recording in made.items()}))
            self._recordings[segments] = made[min(made, key=seconds.__getitem__)]
        while len(self._recordings) > self.limit:
            self._recordings.popitem(last=False)

    def workspace_seconds(self, segments: int) -> dict[str, float]:
        """Seconds of a run of the width of this one "with" and "without" cuBLAS's workspace; empty before it
        was measured."""
        return self._seconds.setdefault(min(segments, self.widest), {})


def free_generators() -> None:
    """Let random numbers be drawn again after a recording that failed, which leaves the state of CUDA's
    generators in the hands of its graph."""
    for generator in torch.cuda.default_generators:
        generator.graphsafe_set_state(generator.clone_state())


def _in_turn(graphs: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of `rounds` replays of each; every other round in reverse order."""
    events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
    for i in range(rounds):
        for name in sorted(graphs, reverse=i % 2 == 1):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graphs[name].replay()
            end.record()
            events.append((name, begin, end))
    events[-1][2].synchronize()
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for name, begin, end in events:
        taken[name].append(begin.elapsed_time(end) / 1e3)
    return taken


def _own(values: list[Any]) -> list[Any]:
    """The values, with copies in place of the tensors among them."""
    copies = iter(copies_of([x for x in values if is_tensor(x)]))
    return [next(copies) if is_tensor(x) else x for x in values]
