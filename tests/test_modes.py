"""Modes of torch around the call: autocast, inference mode, default dtype, train mode; half precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from test_end_to_end import armt, ids
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, Layer, Toy, assert_equal_runs, assert_same, features, made

import rmtcompile

HALF = [torch.bfloat16, torch.float16]


class Dropped(nn.Module):
    """Makes its states in the default dtype; drops features between its layers."""

    def __init__(self, p: float = 0.0, n_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(n_layers))
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        states = [torch.zeros(x.shape[0], WIDTH) for _ in self.layers]
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(self.dropout(h), states[l].to(h.dtype))
            out.append(h)
        return torch.cat(out, 1).to(torch.get_default_dtype())


# --- autocast -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("first", ["model", "optimized"])
def test_the_call_inside_autocast(first: str, grad: bool) -> None:
    """Casts of weights are kept by autocast for the region: neither side gets the other's."""
    model = made(Toy, torch.float32)
    fast = rmtcompile.optimize(model)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        for segments in (3, 1, 5):
            calls = (model, fast) if first == "model" else (fast, model)
            one, other = (call(features(segments, dtype=torch.float32)) for call in calls)
            assert_same(one, other, 1e-2)
    assert fast.captures == 1
    with torch.no_grad():
        assert_equal_runs(model, fast, [features(3, dtype=torch.float32)])
    assert fast.captures == 2, "without autocast it is another program"


def test_an_armt_inside_autocast() -> None:
    """Its rotary angles are computed in a region without autocast."""
    model = armt("llama", torch.float32, n_layers=2)
    fast = rmtcompile.optimize(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for segments in (3, 1, 5):
            got, expected = fast(ids(segments)).logits, model(ids(segments)).logits
            assert expected.dtype == torch.bfloat16
            assert_same(expected, got, 1e-2)
    assert fast.captures == 1


@torch.no_grad()
def test_weights_are_read_anew_inside_autocast() -> None:
    model = made(Toy, torch.float32)
    fast = rmtcompile.optimize(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(features(3, dtype=torch.float32))
        fast(features(3, dtype=torch.float32))
    model.layers[1].mix.weight.mul_(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal_runs(model, fast, [features(3, dtype=torch.float32)], 1e-2)


def test_gradients_of_a_call_inside_autocast() -> None:
    model = made(Toy, torch.float32)
    twin = copy.deepcopy(model)
    for net, call in ((model, model), (twin, rmtcompile.optimize(twin))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = call(features(4, dtype=torch.float32)).float().square().sum()
        loss.backward()
        assert all(p.grad is not None for p in net.parameters())
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert_same(theirs.grad, mine.grad, 2e-2)


# --- inference, default dtype, train ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_of_gradients(mode: type) -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(model)
    for segments in (3, 1, 5):
        with mode():
            x = features(segments)
            expected, got = model(x), fast(x)
            assert got.requires_grad == expected.requires_grad
            assert_same(expected, got)


def _copied(memory: Tensor, new: Tensor) -> Tensor:
    with torch.no_grad():
        return memory.copy_(new)


def _assigned(memory: Tensor, new: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        memory[:] = new
    return memory


def _joined(memory: Tensor, new: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([new], 0)


@torch.no_grad()
def _decayed(memory: Tensor, new: Tensor) -> Tensor:
    return memory.mul_(0.5).add_(new)


class WrittenWithoutGradients(nn.Module):
    """Gradients end where a memory was written."""

    def __init__(self, write: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.write = write
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        memories = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, new = layer(h, memories[l].clone())
                memories[l] = self.write(memories[l], new)
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize("write", [_copied, _assigned, _joined, _decayed])
def test_memories_written_without_gradients(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = made(lambda: WrittenWithoutGradients(write))
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin)
    for segments in (3, 5):
        x = features(segments)
        expected, got = model(x), fast(x)
        assert_same(expected, got)
        assert fast.schedule.width == 3
        expected.square().sum().backward()
        got.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        assert_same(p.grad, q.grad)


def test_inference_mode_and_gradients_in_turn() -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(model)
    with torch.inference_mode():
        assert_same(model(features(3)), fast(features(3)))
    fast(features(4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.inference_mode():
        assert_same(model(features(5)), fast(features(5)))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def test_the_default_dtype_is_part_of_a_program() -> None:
    model = made(Dropped)
    fast = rmtcompile.optimize(model)
    for dtype in (torch.float64, torch.float32, torch.float64):
        with default_dtype(dtype):
            for segments in (3, 1, 4):
                expected = model(features(segments))
                assert expected.dtype == dtype
                assert_same(expected, fast(features(segments)))
    assert fast.captures == 2


@torch.no_grad()
def test_train_mode_without_dropout() -> None:
    model = made(Dropped).train()
    fast = rmtcompile.optimize(model)
    with default_dtype(torch.float64):
        assert_equal_runs(model, fast, [features(3), features(5)])
        model.eval()
        assert_equal_runs(model, fast, [features(3)])


@torch.no_grad()
def test_dropout_is_off_in_eval_mode() -> None:
    with default_dtype(torch.float64):
        model = made(lambda: Dropped(0.5))
        assert_equal_runs(model, rmtcompile.optimize(model), [features(3), features(4)])


# --- half precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_half_precision_is_no_further_from_float64(dtype: torch.dtype) -> None:
    model = armt("llama", torch.float64, n_layers=2).to(dtype)
    exact = copy.deepcopy(model).to(torch.float64)
    fast = rmtcompile.optimize(model)
    mine = theirs = 0.0
    for segments in (3, 1, 8):
        reference = exact(ids(segments)).logits
        got, sequential = fast(ids(segments)).logits, model(ids(segments)).logits
        assert got.dtype == sequential.dtype == dtype
        mine += float((got.double() - reference).norm() ** 2)
        theirs += float((sequential.double() - reference).norm() ** 2)
    assert mine**0.5 <= 1.05 * theirs**0.5 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@torch.no_grad()
def test_the_head_on_one_position_in_half_precision(dtype: torch.dtype) -> None:
    model = armt("gpt2", torch.float64, n_layers=2).to(dtype)
    last = lambda ids: model(ids).logits[:, -1]  # noqa: E731
    fast = rmtcompile.optimize(last)
    for segments in (3, 5):
        assert_same(last(ids(segments)), fast(ids(segments)), 1e-5 if dtype == torch.float32 else 2e-2)
