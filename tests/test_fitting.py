"""`recompute="auto"`: backward keeps the values of levels while there is memory for them."""

from __future__ import annotations

import copy
import gc
import logging
from typing import Any

import pytest
import torch
from test_training import assert_same_gradients, gradients
from torch._subclasses.fake_tensor import FakeTensor
from toys import SEGMENT, Toy, assert_same, features, made
from zoo.others import ZOO

import rmtcompile
from rmtcompile.runtime import execute
from rmtcompile.runtime.fitting import SHARE, Keeping


class Memory:
    """A device's memory of so many bytes: what autograd keeps takes some of it, until it is freed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: dict[int, tuple[Any, int]] = {}

    def room(self, _: torch.device) -> int:
        return self.size - self.used

    @property
    def used(self) -> int:
        return sum(size for _, size in self._held.values())

    def watching(self) -> Any:
        """Count what is kept for backward; what is kept within checkpoints is not seen, as on a device."""

        def pack(x: torch.Tensor) -> torch.Tensor:
            if isinstance(x, FakeTensor):  # while a forward is captured
                return x
            key = x.untyped_storage().data_ptr()
            self._held.setdefault(key, (x, x.untyped_storage().nbytes()))
            return x

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)

    def free(self) -> None:
        self._held.clear()


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    found = Memory(1 << 40)
    monkeypatch.setattr(execute, "room_on", found.room)
    return found


def step(fast: Any, memory: Memory, segments: int) -> tuple[list[Any], int]:
    """The gradients of a step, and the bytes that its forward has kept."""
    kept: list[int] = []

    def forward(x: Any) -> Any:
        with memory.watching():
            found = fast(x)
        kept.append(memory.used)
        return found

    found = gradients(forward, fast.model, features(segments))
    memory.free()
    return found, kept[0]


def trained(model: Any, memory: Memory, segments: int, **options: Any) -> tuple[Any, list[Any], int]:
    """The program of a copy, and a step of it."""
    fast = rmtcompile.optimize(copy.deepcopy(model), **options)
    with torch.no_grad():
        fast(features(segments))
    return fast, *step(fast, memory, segments)


def keeping_of(fast: Any) -> Keeping:
    found: Keeping = fast._last[0].executor.keeping
    return found


def test_all_is_kept_where_there_is_room(memory: Memory) -> None:
    model = made(Toy)
    fast, found, kept = trained(model, memory, 12)
    _, _, all_ = trained(model, memory, 12, recompute="none")
    assert kept == all_
    assert "levels again" not in str(fast.explain())
    assert_same_gradients(gradients(model, model, features(12)), found)


@pytest.mark.parametrize("part", [0.8, 0.3])
def test_what_fits_is_kept(memory: Memory, part: float, caplog: pytest.LogCaptureFixture) -> None:
    """The less memory, the more levels run again; gradients stay the same, and it is enough."""
    model = made(Toy)
    expected = gradients(model, model, features(40))
    _, _, all_ = trained(model, memory, 40, recompute="none")
    _, _, least = trained(model, memory, 40, recompute="level")
    parameters = sum(p.nbytes for p in model.parameters())
    memory.size = int((part * all_ + parameters) / SHARE)
    with caplog.at_level(logging.INFO, "rmtcompile"):
        fast, found, _ = trained(model, memory, 40)
    assert_same_gradients(expected, found)
    found, kept = step(fast, memory, 40)  # now it knows what comes after the last level
    assert_same_gradients(expected, found)
    assert least < kept < all_ and kept + parameters <= memory.size
    assert "levels again: memory is too short" in " ".join(str(fast.explain()).split())
    assert "are computed again" in caplog.text
    fitted = keeping_of(fast).fitted
    assert 0 < fitted.again < fitted.levels


def test_less_memory_keeps_fewer_levels(memory: Memory) -> None:
    model, again = made(Toy), []
    _, _, all_ = trained(model, memory, 40, recompute="none")
    for part in (3, 0.9, 0.7, 0.5, 0.3):
        memory.size = int(part * all_)
        fast, _, _ = trained(model, memory, 40)
        again.append(keeping_of(fast).fitted.again)
    assert again == sorted(again) and again[0] == 0 < again[1] < again[-1]


def test_a_run_that_ends_without_memory_runs_again(memory: Memory) -> None:
    """What comes after the last level is not known before: then nothing is kept."""
    model, runs = made(Toy), []
    expected = gradients(model, model, features(12))
    fast, _, _ = trained(model, memory, 12)
    keeping = keeping_of(fast)
    run = keeping.run

    def short(launch: Any, *rest: Any) -> Any:
        def launched(on_level: Any) -> Any:
            runs.append(launch(on_level))
            if len(runs) == 1:
                raise torch.OutOfMemoryError("at the head")
            return runs[-1]

        return run(launched, *rest)

    keeping.run = short  # type: ignore[method-assign]
    found = gradients(fast, fast.model, features(12))
    assert len(runs) == 2 and keeping.fitted.again == keeping.fitted.levels
    assert_same_gradients(expected, found)


def test_an_optimizer_takes_memory_between_two_steps(memory: Memory) -> None:
    """Each launched run decides anew."""
    model = made(Toy)
    fast, _, all_ = trained(model, memory, 40)
    keeping = keeping_of(fast)
    assert not keeping.fitted.again
    memory.size = all_ // 2
    step(fast, memory, 40)
    assert keeping.fitted.again


@pytest.mark.parametrize("name", ["infini_attention", "no_carry", "transformer_xl"])
def test_the_zoo(memory: Memory, name: str) -> None:
    """Skewed programs, rows, several kinds of layers."""
    entry = ZOO[name]
    model, inputs = entry.build(), entry.inputs(2, 12)
    expected = gradients(model, model, *inputs)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    with torch.no_grad():
        fast(*inputs)
    for _ in range(2):
        with memory.watching():
            found = gradients(fast, fast.model, *inputs)
        assert_same_gradients(expected, found)
        memory.size = memory.used // 2
        memory.free()
    assert keeping_of(fast).fitted.again


def test_nobody_knows_how_much_memory_a_cpu_has() -> None:
    fast = rmtcompile.optimize(made(Toy))
    assert_same(fast.model(features(5)), fast(features(5)))
    assert not keeping_of(fast).fits


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", ["auto", False])
@pytest.mark.filterwarnings("default")
def test_on_cuda(cuda_graphs: Any) -> None:
    """A device that may give no more than so much memory: steps are launched, and recorded."""
    model = made(lambda: Toy(n_layers=12, d=256)).cuda()
    x = torch.randn(64, 60 * SEGMENT, 256, dtype=torch.float64, device="cuda")
    expected = gradients(model, model, x)

    def steps(how: str, number: int) -> tuple[Keeping, int]:
        options = {"recompute": how, "cuda_graphs": cuda_graphs, "backend": "eager"}
        fast = rmtcompile.optimize(copy.deepcopy(model), **options)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(number):
            for x_grad, y_grad in zip(gradients(fast, fast.model, x), expected, strict=True):
                assert_same(y_grad, x_grad, 1e-9)
        return keeping_of(fast), torch.cuda.max_memory_allocated() - before

    most, least = steps("none", 1)[1], steps("level", 1)[1]
    total, found = torch.cuda.get_device_properties(0).total_memory, []
    for more in range(36, 14, -4):  # for the loss, blocks that are not full, and what backward needs at once
        gc.collect()
        torch.cuda.empty_cache()
        room = (most + least) // 2 + more * x.nbytes
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
        try:
            keeping, _ = steps("auto", 4)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert keeping.fits
        found.append(keeping.fitted.again)
        if 0 < found[-1] < keeping.fitted.levels:
            break
    assert 0 < found[-1] < keeping.fitted.levels, f"levels that ran again: {found}"
