"""runtime/recorded_part.py: texts in parts, whose parts are recorded when they come again. Recordings are
played by hand here; those of CUDA are tested in test_cuda.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_advancing import MODELS, T, in_parts, whole
from test_blocks import Played
from test_replays import PlayedRecorder
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from toys import SEGMENT, WIDTH, Toy, assert_same, features, made
from zoo.others import ZOO

import rmtcompile
from rmtcompile.errors import RecordingWarning
from rmtcompile.runtime import replays
from rmtcompile.runtime.execute import Executor
from rmtcompile.runtime.recorded_part import PartRecorder

pytestmark = pytest.mark.filterwarnings("ignore::rmtcompile.SequentialScheduleWarning")


OF_ZOO = {
    "skewed": "skewed", "rows": "transformer_xl", "the last segment is another": "classic_rmt",
    "several states": "hybrid",
}  # fmt: skip


class PlayedParts(PartRecorder):
    """Records by calling."""

    recorded = replayed = 0

    def __init__(self, *args: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
            patch.setattr(torch.cuda, "Event", lambda: None)
            super().__init__(*args)

    @contextmanager
    def alone(self) -> Iterator[None]:
        yield

    def wait(self) -> Any:
        return None

    def _captured(self, body: Callable[[], list[Tensor]], workspaces: Any) -> tuple[Any, list[Tensor]]:
        type(self).recorded += 1
        values = [x.clone() for x in body()]
        for value in values:  # a replay has to fill them all
            value.fill_(float("nan") if value.is_floating_point() else 99)
        return Played(body, values), values

    def replay(self, *args: Any) -> Any:
        outputs = super().replay(*args)
        type(self).replayed += outputs is not None
        return outputs


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[PlayedParts]:
    """Executors record as if they were on a device; what records parts."""
    init = Executor.__init__

    def recording(self: Executor, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self._use_graphs = True

    class Counted(PlayedParts):
        recorded = replayed = 0

    monkeypatch.setattr(Executor, "__init__", recording)
    monkeypatch.setattr(replays, "BlockRecorder", PlayedRecorder)
    monkeypatch.setattr(replays, "PartRecorder", Counted)
    return Counted


@pytest.mark.parametrize("name", sorted(MODELS))
@torch.no_grad()
def test_parts_give_what_the_model_gives(played: type[PlayedParts], name: str) -> None:
    """Parts of one length; the first differs from later ones, which are one recording."""
    build, text = MODELS[name]
    torch.manual_seed(0)
    model = build()
    fast = rmtcompile.optimize(copy.deepcopy(model) if isinstance(model, nn.Module) else model)
    x = ZOO[OF_ZOO[name]].inputs(2, 30)[0] if name in OF_ZOO else text(30 * T)
    cuts = [*range(2 * T, x.shape[1], 2 * T)]
    assert_same(whole(model(x)), in_parts(fast, x, cuts)[0])
    is_recorded = not fast.compiled.emitted.borders.obstacle
    assert (played.replayed > 0) == is_recorded
    assert played.recorded <= 3 * is_recorded


@pytest.mark.parametrize(
    "name", ["plain_function", "stacked_memories", "rolled_memories", "gru_time_major", "in_place"]
)
@torch.no_grad()
def test_weights_and_states_of_other_kinds(played: type[PlayedParts], name: str) -> None:
    """Weights in one tensor, read where they are; values that are the same for all segments."""
    entry = ZOO[name]
    model = entry.build()
    fast = rmtcompile.optimize(copy.deepcopy(model) if isinstance(model, nn.Module) else model)
    before = copy.deepcopy(list(model.parameters())) if isinstance(model, nn.Module) else []
    (x,) = entry.inputs(2, 30)
    size = 3 * entry.segment
    assert_same(whole(model(x)), in_parts(fast, x, [*range(size, x.shape[1], size)])[0])
    assert played.replayed > 3
    if before:
        assert_same(before, list(fast.model.parameters()))


@torch.no_grad()
def test_a_recording_never_writes_into_the_model(played: type[PlayedParts]) -> None:
    """What it reads of the model's own memory is no place that is filled."""
    fast = rmtcompile.optimize(made(Toy))
    parts(fast, [features(20)[:, : 12 * SEGMENT]], 2 * SEGMENT)
    replays = fast._last[0].executor.replays  # type: ignore[index]
    assert replays._parts is not None and replays._parts.count
    own = {p.untyped_storage().data_ptr() for p in fast.model.parameters()}
    for one in replays._parts._recordings.values():
        filled = (one.places, one.inputs, one.init, one.stacked, one.weights, one.left, one.state)
        leaves = pytree.tree_leaves([*map(items_of, filled)])
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        assert tensors and own.isdisjoint(x.untyped_storage().data_ptr() for x in tensors)


def items_of(value: Any) -> Any:
    return list(value.values()) if hasattr(value, "values") else list(value)


