"""runtime/replays.py: which runs are put together of recordings. Recordings are played by hand here, through
the same calls as on a device; those of CUDA are tested in test_cuda.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from test_blocks import LONG, Played, Taught
from test_padded import MIXES, Mixing
from torch import Tensor, nn
from torch._dynamo.utils import counters
from toys import Toy, assert_same, features, made

import rmtcompile
from rmtcompile.errors import RecordingWarning
from rmtcompile.runtime import replays
from rmtcompile.runtime.block_recorder import BlockRecorder
from rmtcompile.runtime.execute import Executor
from rmtcompile.runtime.padded import PaddedBlocks


class PlayedRecorder(BlockRecorder):
    """Records by calling."""

    made = 0

    def __init__(self, leaves: Any, replaced: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
            patch.setattr(torch.cuda, "Event", lambda: None)
            super().__init__(leaves, replaced)

    @contextmanager
    def alone(self) -> Iterator[None]:
        yield

    def record(self, body: Callable[[], list[Tensor]]) -> tuple[Any, list[Tensor]]:
        type(self).made += 1
        values = [x.clone() for x in body()]
        return Played(body, values), values


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[PlayedRecorder]:
    """Executors record as if they were on a device; the recorder that they use."""
    init = Executor.__init__

    def recording(self: Executor, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self._use_graphs = True

    class Counted(PlayedRecorder):
        made = 0

    class Whole:
        """Counts runs that would be recorded as whole ones."""

        def __init__(self, *_: Any) -> None: ...
        def replay(self, *_: Any) -> None: ...
        def forget(self) -> None: ...
        def wants(self, *_: Any) -> bool:
            return False

        def workspace_seconds(self, _: int) -> dict[str, float]:
            return {}

        @contextmanager
        def alone(self) -> Iterator[None]:
            yield

    monkeypatch.setattr(Executor, "__init__", recording)
    monkeypatch.setattr(Executor, "is_whole", False)  # see test_recorded_steps.py
    monkeypatch.setattr(replays, "BlockRecorder", Counted)
    monkeypatch.setattr(replays, "Recorder", Whole)
    monkeypatch.setattr(toys, "SEGMENT", LONG)
    return Counted


@pytest.mark.parametrize("build", [Toy, lambda: Toy(2, back=2)])
@torch.no_grad()
def test_blocks_serve_every_length(played: type[PlayedRecorder], build: Callable[[], nn.Module]) -> None:
    model = made(build)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    fast(features(5))
    recorded = played.made
    assert recorded > 2
    assert fast.explain().recorded.endswith("for any number of segments")
    for segments in (4, 5, 6, 9, 30):
        x = features(segments)
        assert_same(model(x), fast(x))
        started = fast._last[0].executor.start(segments, [x])  # type: ignore[index]
        assert started is not None and started.is_current()
    assert played.made == recorded


@torch.no_grad()
def test_padded_cells_are_compiled_once(played: type[PlayedRecorder]) -> None:
    """For fixed sizes; no rest compiles anything."""
    model = made(lambda: Toy(2))
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="inductor", plan="diagonal")
    text = features(20)
    for rest in (3, 2, 5):
        x = text[:, : 4 * LONG + rest]
        assert_same(model(x), fast(x))
    replays = fast._last[0].executor.replays  # type: ignore[index]
    assert replays.is_padded, str(replays)
    graphs = counters["stats"]["unique_graphs"]
    for segments, rest in ((1, 4), (2, 1), (9, 5), (7, 0), (11, 2), (3, 3)):
        x = text[:, : segments * LONG + rest]
        assert_same(model(x), fast(x))
    assert counters["stats"]["unique_graphs"] == graphs


@torch.no_grad()
def test_a_saved_program_is_padded(played: type[PlayedRecorder], tmp_path: Path) -> None:
    model, text = made(Toy), features(20)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for rest in (3, 2):
        fast(text[:, : 4 * LONG + rest])
    fast.save(tmp_path)
    loaded = rmtcompile.load(tmp_path, copy.deepcopy(model))
    for segments, rest in ((7, 0), (4, 5), (1, 4), (9, 1)):
        x = text[:, : segments * LONG + rest]
        assert_same(model(x), loaded(x))
        assert loaded._last[0].executor.replays.is_padded  # type: ignore[index]
    assert not loaded.captures


@torch.no_grad()
def test_padded_cells_one_a_level(played: type[PlayedRecorder]) -> None:
    model, text = made(Toy), features(20)
    fast = rmtcompile.optimize(copy.deepcopy(model), plan="sequential")
    for segments, rest in ((4, 3), (4, 2), (1, 4), (9, 1), (2, 5)):
        x = text[:, : segments * LONG + rest]
        assert_same(model(x), fast(x))
    assert fast._last[0].executor.replays.is_padded  # type: ignore[index]


@torch.no_grad()
def test_padded_cells_that_are_wrong_are_not_used(
    played: type[PlayedRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are compared once, when they are recorded."""
    fill = PaddedBlocks._fill

    def wrong(self: Any, host: Any, ending: Any) -> None:
        fill(self, host, ending)
        self.remainder.fill_(LONG)

    monkeypatch.setattr(PaddedBlocks, "_fill", wrong)
    model, text = made(lambda: Mixing(MIXES["mean"])), features(20)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    fast(text[:, : 4 * LONG + 3])
    with pytest.warns(RecordingWarning, match="padded cells give other values, relative difference"):
        fast(text[:, : 4 * LONG + 2])
    assert "padded cells give other values" in str(fast.explain().recorded)
    x = text[:, : 6 * LONG + 4]
    assert_same(model(x), fast(x))


