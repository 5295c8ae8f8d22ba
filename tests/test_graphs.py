"""runtime/graphs.py: what is checked around a replay; replays themselves are tested in test_cuda.py."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from rmtcompile.binding.captured import Leaf
from rmtcompile.runtime import graphs
from rmtcompile.runtime.graphs import Recorder
from rmtcompile.runtime.workspaces import can_choose, no_workspaces


class Device:
    """A clock, and how recordings that are made now set the workspace."""

    seconds = 0.0
    workspaces = "own"
    taken: ClassVar[dict[str, float]] = {"own": 5.0, "none": 4.0}


class FakeGraph:
    """Replays nothing, and counts it; takes its time, the first time more."""

    def __init__(self) -> None:
        self.replays = 0
        self.workspaces = Device.workspaces

    def replay(self) -> None:
        self.replays += 1
        Device.seconds += Device.taken[self.workspaces] + (100 if self.replays == 1 else 0)


class FakeEvent:
    """Notes on which streams it was recorded, and when."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.recorded: list[Any] = []

    def record(self, stream: Any = None) -> None:
        self.recorded.append(stream)
        self.at = Device.seconds

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


@contextlib.contextmanager
def workspaces(kind: str) -> Iterator[None]:
    Device.workspaces, before = kind, Device.workspaces
    yield
    Device.workspaces = before


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    stream = SimpleNamespace(wait_event=waited.append, waited=waited)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(graphs, "own_workspaces", lambda: workspaces("own"))
    monkeypatch.setattr(graphs, "no_workspaces", lambda: workspaces("none"))


class Holder(nn.Module):
    """A weight, and a state that each forward replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.state = torch.zeros(2)


def recorded() -> tuple[Holder, Recorder, dict[str, Any]]:
    holder, seen = Holder(), dict[str, Any]()
    leaves = {
        "weight": Leaf("weight", holder.weight, holder._parameters, "weight"),
        "state": Leaf("state", holder.state, holder, "state"),
    }
    recorder = Recorder(leaves, frozenset({"state"}), 3)

    def forward(inputs: list[torch.Tensor], held: dict[str, torch.Tensor]) -> Any:
        seen.update(inputs=inputs, held=held)
        return (inputs[0], [held["weight"].detach(), torch.tensor(3)])

    recorder.record(4, [torch.zeros(3)], forward)
    return holder, recorder, seen


@torch.no_grad()
def test_inputs_and_state_are_filled_and_results_copied_out() -> None:
    holder, recorder, seen = recorded()
    holder.state = torch.full((2,), 5.0)
    recording = recorder.replay(4, [torch.arange(3.0)])
    assert recording is not None and recorder._recordings[4].graph.replays == 1
    assert torch.equal(seen["inputs"][0], torch.arange(3.0))
    assert torch.equal(seen["held"]["state"], holder.state) and seen["held"]["state"] is not holder.state
    assert seen["held"]["weight"] is holder.weight
    first, (weight, three) = recording.results()
    assert torch.equal(first, torch.arange(3.0)) and first.data_ptr() != seen["inputs"][0].data_ptr()
    assert torch.equal(weight, holder.weight) and int(three) == 3
    assert recorder.replay(5, [torch.zeros(3)]) is None


def _gone(holder: Holder) -> None:
    del holder.state


def _no_tensor(holder: Holder) -> None:
    holder.state = None


def _longer(holder: Holder) -> None:
    holder.state = torch.zeros(3)


@pytest.mark.parametrize("change", [_gone, _no_tensor, _longer])
@torch.no_grad()
def test_state_that_is_something_else_starts_nothing(change: Any) -> None:
    holder, recorder, _ = recorded()
    change(holder)
    assert recorder.replay(4, [torch.zeros(3)]) is None


@torch.no_grad()
def test_moved_weights_are_noticed() -> None:
    holder, recorder, _ = recorded()
    recording = recorder.replay(4, [torch.zeros(3)])
    assert recording is not None and recording.is_current()
    holder.weight = nn.Parameter(torch.ones(2))
    assert not recording.is_current()
    del holder.weight
    assert not recording.is_current()


def test_a_length_is_recorded_when_it_comes_again() -> None:
    _, recorder, _ = recorded()
    assert [recorder.wants(7, 10) for _ in range(3)] == [False, True, True]
    assert [recorder.wants(8, recorder.longest + 1) for _ in range(3)] == [False, False, False]


def test_runs_wait_for_each_other() -> None:
    _, recorder, _ = recorded()
    stream: Any = torch.cuda.current_stream()
    with pytest.raises(KeyError), recorder.alone():
        raise KeyError
    assert stream.waited[-1] is recorder._done and recorder._done.recorded == [stream]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("own", "none"), [(5.0, 4.0), (4.0, 5.0)])
@torch.no_grad()
def test_the_faster_products_are_taken_once_a_width(
    own: float, none: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "can_choose", lambda: True)
    monkeypatch.setattr(Device, "taken", {"own": own, "none": none})
    _, recorder, _ = recorded()
    faster = "own" if own < none else "none"
    forward = lambda inputs, _: inputs  # noqa: E731
    made: dict[int, Any] = recorder._recordings
    assert (made[4].graph.workspaces, made[4].graph.replays) == (faster, 7)  # a first one, and twice three
    recorder.record(9, [torch.zeros(3)], forward)  # three layers: no wider than four segments
    assert (made[9].graph.workspaces, made[9].graph.replays) == (faster, 0)
    monkeypatch.setattr(Device, "taken", {"own": none, "none": own})
    recorder.record(2, [torch.zeros(3)], forward)
    assert (made[2].graph.workspaces != faster, made[2].graph.replays) == (True, 7)


@torch.no_grad()
def test_a_device_that_has_rested_is_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays of 10 ms, faster by a tenth in the first 0.2 s: only what is measured afterwards counts."""

    class Boosted(FakeGraph):
        def replay(self) -> None:
            self.replays += 1
            boost = 0.9 if Device.seconds < 200 else 1.0
            Device.seconds += {"own": 10.0, "none": 9.9}[self.workspaces] * boost

    monkeypatch.setattr(graphs, "can_choose", lambda: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Boosted)
    monkeypatch.setattr(Device, "seconds", 0.0)
    _, recorder, _ = recorded()
    assert recorder.workspace_seconds(4) == pytest.approx({"with": 0.01, "without": 0.0099})


def test_what_the_user_has_configured_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert can_choose()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert not can_choose()


@pytest.mark.parametrize("has_function", [True, False])
def test_workspaces_come_back(has_function: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, cleared = [7], []
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: cleared.append(1), raising=False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if has_function:
        size = lambda x=None: sizes.append(x) if x is not None else sizes[-1]  # noqa: E731
        monkeypatch.setattr(torch.backends.cuda, "cublas_workspace_size", size, raising=False)
    else:
        monkeypatch.delattr(torch.backends.cuda, "cublas_workspace_size", raising=False)
    with contextlib.suppress(KeyError), no_workspaces():
        assert sizes[-1] == 0 if has_function else os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":0:0"
        raise KeyError
    assert sizes[-1] == 7 and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert cleared == [1, 1]
