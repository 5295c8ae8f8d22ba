"""Fusing linears: fires on parallel ones, leaves others alone, keeps values, names the leaves in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from rmtcompile.ir.weights import Weight
from rmtcompile.passes.cell.fuse_linears import fuse_linears, joined
from rmtcompile.passes.cell.lift import lift

aten = torch.ops.aten


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def trace(cell: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> fx.Graph:
    """The graph of one cell, with placeholders named as its inputs."""
    graph = make_fx(cell, tracing_mode="fake", pre_dispatch=True)(*inputs.values()).graph
    for name, node in zip(inputs, graph.nodes):
        node.target = node.name = name
    return graph


def weights_of(inputs: Mapping[str, torch.Tensor], layers: int = 2) -> dict[str, Weight]:
    """Weights for all inputs whose name starts with w or b."""
    names = [name for name in inputs if name[0] in "wb"]
    return {name: Weight(tuple((f"layers.{i}.{name}",) for i in range(layers))) for name in names}


def count(graph: fx.Graph, op: Any) -> int:
    return sum(node.target is op for node in graph.nodes)


def run(graph: fx.Graph, weights: Mapping[str, Weight], inputs: Mapping[str, torch.Tensor]) -> Any:
    """Run with each weight placeholder filled from layer 0's leaves, concatenated."""
    leaves = {f"layers.0.{name}": value for name, value in inputs.items()}
    args = [
        torch.cat([leaves[part] for part in weights[node.name].leaves[0]])
        if node.name in weights
        else inputs[node.target]
        for node in graph.nodes
        if node.op == "placeholder"
    ]
    return fx.GraphModule(nn.Module(), graph)(*args)


def assert_same(
    cell: Callable[..., Any], inputs: Mapping[str, torch.Tensor]
) -> tuple[fx.Graph, Mapping[str, Weight]]:
    graph, weights = trace(cell, inputs), weights_of(inputs)
    before = str(graph)
    fused, fused_weights = fuse_linears(graph, weights)
    assert (str(graph), weights) == (before, weights_of(inputs))
    torch.testing.assert_close(
        run(fused, fused_weights, inputs), cell(*inputs.values()), rtol=1e-12, atol=1e-12
    )
    fused.lint()
    return fused, fused_weights