class Rows(nn.Module):
    """Reads a row of a table by the number of the segment."""

    def __init__(self, n_layers: int = 3) -> None:
        super().__init__()
        self.toy = Toy(n_layers)
        self.table = nn.Parameter(torch.randn(64, 1, self.toy.layers[0].mix.in_features))

    def forward(self, x: Tensor) -> Tensor:
        memory = [x.new_zeros(x.shape[0], x.shape[2]) for _ in self.toy.layers]
        outs = []
        for s, chunk in enumerate(x.split(T, 1)):
            h = chunk + self.table[s]
            for i, layer in enumerate(self.toy.layers):
                h, memory[i] = layer(h, memory[i])
            outs.append(h)
        return torch.cat(outs, 1)


@torch.no_grad()
def test_parts_of_the_inputs_are_filled(played: type[PlayedParts]) -> None:
    """What depends on the number of a segment is read by the host."""
    model = made(Rows)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    x = features(40)[:, : 30 * T]
    assert_same(model(x), in_parts(fast, x, [*range(2 * T, 30 * T, 2 * T)])[0])
    assert played.replayed >= 8 and played.recorded <= 4
    assert "of parts of texts are recorded, too" in str(fast._last[0].executor.replays)


def parts(fast: Any, texts: list[Tensor], length: int) -> list[Tensor]:
    """Texts in parts of one length, in turn."""
    states: list[Any] = [None] * len(texts)
    rows: list[list[Tensor]] = [[] for _ in texts]
    for start in range(0, texts[0].shape[1], length):
        for i, x in enumerate(texts):
            out, states[i] = fast.run(x[:, start : start + length], state=states[i])
            rows[i].append(out)
    return [torch.cat(one, 1) for one in rows]


@torch.no_grad()
def test_texts_in_turn_share_recordings(played: type[PlayedParts]) -> None:
    """A state is a value: no other part writes into it, nor into results; batches are kinds of their own."""
    model = made(lambda: Toy(3, back=2))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    texts = [features(20, n)[:, : 18 * SEGMENT] for n in (18, 19, 20)]
    for x, out in zip(texts, parts(fast, texts, 2 * SEGMENT), strict=True):
        assert_same(model(x), out)
    assert played.replayed > 10
    x = texts[1]
    _, state = fast.run(x[:, : 14 * SEGMENT])
    one, other = (fast.run(x[:, 14 * SEGMENT : 16 * SEGMENT], state=state)[0] for _ in range(2))
    assert_same(one, other)
    assert_same(model(x[:, : 16 * SEGMENT])[:, 14 * SEGMENT :], one)


@torch.no_grad()
def test_weights_that_are_written_or_moved(played: type[PlayedParts]) -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    x = features(20)[:, : 16 * SEGMENT]
    assert_same(model(x), parts(fast, [x], 2 * SEGMENT)[0])
    for weights in (model.parameters(), fast.model.parameters()):
        for weight in weights:
            weight.mul_(1.5)
    recorded = played.recorded
    assert_same(model(x), parts(fast, [x], 2 * SEGMENT)[0])
    assert played.recorded == recorded + 1, "the first part has come again, and nothing else is new"
    for _ in range(PartRecorder.MOST + 1):  # after which nothing is recorded any more
        for weights in (model.parameters(), fast.model.parameters()):
            for weight in weights:
                weight.data = weight.data * 0.5
        before = played.recorded
        assert_same(model(x), parts(fast, [x], 2 * SEGMENT)[0])
        assert_same(model(x), parts(fast, [x], 2 * SEGMENT)[0])
        moved = played.recorded > before
    assert played.recorded > recorded + 1 and not moved


@torch.no_grad()
def test_lengths_that_do_not_come_again_are_launched(played: type[PlayedParts]) -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    x = features(30)[:, : 21 * SEGMENT]
    starts = [n * (n + 1) // 2 * SEGMENT for n in range(7)]
    assert_same(model(x), in_parts(fast, x, starts[1:-1])[0])
    assert not played.recorded


@torch.no_grad()
def test_large_results_are_launched(played: type[PlayedParts], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(Toy), features(20)[:, : 16 * SEGMENT]
    fast = rmtcompile.optimize(copy.deepcopy(model))
    monkeypatch.setattr(PartRecorder, "LARGEST", 2 * 2 * SEGMENT * WIDTH * 8 - 1)
    assert_same(model(x), parts(fast, [x], 2 * SEGMENT)[0])
    assert not played.recorded
    monkeypatch.setattr(PartRecorder, "LARGEST", 2 * 2 * SEGMENT * WIDTH * 8)
    assert_same(model(x), parts(fast, [x], 2 * SEGMENT)[0])
    assert played.recorded


def test_gradients_are_launched(played: type[PlayedParts]) -> None:
    fast = rmtcompile.optimize(made(Toy))
    x = features(20)[:, : 12 * SEGMENT].requires_grad_()
    parts(fast, [x], 2 * SEGMENT)[0].sum().backward()
    assert x.grad is not None and not played.recorded


@torch.no_grad()
def test_a_recording_that_fails_is_told(
    played: type[PlayedParts], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("not while a stream is captured")

    monkeypatch.setattr(played, "_captured", fails)
    model, x = made(Toy), features(20)[:, : 12 * SEGMENT]
    fast = rmtcompile.optimize(copy.deepcopy(model))
    with pytest.warns(RecordingWarning, match="parts of texts are not recorded as CUDA graphs: not while"):
        out = parts(fast, [x], 2 * SEGMENT)[0]
    assert_same(model(x), out)
