"""turned.py: the gradient of a weight is made in the layout of the weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_function, default_partition, nop
from inductor_graphs import all_but, needs_compiler
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from toys import assert_same

from rmtcompile.passes.cell.inductor import JOINT, Passes
from rmtcompile.passes.cell.inductor.turned import turned

aten = torch.ops.aten


def linear(x: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(x, w.mT).tanh()


def two(x: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(F.silu(torch.bmm(x, w.mT)), x.mT)


CASES = [linear, two]


def arguments() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((3, 5, 4), (3, 4, 4))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def joint(
    function: Callable[..., Tensor], change: Callable[[fx.Graph], None]
) -> tuple[fx.Graph, list[Tensor]]:
    """The joint graph after `change`, and what it gives: results and gradients."""
    kept: list[fx.Graph] = []
    args = arguments()

    def partition(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        change(module.graph)
        module.graph.lint()
        module.recompile()
        kept.append(module.graph)
        return default_partition(module, inputs, **options)

    result = aot_function(
        function, fw_compiler=nop, partition_fn=partition, decompositions=select_decomp_table()
    )(*args)
    result.square().sum().backward()
    return kept[0], [result.detach(), *(x.grad for x in args if x.grad is not None)]


@pytest.mark.parametrize("function", CASES)
def test_equal_and_along(function: Callable[..., Tensor]) -> None:
    before, plain = joint(function, lambda graph: None)
    after, other = joint(function, turned)
    assert str(before) != str(after), "the pass found nothing"
    for x, y in zip(plain, other, strict=True):
        assert_same(x, y)
    outputs = after.output_node().all_input_nodes
    assert not any(_lies_across(node) for node in outputs)


def _lies_across(node: fx.Node) -> bool:
    return node.target is aten.permute.default and node.args[0].target is aten.bmm.default


def test_what_the_forward_returns_stays() -> None:
    """A result that is a transposed product has the strides that the model's has."""
    before, _ = joint(lambda x, w: torch.bmm(x, w).mT, lambda graph: None)
    after, _ = joint(lambda x, w: torch.bmm(x, w).mT, turned)
    assert [_lies_across(node) for node in after.output_node().all_input_nodes][:1] == [True]
    assert [_lies_across(node) for node in before.output_node().all_input_nodes][:1] == [True]


@needs_compiler
def test_compiled() -> None:
    gradients = []
    for options in (None, {JOINT: Passes(all_but("turned"), JOINT)}):
        torch.compiler.reset()
        args = arguments()
        torch.compile(two, fullgraph=True, options=options)(*args).square().sum().backward()
        gradients.append([x.grad for x in args])
    assert_same(gradients[0], gradients[1])
    assert gradients[1][1].is_contiguous()
