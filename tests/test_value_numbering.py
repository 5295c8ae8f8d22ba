"""passes/flat/value_numbering.py: equal values become one node, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from rmtcompile.passes.flat.value_numbering import is_numberable, is_random, key_of, number_values


def traced(fn: Callable[..., object], *args: Tensor) -> fx.GraphModule:
    return make_fx(fn, pre_dispatch=True)(*args)


def names(module: fx.GraphModule) -> list[str]:
    return [node.target._opname for node in module.graph.nodes if node.op == "call_function"]


X = torch.randn(2, 3)


def test_fires() -> None:
    module = number_values(traced(lambda x: x.sin() + x.sin(), X))
    assert names(module) == ["sin", "add"]


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.sin() + x.cos(),
        lambda x: x * 1 + x * 1.0,
        lambda x: x.sum(0) + x.t().sum(1),
        lambda x: x.sub(x.sin()) + x.sin().sub(x),
    ],
)
def test_leaves_other_values_alone(fn: Callable[[Tensor], Tensor]) -> None:
    module = traced(fn, X)
    before = len(set(names(module)))
    again = number_values(number_values(module))
    assert torch.equal(again(X), fn(X))
    assert len(set(names(again))) == before


def test_nothing_to_do_gives_the_same_graph() -> None:
    module = traced(lambda x: x.sin().cos(), X)
    before = str(module.graph)
    assert number_values(module) is module and str(module.graph) == before


def test_keeps_bits() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        a = torch.softmax(x, -1) @ x.t()
        b = torch.softmax(x, -1) @ x.t()
        return a + b, torch.full((2,), float("nan")), x.to(torch.float64), x.to(torch.float32)

    expected = fn(X)
    module = number_values(traced(fn, X))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(expected, module(X), strict=True))
    assert names(module).count("softmax") == 1


def test_several_users_and_chains() -> None:
    """One step merges, and what read it merges in turn."""

    def fn(x: Tensor) -> Tensor:
        total = x
        for _ in range(4):
            total = total + F.gelu(x.sin().cos() * 2)
        return total

    assert sorted(names(number_values(traced(fn, X)))) == ["add"] * 4 + ["cos", "gelu", "mul", "sin"]


def test_scopes_of_all_that_were_merged() -> None:
    module = traced(lambda x: x.sin() + x.sin() + x.sin(), X)
    sines = [node for node in module.graph.nodes if "sin" in node.name]
    for i, node in enumerate(sines):
        node.meta["scope"] = (i,)
    number_values(module)
    assert sines[0].meta["scopes"] == {(0,), (1,), (2,)}


def test_contexts_keep_values_apart() -> None:
    """The same operation under autocast is another value."""
    module = traced(lambda x: x.sin() + x.sin(), X)
    first = next(node for node in module.graph.nodes if "sin" in node.name)
    first.meta["context"] = ("torch.autocast('cpu')",)
    assert names(number_values(module)).count("sin") == 2


def test_random_numbers_are_never_merged() -> None:
    module = traced(lambda x: F.dropout(x, 0.5, True) + F.dropout(x, 0.5, True), X)
    drops = [node for node in module.graph.nodes if "dropout" in node.name]
    assert len(drops) == 2 and all(is_random(node) and not is_numberable(node) for node in drops)
    assert names(number_values(module)).count("dropout") == 2


def test_dropout_that_drops_nothing_is_a_value() -> None:
    module = traced(lambda x: F.dropout(x, 0.5, False) + F.dropout(x, 0.5, False), X)
    assert names(number_values(module)).count("dropout") <= 1
    assert not any(is_random(node) for node in module.graph.nodes if node.op == "call_function")


def test_attention_without_dropout_is_a_value() -> None:
    q = torch.randn(1, 2, 3, 4)
    module = traced(
        lambda q: F.scaled_dot_product_attention(q, q, q) + F.scaled_dot_product_attention(q, q, q), q
    )
    assert names(number_values(module)).count("scaled_dot_product_attention") == 1


@pytest.mark.parametrize(
    ("a", "b"), [(1, 1.0), (1, True), (0, False), ([1], (1,)), (slice(1), slice(0, 1)), (None, 0)]
)
def test_keys_keep_types_apart(a: object, b: object) -> None:
    assert key_of(a) != key_of(b)
    assert key_of(a) == key_of(a) and hash(key_of(a)) == hash(key_of(a))


def test_nan_equals_itself() -> None:
    assert key_of(float("nan")) == key_of(float("nan"))
