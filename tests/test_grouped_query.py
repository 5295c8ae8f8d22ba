"""Grouped query: repeats in the order of `enable_gqa` are taken, all others are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rmtcompile.passes.cell.grouped_query import grouped_query

aten = torch.ops.aten
Cell = Callable[..., Any]


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def inputs_of(kv_heads: int = 2, query_heads: int = 6) -> list[torch.Tensor]:
    return [rand(2, query_heads, 5, 4), rand(2, kv_heads, 7, 4), rand(2, kv_heads, 7, 4)]


def trace(cell: Cell, args: list[torch.Tensor]) -> fx.Graph:
    return make_fx(cell, tracing_mode="fake", pre_dispatch=True)(*args).graph


def attentions(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is aten.scaled_dot_product_attention.default]


def run(graph: fx.Graph, args: list[torch.Tensor]) -> Any:
    return fx.GraphModule(nn.Module(), graph)(*args)


def assert_grouped(cell: Cell, args: list[torch.Tensor]) -> fx.Graph:
    graph = trace(cell, args)
    before = str(graph)
    grouped = grouped_query(graph)
    assert str(graph) == before
    assert all(node.kwargs["enable_gqa"] for node in attentions(grouped))
    grouped.lint()
    torch.testing.assert_close(run(grouped, args), cell(*args), rtol=1e-12, atol=1e-12)
    return grouped


def repeat_kv(x: torch.Tensor, factor: int) -> torch.Tensor:
    batch, heads, length, width = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, factor, length, width)
    return x.reshape(batch, heads * factor, length, width)


REPEATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "repeat_kv": lambda x: repeat_kv(x, 3),
    "repeat_kv_contiguous": lambda x: repeat_kv(x, 3).contiguous().clone(),
    "interleave": lambda x: x.repeat_interleave(3, dim=1),
    "interleave_from_end": lambda x: x.repeat_interleave(3, dim=-3),
    "copy_before_merge": lambda x: x.unsqueeze(2).expand(2, 2, 3, 7, 4).clone().view(2, 6, 7, 4),
    "singleton_by_view": lambda x: x.view(2, 2, 1, 7, 4).expand(-1, -1, 3, -1, -1).flatten(1, 2),
    "before_transpose": lambda x: x.transpose(1, 2).repeat_interleave(3, 2).transpose(1, 2),
    "expand_before_transpose": lambda x: (
        x.transpose(1, 2)[:, :, :, None].expand(2, 7, 2, 3, 4).reshape(2, 7, 6, 4).transpose(2, 1)
    ),
}


@pytest.mark.parametrize("name", REPEATS)
def test_fires(name: str) -> None:
    repeat = REPEATS[name]
    grouped = assert_grouped(
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True), inputs_of()
    )
    left = {node.target for node in grouped.nodes if node.op == "call_function"}
    assert left <= {aten.transpose.int, aten.scaled_dot_product_attention.default}


def test_repeats_may_be_written_differently_and_masks_stay() -> None:
    args = [*inputs_of(), rand(2, 6, 5, 7)]
    assert_grouped(
        lambda q, k, v, m: F.scaled_dot_product_attention(
            q, repeat_kv(k, 3), v.repeat_interleave(3, 1), attn_mask=m, scale=0.3
        ),
        args,
    )


def test_one_key_value_head() -> None:
    args = inputs_of(kv_heads=1)
    assert_grouped(lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k, 6), repeat_kv(v, 6)), args)


def test_several_users_keep_the_repeat() -> None:
    def cell(q: Any, k: Any, v: Any) -> Any:
        k = repeat_kv(k, 3)
        return F.scaled_dot_product_attention(q, k, repeat_kv(v, 3)), k * 2

    grouped = assert_grouped(cell, inputs_of())
    assert sum(node.target is aten.expand.default for node in grouped.nodes) == 1


def test_nested_chain_of_attentions() -> None:
    def cell(q: Any, k: Any, v: Any) -> Any:
        k, v = repeat_kv(k, 3), repeat_kv(v, 3)
        return F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v), k, v)

    grouped = assert_grouped(cell, inputs_of())
    assert len(attentions(grouped)) == 2
    assert not any(node.target is aten.expand.default for node in grouped.nodes)


def test_key_that_is_also_value_and_query() -> None:
    def cell(x: Any) -> Any:
        x = repeat_kv(x, 3)
        return F.scaled_dot_product_attention(x, x.contiguous(), x)

    grouped = assert_grouped(cell, [rand(2, 2, 7, 4)])
    assert list(attentions(grouped)[0].args[0].meta["val"].shape) == [2, 6, 7, 4]


def attend(repeat_k: Cell, repeat_v: Cell) -> Cell:
    return lambda q, k, v: F.scaled_dot_product_attention(q, repeat_k(k), repeat_v(v))


def tile(x: torch.Tensor) -> torch.Tensor:
    return x.repeat(1, 3, 1, 1)


def tile_by_expand(x: torch.Tensor) -> torch.Tensor:
    return x[:, None].expand(2, 3, 2, 7, 4).reshape(2, 6, 7, 4)


LEFT_ALONE: dict[str, tuple[Cell, list[torch.Tensor]]] = {
    "other_order": (attend(tile, tile), inputs_of()),
    "other_order_by_expand": (attend(tile_by_expand, tile_by_expand), inputs_of()),
    "one_in_other_order": (attend(REPEATS["repeat_kv"], tile), inputs_of()),
    "only_keys": (
        attend(REPEATS["repeat_kv"], lambda v: v),
        [rand(2, 6, 5, 4), rand(2, 2, 7, 4), rand(2, 6, 7, 4)],
    ),
    "other_factors": (
        attend(lambda k: repeat_kv(k, 3), lambda v: repeat_kv(v, 2)),
        [rand(2, 6, 5, 4), rand(2, 2, 7, 4), rand(2, 3, 7, 4)],
    ),
    "along_length": (
        attend(lambda k: k.repeat_interleave(2, 2), lambda v: v.repeat_interleave(2, 2)),
        inputs_of(kv_heads=6),
    ),
    "changed_after_repeat": (attend(lambda k: repeat_kv(k, 3) * 2, REPEATS["repeat_kv"]), inputs_of()),
    "nothing_repeated": (F.scaled_dot_product_attention, inputs_of(kv_heads=6)),
    "grouped_already": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        inputs_of(),
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_leaves_others_alone(name: str) -> None:
    cell, args = LEFT_ALONE[name]
    graph = trace(cell, args)
    assert grouped_query(graph) is graph


@pytest.mark.parametrize(("dtype", "is_taken"), [(torch.bfloat16, True), (torch.float32, False)])
def test_types_without_a_kernel_are_left_alone_on_cuda(dtype: torch.dtype, is_taken: bool) -> None:
    args = [value.to(dtype) for value in inputs_of()]
    graph = trace(attend(REPEATS["interleave"], REPEATS["interleave"]), args)
    with FakeTensorMode():
        for node in graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = torch.empty(node.meta["val"].shape, dtype=dtype, device="cuda")
    assert (grouped_query(graph) is not graph) == is_taken


def test_meta_of_new_nodes() -> None:
    graph = trace(attend(REPEATS["before_transpose"], REPEATS["before_transpose"]), inputs_of())
    for node in graph.nodes:
        node.meta["source"] = "model.py:3"
    grouped = grouped_query(graph)
    assert {node.meta.get("source") for node in grouped.nodes if node.op != "output"} == {"model.py:3"}
    key = attentions(grouped)[0].args[1]
    assert isinstance(key, fx.Node)
    assert list(key.meta["val"].shape) == [2, 2, 7, 4]
