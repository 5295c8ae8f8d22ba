"""rmtcompile/frontend/capture.py: one flat graph, replayed exactly, and a module that is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from toys import SEGMENT, AttributeState, Layer, Toy, assert_same, features, made

from rmtcompile.binding.captured import Capture, Out
from rmtcompile.errors import CaptureError
from rmtcompile.frontend.capture import capture


def replay(captured: Capture, *tensors: Tensor) -> Any:
    """Run the graph on real tensors and rebuild the result."""
    outputs = captured.module(*tensors)
    leaves, spec = captured.result
    return pytree.tree_unflatten([outputs[x.index] if isinstance(x, Out) else x for x in leaves], spec)


@pytest.mark.parametrize("build", [Toy, AttributeState])
@torch.no_grad()
def test_replay_is_exact(build: Any) -> None:
    model, x = made(build), features(3)
    captured = capture(model, (x,), {})
    expected, got = model(x), replay(captured, x)
    assert_same(expected, got, 0)


@torch.no_grad()
def test_calls_and_scopes() -> None:
    captured = capture(made(lambda: Toy(2)), (features(3),), {})
    paths = [call.path for call in captured.calls if call.path in ("layers.0", "layers.1")]
    assert paths == ["layers.0", "layers.1"] * 3
    (root,) = [call for call in captured.calls if call.parent is None]
    assert root.path == "" and root.index == 0
    (tanh, *_) = [node for node in captured.graph.nodes if "tanh" in node.name]
    assert [captured.calls[i].path for i in tanh.meta["scope"]] == ["", "layers.0"]


@torch.no_grad()
def test_nodes_know_their_source_and_value() -> None:
    captured = capture(made(lambda: Toy(2)), (features(2),), {})
    for node in captured.graph.nodes:
        if node.op == "call_function":
            assert node.meta["source"].startswith("tests/toys.py:") or "toys.py:" in node.meta["source"]
            assert "val" in node.meta
    (tanh, *_) = [node for node in captured.graph.nodes if "tanh" in node.name]
    assert tuple(tanh.meta["val"].shape) == (2, SEGMENT, 4)


@torch.no_grad()
def test_operations_stay_whole() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            q = self.linear(x)[None]
            y = nn.functional.scaled_dot_product_attention(q, q, q)
            return torch.einsum("abcd,abed->abce", y, q)

    graph = capture(made(Whole), (features(1),), {}).graph
    names = {node.target._opname for node in graph.nodes if node.op == "call_function"}
    assert {"linear", "scaled_dot_product_attention", "einsum"} <= names


@torch.no_grad()
def test_leaves_are_found_where_the_model_keeps_them() -> None:
    model = made(lambda: Toy(2))
    captured = capture(model, (features(2),), {})
    leaves = {leaf.name: leaf for leaf in captured.leaves.values()}
    assert set(leaves) == {name for name, _ in model.named_parameters()}
    assert leaves["layers.1.mix.weight"].fetch() is model.layers[1].mix.weight
    model.layers[1].mix.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    assert leaves["layers.1.mix.weight"].fetch() is model.layers[1].mix.weight


@torch.no_grad()
def test_effects_are_what_the_forward_leaves_behind() -> None:
    model = made(lambda: AttributeState(2))
    captured = capture(model, (features(3),), {})
    effects = {effect.name: effect for effect in captured.effects}
    for l in (0, 1):
        assert effects[f"layers.{l}.count"].leaves == (3,)
        assert effects[f"layers.{l}.first"].leaves == (False,)
        assert isinstance(effects[f"layers.{l}.memory"].leaves[0], Out)


@torch.no_grad()
def test_the_module_is_left_alone() -> None:
    model = made(AttributeState)
    model(features(1))
    before = [dict(module.__dict__) for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    capture(model, (features(3),), {})
    after = [module.__dict__ for module in model.modules()]
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys() and all(old[key] is new[key] for key in old)
    assert [type(module) for module in model.modules()] == classes


@torch.no_grad()
def test_a_failing_forward_leaves_the_module_alone() -> None:
    class Fails(AttributeState):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            super().forward(x)
            raise KeyError("on purpose")

    model = made(Fails)
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(CaptureError, match="KeyError: 'on purpose'") as caught:
        capture(model, (features(2),), {})
    assert any("test_capture.py:" in line for line in caught.value.evidence)
    for old, module in zip(before, model.modules(), strict=True):
        assert all(old[key] is module.__dict__[key] for key in old)


class Writes(nn.Module):
    """A buffer that counts its calls in place, and is never reset."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.register_buffer("total", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for h in x.split(SEGMENT, 1):
            for layer in self.layers:
                h, m = layer(h, self.total)
            self.total.mul_(0.5).add_(m)
            out.append(h)
        return torch.cat(out, 1)


@torch.no_grad()
def test_in_place_writes_are_not_made() -> None:
    model = made(Writes)
    model.total.fill_(1.0)
    capture(model, (features(2),), {})
    assert torch.equal(model.total, torch.ones_like(model.total))


@torch.no_grad()
def test_closures_and_partial_arguments() -> None:
    model, x = made(Toy), features(2)
    captured = capture(lambda x, scale: model(x) * scale, (x,), {"scale": 2.0})
    assert_same(model(x) * 2.0, replay(captured, x), 0)
    assert {call.path for call in captured.calls if call.parent is None} == {"model"}


@torch.no_grad()
def test_autocast_regions_become_conversions() -> None:
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.linear(x)
            return y.float() + x.sin()

    captured = capture(Region().eval(), (torch.randn(2, 4),), {})
    names = [str(node.target) for node in captured.graph.nodes if node.op == "call_function"]
    assert names[:4] == ["aten.to.dtype"] * 3 + ["aten.linear.default"]
    assert names[4:] == ["aten.to.dtype", "aten.sin.default", "aten.add.Tensor"]
    assert not any("autocast" in node.meta for node in captured.graph.nodes)


def test_gradient_mode_is_kept() -> None:
    model, x = made(Toy), features(2)
    captured = capture(model, (x,), {})
    assert torch.is_grad_enabled()
    assert not any("grad" in str(node.target) for node in captured.graph.nodes)
    captured.module(x)[0].sum().backward()
    assert model.layers[0].mix.weight.grad is not None


@torch.no_grad()
def test_only_shapes_are_read() -> None:
    model = made(Toy)
    a = capture(model, (features(2),), {})
    b = capture(copy.deepcopy(model), (features(2) * 0,), {})
    assert str(a.graph) == str(b.graph)
