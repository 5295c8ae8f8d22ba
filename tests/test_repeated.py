"""repeated.py, fakes.py: a forward is captured as if each of its operations was computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_end_to_end import armt
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from zoo.others import ZOO

from rmtcompile.binding.captured import Capture
from rmtcompile.frontend.capture import capture
from rmtcompile.ir import fakes


def look(value: Any, memories: dict[int, int]) -> Any:
    """A fake tensor in all that the passes may ask of it; memories by the order in which they appear."""
    if not isinstance(value, Tensor):
        return value
    assert type(value) is FakeTensor
    memory = memories.setdefault(value.untyped_storage()._cdata, len(memories))
    place = (memory, value.storage_offset(), value.untyped_storage().nbytes())
    return *place, tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad


def described(captured: Capture) -> list[Any]:
    """Every node with its operands, its value, and what is noted of it."""
    index = {node: i for i, node in enumerate(captured.graph.nodes)}
    memories: dict[int, int] = {}
    found: list[Any] = []
    for node in captured.graph.nodes:
        target = captured.leaves[node.target].name if node.op == "get_attr" else str(node.target)
        operands = torch.fx.node.map_arg((node.args, node.kwargs), index.__getitem__)
        meta = [node.meta.get(key) for key in ("scope", "source", "context")]
        value = pytree.tree_map(lambda x: look(x, memories), node.meta.get("val"))
        found.append((node.op, target, str(operands), meta, value if node.op != "get_attr" else None))
    return found


def assert_captured_alike(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[], Callable[..., Any]], *inputs: Any
) -> None:
    """The capture with all operations computed, with those of its own repeated, with all known before."""
    with monkeypatch.context() as patched:
        patched.setattr(fakes, "_is_settled", lambda func: False)
        expected = described(capture(build(), inputs, {}))
    monkeypatch.setattr(fakes, "_answers", {})
    model = build()
    assert described(capture(model, inputs, {})) == expected
    assert described(capture(model, inputs, {})) == expected
    assert fakes._answers


@torch.no_grad()
@pytest.mark.parametrize("name", ["in_place", "alias_trap", "sliced_state", "rolled_memories", "buffer_copy"])
def test_zoo(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_captured_alike(monkeypatch, ZOO[name].build, *ZOO[name].inputs(2, 3))


@torch.no_grad()
def test_armt(monkeypatch: pytest.MonkeyPatch) -> None:
    build = lambda: armt("llama", torch.float64, n_layers=2)  # noqa: E731
    assert_captured_alike(monkeypatch, build, torch.randint(0, 32, (1, 16)))


class Odd(nn.Module):
    """Views and writes into them, what gives its operand itself, constants, lists of results."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for part in x.split(3, 1):
            y = nn.functional.dropout(part.to(part.dtype).contiguous(), 0.5, False)
            a, b = (y @ torch.einsum("ij->ji", self.weight)).chunk(2, -1)
            z = torch.cat([b, a], -1).reshape(-1, 4).detach()
            w = z.clone().view(part.shape)
            w[:, 0].add_(1)
            w.transpose(0, 1)[1:].mul_(self.table * torch.tensor(2.0) + torch.tensor([1.0]))
            values, indices = w.topk(2, -1)
            mean = values.mean() if part.dtype.is_floating_point else 0.0
            out.append(w + (indices.sum(-1, keepdim=True) > 1) * mean + w.T.T.conj().real.mT.mT)
        return torch.stack(out, 1).flatten(1, 2)


@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_odd_operations(has_gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.set_grad_enabled(has_gradients):
        assert_captured_alike(monkeypatch, Odd, torch.randn(2, 9, 4))


@torch.no_grad()
def test_settings_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same operands give something else under another default dtype."""
    before = torch.get_default_dtype()
    ints = torch.arange(6)
    monkeypatch.setattr(fakes, "_answers", {})
    types = []
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            captured = capture(lambda x: x / 2, (ints,), {})
            types += [node.meta["val"].dtype for node in captured.graph.nodes if node.op == "call_function"]
    finally:
        torch.set_default_dtype(before)
    assert types == [torch.float32, torch.float64]


class Twice(nn.Module):
    """The same operations on one tensor twice, and on two."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x.sin()
        once = torch.atleast_2d(x, x), torch.broadcast_tensors(x, x)
        both = torch.atleast_2d(x, y), torch.broadcast_tensors(x, y)
        parts = y.split(2, 1)
        return *once[0], *once[1], *both[0], *both[1], torch.broadcast_tensors(parts[0], parts[1])[1]


def test_which_operands_are_one_tensor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_captured_alike(monkeypatch, Twice, x)
    module = capture(Twice(), (x,), {}).module
    for expected, got in zip(Twice()(x), module(x), strict=True):
        assert torch.equal(expected, got)


class SplitAt(nn.Module):
    """Sizes that two buffers of one shape hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.tensor([1, 3]))
        self.register_buffer("other", torch.tensor([2, 3]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return *x.tensor_split(self.one, 1), *x.tensor_split(self.other, 1)


def test_integers_that_are_sizes_are_asked_each_time() -> None:
    captured = capture(SplitAt(), (torch.randn(2, 4),), {})
    shapes = [node.meta["val"].shape[1] for node in captured.outputs]
    assert shapes == [1, 2, 1, 2, 1, 1]
