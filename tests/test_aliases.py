"""Aliases: operations with several names are known by one."""

from __future__ import annotations

import pytest
import torch
from traced import StrictRun, capture

from rmtcompile.passes.flat.aliases import aliases
from rmtcompile.passes.flat.functionalise import functionalise, overload_name


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda a, b: (a > 0) & (b > 0), "bitwise_and"),
        (lambda a, b: (a > 0) | (b > 0), "bitwise_or"),
        (lambda a, b: (a > 0) ^ (b > 0), "bitwise_xor"),
        (lambda a, b: torch.concat([a, b], 1), "cat"),
        (torch.multiply, "mul"),
        (lambda a, b: torch.subtract(a, b, alpha=2), "sub"),
        (torch.true_divide, "div"),
        (lambda a, b: torch.divide(a, b, rounding_mode="floor"), "div"),
        (lambda a, b: a.greater(b), "gt"),
        (lambda a, b: torch.clip(a, -0.5, 0.5) + b, "clamp"),
        (lambda a, b: a.negative() + b, "neg"),
    ],
)
def test_one_name(f, name: str) -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    functional = functionalise(capture(f, a, b)).module
    module = aliases(functional)
    assert name in {overload_name(node) for node in module.graph.nodes}
    found = StrictRun(module).run(a, b)
    assert torch.equal(torch.utils._pytree.tree_leaves(found)[0], f(a, b))
    assert aliases(module) is module
