"""Cast weights: conversions of weights leave the cells, with the same bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from test_autocast import Around
from test_fuse_linears import rand, trace, weights_of
from toys import assert_same, features, made

import rmtcompile
from rmtcompile.ir.weights import Weight
from rmtcompile.passes.cell.cast_weights import cast_weights, conversions
from rmtcompile.passes.cell.fuse_linears import fuse_linears

aten = torch.ops.aten


def test_a_converted_weight_becomes_a_placeholder() -> None:
    def cell(x: Any, w0: Any, w1: Any) -> Any:
        y = x.float()
        return F.linear(y, w0.float()) + F.linear(y, w1.float()) + w1.sum()

    inputs = {"x": rand(5, 4), "w0": rand(4, 4), "w1": rand(4, 4)}
    graph = trace(cell, inputs)
    weights = weights_of(inputs)
    new, found = cast_weights(graph, weights)
    assert [n.name for n in new.nodes if n.op == "placeholder"] == ["x", "w0_float32", "w1_float32", "w1"]
    assert found["w0_float32"] == Weight(weights["w0"].leaves, torch.float32)
    assert "w0" not in found and found["w1"] == weights["w1"]
    assert not conversions(new, found)
    assert new.lint() is None
    x, w0, w1 = inputs.values()
    got = torch.fx.GraphModule({}, new)(x, w0.float(), w1.float(), w1)
    assert torch.equal(got, cell(x, w0, w1))
    fused, parts = fuse_linears(new, found)
    assert sum(node.target is aten.linear.default for node in fused.nodes) == 1
    assert [weight.dtype for weight in parts.values()].count(torch.float32) == 1


def test_nothing_to_convert_gives_the_same_objects() -> None:
    inputs = {"x": rand(5, 4), "w0": rand(4, 4)}
    graph, weights = trace(lambda x, w0: F.linear(x.float(), w0.to(x)), inputs), weights_of(inputs)
    assert cast_weights(graph, weights) == (graph, weights)


def test_a_run_converts_once() -> None:
    model = made(Around, torch.float32)
    fast = rmtcompile.optimize(model)
    with torch.no_grad():
        for segments in (1, 5):
            x = features(segments, dtype=torch.float32)
            assert_same(model(x), fast(x), 1e-6)
    assert "weight layers.0.mix.weight as bfloat16" in fast.code
    x = features(4, dtype=torch.float32)
    mine, theirs = (torch.autograd.grad(f(x).square().sum(), list(model.parameters())) for f in (fast, model))
    assert_same(theirs, mine, 1e-2)
