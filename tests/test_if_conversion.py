"""passes/grid/if_conversion/: classes share one graph, and each still computes what its body computes."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from test_reroll import FirstDiffers, Kept, rules
from torch import Tensor, fx
from toys import Toy

from rmtcompile.passes.grid.if_conversion import Merged, class_name, if_convert
from rmtcompile.passes.grid.partition import CELL
from rmtcompile.passes.grid.reroll import ClassRule


def random_like(val: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(val.dim())
    return torch.randn(val.shape, generator=generator, dtype=torch.float64).to(val.dtype)


def evaluate(nodes: Any, values: dict[fx.Node, Any]) -> None:
    for node in nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = (
            operator.getitem(*args) if node.target is operator.getitem else node.target(*args, **kwargs)
        )


def assert_computes(merged: Merged, found: dict[int, ClassRule]) -> None:
    """For each class, the merged graph with its mask set gives every operation of the class's body."""
    for number in merged.classes:
        rule = found[number]
        inputs = [random_like(node.meta["val"]) for node in rule.body.live_ins]
        values: dict[fx.Node, Any] = dict(zip(rule.body.live_ins, inputs, strict=True))
        evaluate(rule.body.nodes, values)
        got: dict[fx.Node, Any] = {}
        for node, index in merged.live_ins.items():
            val = node.meta["val"]
            got[node] = (
                inputs[index[number]].expand(val.shape)
                if number in index
                else torch.ones_like(random_like(val))
            )
        for c, mask in merged.masks.items():
            got[mask] = torch.tensor(c == number) | got.get(mask, torch.tensor(False))
        evaluate([node for node in merged.graph.nodes if node.op == "call_function"], got)
        for mine, theirs in zip(merged.values[number], rule.body.nodes, strict=True):
            assert torch.equal(got[mine], values[theirs])


@pytest.mark.parametrize("build", [Kept, FirstDiffers, Toy])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_each_class_computes_what_it_did(build: Any, layer: int) -> None:
    rolled = rules(build)
    found = rolled.rules[(CELL, layer)]
    merged = if_convert(found, rolled.classes[(CELL, layer)].head)
    assert sorted(c for one in merged for c in one.classes) == sorted(found)
    for one in merged:
        assert_computes(one, found)


def test_one_class_needs_no_mask() -> None:
    (merged,) = if_convert(rules(Kept).rules[(CELL, 1)], 0)
    assert merged.masks == {} and merged.classes == (0,)
    assert not any("where" in node.name for node in merged.graph.nodes)


def test_a_first_segment_that_does_less_shares_the_rest() -> None:
    found = rules(FirstDiffers).rules[(CELL, 1)]
    (merged,) = if_convert(found, 1)
    operations = [node for node in merged.graph.nodes if node.op == "call_function"]
    selections = [node for node in operations if node.target is torch.ops.aten.where.self]
    assert set(merged.masks) == {0} and merged.masks[0].name == "is_first"
    assert selections
    alone = sum(len(rule.body.nodes) for rule in found.values())
    assert len(operations) - len(selections) < alone
    assert sum("tanh" in node.name for node in operations) == 1


def test_deterministic() -> None:
    found = rules(FirstDiffers).rules[(CELL, 1)]
    assert [str(m.graph) for m in if_convert(found, 1)] == [
        str(m.graph) for m in if_convert(dict(reversed(found.items())), 1)
    ]


def test_names_of_classes() -> None:
    assert [class_name(n) for n in (0, 1, -1, -2)] == ["first", "segment1", "last", "last2"]
