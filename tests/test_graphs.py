"""runtime/graphs.py: what is checked around a replay; replays themselves are tested in test_cuda.py."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rmtcompile.capture import Leaf
from rmtcompile.runtime.graphs import Recorder


class FakeGraph:
    """Replays nothing, and counts it."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


class FakeEvent:
    """Notes on which streams it was recorded."""

    def __init__(self) -> None:
        self.recorded: list[Any] = []

    def record(self, stream: Any) -> None:
        self.recorded.append(stream)


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    stream = SimpleNamespace(wait_event=waited.append, waited=waited)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())


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
    recorder = Recorder(leaves, frozenset({"state"}))

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
    assert recording is not None and recording.graph.replays == 1
    assert torch.equal(seen["inputs"][0], torch.arange(3.0))
    assert torch.equal(seen["held"]["state"], holder.state) and seen["held"]["state"] is not holder.state
    assert seen["held"]["weight"] is holder.weight
    first, (weight, three) = recorder.results(recording)
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
    assert recording is not None and recorder.is_current(recording)
    holder.weight = nn.Parameter(torch.ones(2))
    assert not recorder.is_current(recording)
    del holder.weight
    assert not recorder.is_current(recording)


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