def assert_left_alone(cell: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> None:
    graph, weights = trace(cell, inputs), weights_of(inputs)
    fused, fused_weights = fuse_linears(graph, weights)
    assert fused is graph
    assert fused_weights is weights


def test_fires_on_query_key_value() -> None:
    def cell(x: Any, wq: Any, wk: Any, wv: Any) -> Any:
        q, k, v = (F.linear(x, w).view(2, 5, -1, 2).transpose(1, 2) for w in (wq, wk, wv))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(2, 5, -1)

    inputs = {"x": rand(2, 5, 6), "wq": rand(8, 6), "wk": rand(4, 6), "wv": rand(4, 6)}
    fused, weights = assert_same(cell, inputs)
    assert (count(fused, aten.linear.default), count(fused, aten.split_with_sizes.default)) == (1, 1)
    assert weights == {
        "wq_wk_wv": Weight(
            (
                ("layers.0.wq", "layers.0.wk", "layers.0.wv"),
                ("layers.1.wq", "layers.1.wk", "layers.1.wv"),
            )
        )
    }
    assert [node.target for node in fused.nodes if node.op == "placeholder"] == ["x", "wq_wk_wv"]


def test_fires_with_biases() -> None:
    def cell(x: Any, w_gate: Any, b_gate: Any, w_up: Any, b_up: Any) -> Any:
        return F.silu(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up)

    inputs = {"x": rand(5, 6), "w_gate": rand(4, 6), "b_gate": rand(4), "w_up": rand(4, 6), "b_up": rand(4)}
    fused, weights = assert_same(cell, inputs)
    assert count(fused, aten.linear.default) == 1
    assert list(weights) == ["w_gate_up", "b_gate_up"]
    assert weights["b_gate_up"].leaves[1] == ("layers.1.b_gate", "layers.1.b_up")


def test_linears_with_and_without_bias_are_not_mixed() -> None:
    def cell(x: Any, wq: Any, bq: Any, wk: Any) -> Any:
        return F.linear(x, wq, bq) + F.linear(x, wk)

    assert_left_alone(cell, {"x": rand(5, 6), "wq": rand(4, 6), "bq": rand(4), "wk": rand(4, 6)})


def test_several_users_and_results_that_are_outputs() -> None:
    def cell(x: Any, w0: Any, w1: Any) -> Any:
        a, b = F.linear(x, w0), F.linear(x, w1)
        return a, b * a + a.sum(), b

    fused, _ = assert_same(cell, {"x": rand(5, 6), "w0": rand(4, 6), "w1": rand(4, 6)})
    assert count(fused, aten.linear.default) == 1


def test_nested_chain_fuses_each_stage_of_it() -> None:
    def cell(x: Any, w0: Any, w1: Any, w2: Any, w3: Any, w4: Any) -> Any:
        y = F.linear(x, w0) * F.linear(x, w1)
        z = F.linear(y, w2) + F.linear(x, w3)
        return z + F.linear(y, w4)

    inputs = {"x": rand(5, 4)} | {f"w{i}": rand(4, 4) for i in range(5)}
    fused, weights = assert_same(cell, inputs)
    assert count(fused, aten.linear.default) == 2
    assert {tuple(len(layer) for layer in w.leaves) for w in weights.values()} == {(3, 3), (2, 2)}


def test_vector_input() -> None:
    fused, _ = assert_same(
        lambda x, w0, w1: F.linear(x, w0).sum() + F.linear(x, w1),
        {"x": rand(6), "w0": rand(3, 6), "w1": rand(2, 6)},
    )
    assert count(fused, aten.linear.default) == 1


LEFT_ALONE: dict[str, tuple[Callable[..., Any], dict[str, torch.Tensor]]] = {
    "one_linear": (F.linear, {"x": rand(5, 4), "w": rand(4, 4)}),
    "other_inputs": (
        lambda x, y, w0, w1: F.linear(x, w0) + F.linear(y, w1),
        {"x": rand(5, 4), "y": rand(5, 4), "w0": rand(4, 4), "w1": rand(4, 4)},
    ),
    "weight_read_elsewhere": (
        lambda x, w0, w1: F.linear(x, w0) + F.linear(x, w1) + w1.sum(),
        {"x": rand(5, 4), "w0": rand(4, 4), "w1": rand(4, 4)},
    ),
    "one_weight_twice": (
        lambda x, w0, w1: F.linear(x, w0) + F.linear(x, w0) + F.linear(x, w1),
        {"x": rand(5, 4), "w0": rand(4, 4), "w1": rand(4, 4)},
    ),
    "not_a_parameter": (
        lambda x, w0, carry: F.linear(x, w0) + F.linear(x, carry),
        {"x": rand(5, 4), "w0": rand(4, 4), "carry": rand(4, 4)},
    ),
    "computed_weight": (
        lambda x, w0, w1: F.linear(x, w0) + F.linear(x, w1 * 2),
        {"x": rand(5, 4), "w0": rand(4, 4), "w1": rand(4, 4)},
    ),
    "vector_weight": (
        lambda x, w0, w1: F.linear(x, w0) + F.linear(x, w1),
        {"x": rand(5, 4), "w0": rand(4), "w1": rand(4)},
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_leaves_others_alone(name: str) -> None:
    assert_left_alone(*LEFT_ALONE[name])


def test_weights_of_other_layer_counts_are_left_alone() -> None:
    inputs = {"x": rand(5, 4), "w0": rand(4, 4), "w1": rand(4, 4)}
    graph = trace(lambda x, w0, w1: F.linear(x, w0) + F.linear(x, w1), inputs)
    weights = weights_of(inputs, 2) | {"w1": Weight((("shared",),))}
    assert fuse_linears(graph, weights)[0] is graph


def test_linears_of_other_autocast_regions_are_left_alone() -> None:
    inputs = {"x": rand(5, 4), "w0": rand(4, 4), "w1": rand(4, 4)}
    graph = trace(lambda x, w0, w1: F.linear(x, w0) + F.linear(x, w1), inputs)
    linear = next(node for node in graph.nodes if node.target is aten.linear.default)
    linear.meta["context"] = ("torch.autocast('cpu', torch.bfloat16, True, True)",)
    assert fuse_linears(graph, weights_of(inputs))[0] is graph


def test_views_of_parts_that_are_not_contiguous() -> None:
    def cell(x: Any, w0: Any, w1: Any) -> Any:
        return F.linear(x, w0).view(-1) + F.linear(x, w1).view(2, 5, 2, 2).view(2, 10, 2).sum()

    fused, _ = assert_same(cell, {"x": rand(2, 5, 6), "w0": rand(4, 6), "w1": rand(4, 6)})
    assert count(fused, aten.view.default) == 0


def test_lifts_after_fusing() -> None:
    def cell(x: Any, w0: Any, w1: Any) -> Any:
        return F.silu(F.linear(x, w0)).view(10, 4) * F.linear(x, w1).view(10, 4)

    inputs = {"x": rand(2, 5, 6), "w0": rand(4, 6), "w1": rand(4, 6)}
    fused, _ = assert_same(cell, inputs)
    lifted = lift(fused, ["x", "w0_w1"])
    x, w0, w1 = rand(3, 2, 5, 6), rand(3, 4, 6), rand(3, 4, 6)
    got = fx.GraphModule(nn.Module(), lifted.graph)(x, torch.cat([w0, w1], 1))
    torch.testing.assert_close(got, torch.stack(list(map(cell, x, w0, w1))), rtol=1e-12, atol=1e-12)


def test_meta_of_new_nodes() -> None:
    inputs = {"x": rand(5, 4), "w0": rand(4, 4), "w1": rand(3, 4)}
    graph = trace(lambda x, w0, w1: F.linear(x, w0).sum() + F.linear(x, w1), inputs)
    for i, node in enumerate(graph.nodes):
        node.meta |= {"source": f"model.py:{i}"}
    fused, _ = fuse_linears(graph, weights_of(inputs))
    whole = next(node for node in fused.nodes if node.target is aten.linear.default)
    assert list(whole.meta["val"].shape) == [5, 7]
    assert whole.meta["source"] == "model.py:3"
    assert [list(user.meta["val"].shape) for user in next(iter(whole.users)).users] == [[5, 4], [5, 3]]
    assert all("val" in node.meta for node in fused.nodes if node.op != "output")


def test_name_of_a_fused_placeholder_says_what_is_shared_once() -> None:
    assert joined(["attn_q_proj_weight", "attn_k_proj_weight"]) == "attn_q_k_proj_weight"
    assert joined(["gate", "up"]) == "gate_up"
    assert joined(["w", "w_1"]) == "w_w_1"
    inputs = {"w0_w1": rand(5, 4), "w0": rand(4, 4), "w1": rand(4, 4)}
    graph = trace(lambda x, w0, w1: F.linear(x, w0) + F.linear(x, w1), inputs)
    _, weights = fuse_linears(graph, {name: Weight(((name,),)) for name in ("w0", "w1")})
    assert list(weights) == ["w0_w1_1"]


def test_layers_with_other_numbers_of_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="layers differ in their number of parts"):
        Weight((("a", "b"), ("c",)))
