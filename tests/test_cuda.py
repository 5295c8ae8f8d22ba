"""On CUDA: compiled forms, recorded runs, and what may change between two of them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import toys
import transformers
from test_end_to_end import armt, ids
from test_reroll import FirstDiffers, Kept
from torch import Tensor, nn
from torch._dynamo.utils import counters
from toys import Toy, assert_same, features, made
from zoo.others import ZOO

import rmtcompile
from rmtcompile.models import build

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

TOLERANCE = 1e-7
"""Inductor's kernels for CUDA take some functions of float64 in float32."""


def on_cuda(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    model = made(build).cuda()
    return model, copy.deepcopy(model)


def inputs(segments: int, seed: int = 0) -> Tensor:
    return features(segments).cuda() + seed


class Streaming(nn.Module):
    """Goes on from where the last call stopped: state in attributes, read before it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.states = [torch.zeros(2, 4, dtype=torch.float64, device="cuda") for _ in range(3)]

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for h in x.split(3, 1):
            for l, layer in enumerate(self.layers):
                h = torch.tanh(layer(h) + self.states[l][:, None])
                self.states[l] = 0.5 * self.states[l] + h.mean(1)
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("build", [Kept, FirstDiffers, Toy, lambda: Toy(3, up=-1)])
@torch.no_grad()
def test_recorded_runs(build: Any, backend: str) -> None:
    model, twin = on_cuda(build)
    fast = rmtcompile.optimize(twin, backend=backend)
    for seed in range(4):  # run, record, replay, replay
        for segments in (1, 2, 3, 5, 9):
            x = inputs(segments, seed)
            assert_same(model(x), fast(x), TOLERANCE)
    assert fast.captures == 1
    if torch.version.cuda is not None:
        assert fast.explain().workspace_seconds.keys() == {"with", "without"}


def small_armt(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build(config, segment_size=16, num_mem_tokens=4, d_mem=8, dtype=dtype).eval().cuda()
    for layer in model.memory_cell.layers:
        nn.init.normal_(layer.W_mv.weight, std=0.1)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize(
    ("dtype", "backend", "tolerance"),
    [
        (torch.float64, "eager", 1e-12),
        (torch.float64, "inductor", 3e-5),  # the model itself takes its norms in float32
        (torch.float32, "inductor", 1e-4),
    ],
)
@torch.no_grad()
def test_armt(dtype: torch.dtype, backend: str, tolerance: float) -> None:
    model, twin = small_armt(dtype)
    fast = rmtcompile.optimize(twin, backend=backend)
    for seed in range(3):
        for segments in (2, 4, 7):
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(0, 64, (2, 16 * segments), generator=generator).cuda()
            expected, got = model(ids), fast(ids)
            assert_same(expected["logits"], got["logits"], tolerance)
            for a, b in zip(model.memory_cell.layers, twin.memory_cell.layers, strict=True):
                assert_same(a.association, b.association, tolerance)


@torch.no_grad()
def test_a_replay_does_not_wait_for_the_device() -> None:
    _, twin = on_cuda(Toy)
    fast, x = rmtcompile.optimize(twin), inputs(5)
    for _ in range(3):
        fast(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_results_are_not_overwritten_by_later_calls() -> None:
    model, twin = on_cuda(Toy)
    fast = rmtcompile.optimize(twin)
    calls = [inputs(5, seed) for seed in range(4)]
    results = [fast(x) for x in calls]
    assert_same([model(x) for x in calls], results, TOLERANCE)


def _in_place(model: nn.Module) -> None:
    model.layers[1].mix.weight.mul_(1.5)


def _swapped(model: nn.Module) -> None:
    model.layers[2].read.weight = nn.Parameter(torch.ones_like(model.layers[2].read.weight))


def _moved(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


@pytest.mark.parametrize("change", [_in_place, _swapped, _moved])
@torch.no_grad()
def test_changed_weights_are_seen(change: Callable[[nn.Module], None]) -> None:
    model, twin = on_cuda(Toy)
    fast, x = rmtcompile.optimize(twin), inputs(5)
    for _ in range(3):
        fast(x)
    for changed in (model, twin):
        change(changed)
    torch.cuda.empty_cache()
    for _ in range(3):
        assert_same(model(x), fast(x), TOLERANCE)


@torch.no_grad()
def test_state_goes_on_from_call_to_call() -> None:
    model = Streaming().double().cuda()
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin)
    for seed in range(5):
        x = inputs(4, seed)
        assert_same(model(x), fast(x), TOLERANCE)
        assert_same(model.states, twin.states, TOLERANCE)


def test_modes() -> None:
    """Calls in inference mode, without gradients and with them, in any order."""
    model, twin = on_cuda(Toy)
    fast, x = rmtcompile.optimize(twin), inputs(4)
    for _ in range(3):
        with torch.inference_mode():
            a, b = model(x), fast(x)
            assert_same(a, b, TOLERANCE)
        with torch.no_grad():
            assert_same(model(x), fast(x), TOLERANCE)
        model(x).square().sum().backward()
        fast(x).square().sum().backward()
        gradients = [[p.grad for p in m.parameters()] for m in (model, twin)]
        assert_same(*gradients, TOLERANCE)


@torch.no_grad()
def test_streams_and_threads() -> None:
    model, twin = on_cuda(Toy)
    fast = rmtcompile.optimize(twin)
    xs = [inputs(5, seed) for seed in range(4)]
    expected = [model(x) for x in xs]
    fast(xs[0]), fast(xs[0])
    torch.cuda.synchronize()
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                found[i] = fast(xs[i])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(expected, [found[i] for i in range(4)], TOLERANCE)


@torch.no_grad()
def test_without_graphs() -> None:
    model, twin = on_cuda(Toy)
    fast = rmtcompile.optimize(twin, cuda_graphs=False)
    for seed in range(3):
        assert_same(model(inputs(5, seed)), fast(inputs(5, seed)), TOLERANCE)


@torch.no_grad()
def test_recordings_are_bounded() -> None:
    model, twin = on_cuda(Toy)
    fast = rmtcompile.optimize(twin)
    for segments in range(1, 24):
        for _ in range(2):
            fast(inputs(segments))
    recorded = fast._last[0].executor.replays.blocks._blocks._recordings
    assert {kind for kind, _ in recorded} == {"head", "steady", "tail", "whole"}
    assert len(recorded) < 16
    assert_same(model(inputs(2)), fast(inputs(2)), TOLERANCE)


@pytest.mark.parametrize("build", [Kept, FirstDiffers, lambda: Toy(3, up=-1)])
@torch.no_grad()
def test_a_new_length_records_nothing(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = on_cuda(build)
    fast = rmtcompile.optimize(twin, backend="eager")
    for segments in (4, 9):
        fast(inputs(segments))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", None)
    for segments in (3, 5, 6, 7, 8, 11, 17, 30, 64):
        x = inputs(segments, segments)
        assert_same(model(x), fast(x), TOLERANCE)
    assert fast.captures == 1


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("build", [Toy, lambda: Toy(2, back=2)])
@torch.no_grad()
def test_a_new_rest_records_nothing(build: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toys, "SEGMENT", 8)
    model, twin = on_cuda(build)
    fast = rmtcompile.optimize(twin, backend=backend)
    text = inputs(40)

    def run(segments: int, rest: int) -> None:
        x = text[:, : 8 * segments + rest]
        assert_same(model(x), fast(x), TOLERANCE)

    for rest in (7, 5):
        run(9, rest)
    blocks = fast._last[0].executor.replays.blocks
    assert {kind for kind, _ in blocks._blocks._recordings} == {"head", "steady"}
    assert {kind for kind, _ in blocks._blocks.padded._recordings} == {"whole", "tail"}
    monkeypatch.setattr(torch.cuda, "CUDAGraph", None)
    captures, compiled = fast.captures, counters["stats"]["unique_graphs"]
    for rest in (1, 2, 5, 6):
        for segments in (2, 3, 12, 30):
            run(segments, rest)
    assert fast.captures == captures and fast._last[0].executor.replays.blocks is blocks
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("build", [Toy, FirstDiffers, lambda: Toy(3, up=-1), lambda: Toy(2, back=2)])
@torch.no_grad()
def test_parts_that_come_again_are_recorded(build: Any, backend: str) -> None:
    """Two texts in turn, with weights that move on the way and a rest at the end."""
    model, own = on_cuda(build)
    fast = rmtcompile.optimize(own, backend=backend)
    texts = [inputs(23, seed) for seed in range(2)]
    length = 4 * texts[0].shape[1] // 23
    for change in (_in_place, _moved):
        states: list[Any] = [None, None]
        rows: list[list[Tensor]] = [[], []]
        for start in range(0, texts[0].shape[1], length):
            for i, x in enumerate(texts):
                out, states[i] = fast.run(x[:, start : start + length], state=states[i])
                rows[i].append(out)
        for x, row in zip(texts, rows, strict=True):
            assert_same(model(x), torch.cat(row, 1), 1e-6)
        assert "of parts of texts are recorded" in " ".join(str(fast.explain()).split())
        for one in (model, own):
            change(one)


@pytest.mark.parametrize(("name", "batch"), [("llama", 1), ("gpt2", 2)])
@torch.no_grad()
def test_an_armt_reads_any_rest(name: str, batch: int) -> None:
    """With compiled cells; norms in float32 are summed in another order."""
    model = armt(name, torch.float64).cuda()
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="inductor")
    text = ids(20, batch).cuda()
    for tokens in (75, 53, 73, 9, 17, 30, 159, 71, 80, 15):
        assert_same(model(text[:, :tokens]), fast(text[:, :tokens]), 1e-5)
    assert fast._last[0].executor.replays.is_padded, fast.explain().recorded


@torch.no_grad()
def test_numbers_are_drawn_after_a_recording_has_failed() -> None:
    model, twin = on_cuda(Toy)
    fast = rmtcompile.optimize(twin, backend="eager")
    fast(inputs(5))
    recorder = fast._last[0].executor.replays.blocks

    def body() -> None:
        torch.cuda.synchronize()

    with pytest.raises(RuntimeError):
        recorder.captured(body, recorder._workspaces)
    assert torch.rand(3, device="cuda").isfinite().all()
    assert_same(model(inputs(7)), fast(inputs(7)), TOLERANCE)


@torch.no_grad()
def test_weights_are_never_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """While they are stacked on a device without plenty of room, one tenth of the weights at most is there
    twice."""
    monkeypatch.setattr("rmtcompile.runtime.stacks._SPARE", 0.0)
    torch.manual_seed(0)
    model = Wide().cuda()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    x = torch.randn(1, 6, 2048, device="cuda")
    expected = model(x)
    fast = rmtcompile.optimize(model, backend="eager", cuda_graphs=False).prepare(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = fast(x)
    assert torch.cuda.max_memory_allocated() - before < 0.15 * weights
    assert torch.cuda.memory_allocated() - before < 0.01 * weights
    assert_same(expected, got, 1e-4)


@torch.no_grad()
def test_weights_are_moved_on_the_device_where_it_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: torch.Tensor) -> torch.Tensor:
        raise AssertionError("through the host's memory")

    torch.manual_seed(0)
    model = Wide().cuda()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    x = torch.randn(1, 6, 2048, device="cuda")
    expected = model(x)
    monkeypatch.setattr("rmtcompile.runtime.stacks._SPARE", 1.0)
    monkeypatch.setattr(torch.Tensor, "cpu", refused)
    before = torch.cuda.memory_allocated()
    got = rmtcompile.optimize(model, backend="eager", cuda_graphs=False)(x)
    monkeypatch.undo()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 0.05 * weights
    assert_same(expected, got, 1e-4)


class Wide(nn.Module):
    """Almost all of it is weights: one large matrix a layer, and a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(2048, 4096), "down": nn.Linear(4096, 2048)}) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        memory = [x.new_zeros(x.shape[0], 2048) for _ in self.layers]
        out = []
        for h in x.split(3, 1):
            for l, layer in enumerate(self.layers):
                h = torch.tanh(h + layer["down"](layer["up"](h)) + memory[l][:, None])
                memory[l] = h.mean(1)
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["transformer_xl", "no_carry"])
@torch.no_grad()
def test_a_layer_at_a_time(name: str, backend: str) -> None:
    """alpha = 0: all segments of a layer in one call."""
    entry = ZOO[name]
    model = entry.build().cuda()
    fast = rmtcompile.optimize(copy.deepcopy(model), backend=backend)
    for _ in range(3):
        for segments in (1, 4, 9):
            x = entry.inputs(2, segments)[0].cuda()
            assert_same(model(x), fast(x), TOLERANCE)
    assert fast.schedule.alpha == 0


@torch.no_grad()
def test_free_sizes() -> None:
    """Batches and rests that no program was captured for."""
    model, twin = on_cuda(Toy)
    fast = rmtcompile.optimize(twin)
    for batch, length in ((1, 12), (2, 12), (3, 12), (3, 13), (3, 14), (5, 17), (5, 17), (5, 17)):
        x = torch.randn(batch, length, 4, dtype=torch.float64, device="cuda")
        assert_same(model(x), fast(x), TOLERANCE)


@torch.no_grad()
def test_levels_are_timed_by_the_clock_of_the_device() -> None:
    model, _ = small_armt(torch.bfloat16)
    fast = rmtcompile.optimize(model)
    profile = fast.profile(torch.arange(48, device="cuda")[None] % 40)
    widths = fast.schedule.widths
    assert len(profile.level_us) == len(widths) and min(profile.level_us) > 0
    # Kernels alone: about what a recorded run takes; the model as it is waits for the host.
    assert 0.3 < sum(profile.level_us) / profile.total_us < 3
    assert sum(profile.level_us) < profile.sequential_us
