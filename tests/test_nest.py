"""nest: a join that begins with what an earlier one holds reads that join."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from rmtcompile.passes.flat.functionalise import overload_name
from rmtcompile.passes.flat.nest import grows, nest

PARTS = [torch.randn(2, 3) for _ in range(4)]
Join = Callable[[Sequence[Tensor]], list[Tensor]]


def run(f: Join, inside: bool = True) -> tuple[list[tuple[str, int]], bool]:
    """The joins that are left, each with its number of parts, and whether a list grows."""
    gm = make_fx(lambda *parts: f(parts), tracing_mode="fake", pre_dispatch=True)(*PARTS)
    is_growing = grows(gm.graph, lambda node: inside)
    found = nest(gm, lambda node: inside)
    assert found is gm
    found.graph.lint()
    for a, b in zip(found(*PARTS), f(PARTS), strict=True):
        assert torch.equal(a, b)
    joins = [node for node in found.graph.nodes if overload_name(node) in ("cat", "stack")]
    assert all(isinstance(node.meta["val"], Tensor) for node in joins)
    return [(overload_name(node), len(node.args[0])) for node in joins], is_growing


@pytest.mark.parametrize(
    ("f", "left", "is_growing"),
    [
        (lambda p: [torch.cat(p[:n], 1) for n in (2, 3, 4)], [("cat", 2)] * 3, True),
        (lambda p: [torch.stack(p[:n], 1) for n in (1, 2, 3)], [("stack", 1), ("cat", 2), ("cat", 2)], True),
        (lambda p: [torch.cat(p[:2], 1), torch.cat(p[:4], -1)], [("cat", 2), ("cat", 3)], True),
        (lambda p: [torch.cat(p[:2], 0), torch.cat(p[:3], 1)], [("cat", 2), ("cat", 3)], False),
        (lambda p: [torch.cat(p[n : n + 2], 1) for n in (0, 1, 2)], [("cat", 2)] * 3, False),
        (lambda p: [torch.stack(p[:2], 1), torch.cat(p[:3], 1)], [("stack", 2), ("cat", 3)], False),
        (lambda p: [torch.cat([p[0], p[1].double()]), torch.cat(p[:3])], [("cat", 2), ("cat", 3)], False),
    ],
)
def test_joins(f: Any, left: list[tuple[str, int]], is_growing: bool) -> None:
    assert run(f) == (left, is_growing)


def test_what_lies_in_no_layer_stays() -> None:
    assert run(lambda p: [torch.cat(p[:n], 1) for n in (2, 3, 4)], inside=False)[0] == [
        ("cat", 2), ("cat", 3), ("cat", 4)
    ]  # fmt: skip
