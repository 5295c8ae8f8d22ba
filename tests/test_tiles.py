"""tiles: a list that holds the same part again and again says how often."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from rmtcompile.passes.flat.functionalise import overload_name
from rmtcompile.passes.flat.tiles import repetitions, tiles

P, Q = torch.randn(2, 3), torch.randn(2, 3)


def run(f: Callable[[Tensor, Tensor], Tensor], inside: bool = False) -> tuple[fx.GraphModule, list[str]]:
    """The pass on a capture, compared with the callable; the operations that are left."""
    gm = make_fx(f, tracing_mode="fake", pre_dispatch=True)(P, Q)
    found = tiles(gm, lambda node: inside)
    assert found is gm
    found.graph.lint()
    assert torch.equal(found(P, Q), f(P, Q))
    for node in found.graph.nodes:
        if overload_name(node):
            assert isinstance(node.meta["val"], Tensor)
    return found, [overload_name(node) for node in found.graph.nodes if overload_name(node)]


@pytest.mark.parametrize(
    ("f", "left"),
    [
        (lambda p, q: torch.cat([p] * 4, 1), ["repeat"]),
        (lambda p, q: torch.cat([p] * 3 + [q], 0), ["repeat", "cat"]),
        (lambda p, q: torch.cat([q] + [p] * 3, -1), ["repeat", "cat"]),
        (lambda p, q: torch.cat([p, q] * 3, 0), ["cat", "repeat"]),
        (lambda p, q: torch.cat([p] * 3 + [q] * 3, 0), ["repeat", "repeat", "cat"]),
        (lambda p, q: torch.stack([p] * 3, 1), ["unsqueeze", "repeat"]),
        (lambda p, q: torch.cat([p, p], 1), ["cat"]),
        (lambda p, q: torch.cat([p, q, p], 1), ["cat"]),
    ],
)
def test_what_repeats(f: Callable[[Tensor, Tensor], Tensor], left: list[str]) -> None:
    assert run(f)[1] == left


def test_what_converts_or_lies_in_a_layer_stays() -> None:
    mixed = lambda p, q: torch.cat([p, p, p, q.double()], 0)  # noqa: E731
    assert run(mixed)[1] == ["to", "cat"] or run(mixed)[1] == ["_to_copy", "cat"]
    assert run(lambda p, q: torch.cat([p] * 4, 1), inside=True)[1] == ["cat"]


def test_repetitions() -> None:
    graph = fx.Graph()
    a, b, c = (graph.placeholder(name) for name in "abc")
    assert list(repetitions([a, b, c, b, c, b, c, b])) == [([a], 1), ([b, c], 3), ([b], 1)]
    assert list(repetitions([])) == []
    assert list(repetitions([a, a, b])) == [([a, a, b], 1)]