@pytest.mark.parametrize(("build", "is_padded"), [(Toy, True), (Taught, False)])
@torch.no_grad()
def test_blocks_serve_every_rest(
    played: type[PlayedRecorder], build: Callable[[], nn.Module], is_padded: bool
) -> None:
    model = made(build)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    text = features(31)

    def run(segments: int, rest: int) -> Any:
        x = text[:, : segments * LONG + rest]
        assert_same(model(x), fast(x))
        return fast._last[0].executor.start(segments + (rest > 0), [x])  # type: ignore[index]

    for rest in (3, 2):
        run(8, rest)
    wanted = "run at the size of a whole one" if is_padded else "the last segment varies (the last segment's"
    assert wanted in " ".join(str(fast.explain()).split())
    recorded, captures = played.made, fast.captures
    blocks = fast._last[0].executor.replays.blocks  # type: ignore[index]
    assert blocks is not None and blocks._blocks is not None
    assert {kind for kind, _ in blocks._blocks._recordings} == {"head", "steady"}
    for rest in (5, 4, 1, 0, 2, 5):
        for segments in (2, 7, 12, 30):
            assert (run(segments, rest) is None) == (segments == 2 and not is_padded)
    assert played.made == recorded and fast.captures == captures
    assert fast._last[0].executor.replays.blocks is blocks  # type: ignore[index]
    weight = next(iter(fast.model.parameters()))  # type: ignore[attr-defined]
    weight.data = weight.data * 2  # moved, and others
    model.load_state_dict(fast.state_dict())
    for rest in (4, 5):
        run(12, rest)
    assert played.made > recorded


@torch.no_grad()
def test_a_failure_is_not_tried_again_for_each_rest(
    played: type[PlayedRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        played.made += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    model = made(Toy)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    text = features(9)
    fast(text[:, : 8 * LONG + 3])
    monkeypatch.setattr(played, "prepare", failing)
    played.made = 0
    with pytest.warns(rmtcompile.RecordingWarning, match="not permitted"):
        fast(text[:, : 8 * LONG + 2])
    for rest in (1, 4, 5):
        x = text[:, : 8 * LONG + rest]
        assert_same(model(x), fast(x))
    assert played.made == 1
    assert "since that has failed" in fast.explain().recorded


@torch.no_grad()
def test_gradients_are_recorded_beside_recorded_blocks(played: type[PlayedRecorder]) -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    x = features(6)
    fast(x)
    with torch.enable_grad():
        assert_same(
            torch.autograd.grad(model(x).sum(), list(model.parameters())),
            torch.autograd.grad(fast(x).sum(), list(fast.parameters())),
            1e-9,
        )
    assert_same(model(x), fast(x))
