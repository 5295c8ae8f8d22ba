"""Lifting: n cells at once give what the cells give one by one, for every rule and mix of shared operands."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from rmtcompile.errors import InternalError, LiftError
from rmtcompile.passes.cell.lift import Lifted, lift, vmapped
from rmtcompile.passes.cell.lift.rules import RULES

aten = torch.ops.aten
Cell = Callable[..., Any]
F64 = torch.float64


RANDOM = torch.Generator().manual_seed(0)  # the tables below are made before any fixture could seed


def rand(*shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=RANDOM)


def trace(cell: Cell, *args: torch.Tensor) -> fx.Graph:
    """The graph of one cell, with placeholders x0, x1, ..."""
    graph = make_fx(cell, tracing_mode="fake", pre_dispatch=True)(*args).graph
    for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        node.target = node.name = f"x{i}"
    return graph


def run(graph: fx.Graph, *args: Any) -> list[torch.Tensor]:
    result = fx.GraphModule(nn.Module(), graph)(*args)
    return list(result) if isinstance(result, list | tuple) else [result]


def stacked(value: torch.Tensor, n: int) -> torch.Tensor:
    """n different values of the same kind."""
    if value.dtype == torch.bool:
        return torch.rand(n, *value.shape) < 0.5
    if not value.is_floating_point():
        return torch.stack(
            [value.flatten()[torch.randperm(value.numel())].view(value.shape) for _ in range(n)]
        )
    return torch.stack([value] * n) + torch.randn(n, *value.shape, dtype=value.dtype)


def assert_lifts(
    graph: fx.Graph, args: Sequence[torch.Tensor], batched: Sequence[int], exact: bool = False
) -> Lifted:
    """One lifted graph, run for several n, against the cell run n times."""
    lifted = lift(graph, [f"x{i}" for i in batched])
    for n in (1, 2, 5):
        inputs = [stacked(value, n) if i in batched else value for i, value in enumerate(args)]
        got = run(lifted.graph, *inputs)
        cells = [
            run(graph, *(value[c] if i in batched else value for i, value in enumerate(inputs)))
            for c in range(n)
        ]
        for value, one, is_batched in zip(got, zip(*cells), lifted.batched_outputs, strict=True):
            want = torch.stack(one) if is_batched else one[0]
            tolerance = 0.0 if exact else 1e-12
            torch.testing.assert_close(value, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    return lifted


def assert_all_mixes(graph: fx.Graph, args: Sequence[torch.Tensor], exact: bool = False) -> None:
    """`assert_lifts` for every choice of operands that have the axis, and no help from vmap."""
    for size in range(1, len(args) + 1):
        for batched in itertools.combinations(range(len(args)), size):
            lifted = assert_lifts(graph, args, batched, exact)
            assert vmapped not in [node.target for node in lifted.graph.nodes]
    assert all(lifted.batched_outputs)


PRODUCTS: dict[str, tuple[Cell, list[torch.Tensor]]] = {
    "linear": (F.linear, [rand(2, 5, 3), rand(4, 3)]),
    "linear_bias": (F.linear, [rand(2, 5, 3), rand(4, 3), rand(4)]),
    "linear_rank2": (F.linear, [rand(5, 3), rand(4, 3), rand(4)]),
    "linear_vector": (F.linear, [rand(3), rand(4, 3), rand(4)]),
    "linear_no_rows": (F.linear, [rand(2, 0, 3), rand(4, 3), rand(4)]),
    "addmm": (torch.addmm, [rand(4), rand(5, 3), rand(3, 4)]),
    "addmm_matrix": (
        lambda c, x, w: torch.addmm(c, x, w, beta=0.5, alpha=2.0),
        [rand(5, 4), rand(5, 3), rand(3, 4)],
    ),
    "mm": (torch.mm, [rand(5, 3), rand(3, 4)]),
    "mm_t": (lambda x, w: torch.mm(x, w.t()), [rand(5, 3), rand(4, 3)]),
    "mv": (torch.mv, [rand(5, 3), rand(3)]),
    "dot": (torch.dot, [rand(3), rand(3)]),
    "bmm": (torch.bmm, [rand(2, 5, 3), rand(2, 3, 4)]),
    "baddbmm": (torch.baddbmm, [rand(2, 5, 4), rand(2, 5, 3), rand(2, 3, 4)]),
    "baddbmm_row": (
        lambda c, x, y: torch.baddbmm(c, x, y, beta=0.5),
        [rand(4), rand(2, 5, 3), rand(2, 3, 4)],
    ),
    "matmul_vectors": (torch.matmul, [rand(3), rand(3)]),
    "matmul_vector_left": (torch.matmul, [rand(3), rand(2, 3, 4)]),
    "matmul_vector_matrix": (torch.matmul, [rand(3), rand(3, 4)]),
    "matmul_vector_right": (torch.matmul, [rand(2, 4, 3), rand(3)]),
    "matmul_matrix": (torch.matmul, [rand(2, 6, 5, 3), rand(3, 4)]),
    "matmul_matrix_left": (torch.matmul, [rand(5, 3), rand(2, 6, 3, 4)]),
    "matmul_batches": (torch.matmul, [rand(2, 1, 5, 3), rand(6, 3, 4)]),
    "einsum": (lambda a, b: torch.einsum("bhd,bde->bhe", a, b), [rand(2, 5, 3), rand(2, 3, 4)]),
    "einsum_n_used": (
        lambda a, b: torch.einsum("n h d, n d e -> h n e", a, b),
        [rand(2, 5, 3), rand(2, 3, 4)],
    ),
    "einsum_ellipsis": (lambda a, b: torch.einsum("...d,...de->...e", a, b), [rand(2, 5, 3), rand(5, 3, 4)]),
    "einsum_implicit": (lambda a, b: torch.einsum("bji,jk", a, b), [rand(2, 3, 5), rand(3, 4)]),
    "einsum_scalar": (lambda a, b: torch.einsum("i,i->", a, b), [rand(3), rand(3)]),
    "einsum_three": (lambda a, b, c: torch.einsum("ij,j,jk->ik", a, b, c), [rand(2, 3), rand(3), rand(3, 4)]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    cell, args = PRODUCTS[name]
    assert_all_mixes(trace(cell, *args), args)


def test_stacked_weights_become_one_bmm() -> None:
    lifted = lift(trace(F.linear, rand(2, 5, 3), rand(4, 3)), ["x0", "x1"])
    ops = [node.target for node in lifted.graph.nodes if node.op == "call_function"]
    assert ops == [aten.transpose.int, aten.reshape.default, aten.bmm.default, aten.reshape.default]


def test_shared_weights_stay_one_product() -> None:
    lifted = lift(trace(F.linear, rand(2, 5, 3), rand(4, 3), rand(4)), ["x0"])
    assert [node.target for node in lifted.graph.nodes if node.op == "call_function"] == [aten.linear.default]


QKV = [rand(2, 4, 5, 3), rand(2, 4, 6, 3), rand(2, 4, 6, 3)]
MASKS = {
    "T_S": rand(5, 6),
    "1_1_T_S": rand(1, 1, 5, 6),
    "B_1_T_S": rand(2, 1, 5, 6),
    "B_H_T_S": rand(2, 4, 5, 6),
    "H_T_S": rand(4, 5, 6),
    "bool": torch.ones(2, 1, 5, 6) > 0,
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_masks(name: str) -> None:
    args = [*QKV, MASKS[name]]
    graph = trace(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=0.3), *args)
    for batched in [(0,), (1,), (0, 1, 2)] + ([(3,), (0, 1, 2, 3), (0, 3)] if name != "bool" else []):
        assert_lifts(graph, args, batched)


@pytest.mark.parametrize("lead", [(), (4,), (2, 4), (1, 4), (2, 3, 4)])
def test_attention_ranks(lead: tuple[int, ...]) -> None:
    args = [rand(*lead, 5, 3), rand(*lead, 5, 3), rand(*lead, 5, 3)]
    assert_all_mixes(
        trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *args), args
    )


def test_attention_grouped_heads_and_broadcast_batch() -> None:
    def cell(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.expand(2, 2, 6, 3), v.expand(2, 2, 6, 3)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    args = [rand(2, 4, 5, 3), rand(1, 2, 6, 3), rand(1, 2, 6, 3)]
    assert_all_mixes(trace(cell, *args), args)


CONVOLUTIONS: dict[str, tuple[Cell, list[torch.Tensor]]] = {
    "conv1d": (F.conv1d, [rand(2, 4, 7), rand(6, 4, 3), rand(6)]),
    "conv1d_depthwise": (
        lambda x, w, b: F.conv1d(x, w, b, padding=2, groups=4),
        [rand(2, 4, 7), rand(4, 1, 3), rand(4)],
    ),
    "conv1d_groups": (lambda x, w: F.conv1d(x, w, stride=2, groups=2), [rand(2, 4, 7), rand(6, 2, 3)]),
    "conv1d_no_batch": (F.conv1d, [rand(4, 7), rand(6, 4, 3), rand(6)]),
    "conv1d_same": (lambda x, w: F.conv1d(x, w, padding="same"), [rand(2, 4, 7), rand(6, 4, 3)]),
    "conv_transposed": (
        lambda x, w, b: torch.convolution(x, w, b, [2], [0], [1], True, [0], 2),
        [rand(2, 4, 7), rand(4, 3, 3), rand(6)],
    ),
    "conv2d": (F.conv2d, [rand(2, 4, 7, 6), rand(6, 4, 3, 2), rand(6)]),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    cell, args = CONVOLUTIONS[name]
    assert_all_mixes(trace(cell, *args), args)


NORMS: dict[str, tuple[Cell, list[torch.Tensor]]] = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (3,), w, b), [rand(2, 5, 3), rand(3), rand(3)]),
    "layer_norm_2d": (lambda x, w: F.layer_norm(x, (5, 3), w), [rand(2, 5, 3), rand(5, 3)]),
    "layer_norm_plain": (lambda x: F.layer_norm(x, (3,)), [rand(2, 5, 3)]),
    "native_layer_norm": (
        lambda x, w, b: torch.native_layer_norm(x, (3,), w, b, 1e-5),
        [rand(2, 5, 3), rand(3), rand(3)],
    ),
    "rms_norm": (lambda x, w: F.rms_norm(x, (3,), w, 1e-6), [rand(2, 5, 3), rand(3)]),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [rand(2, 4, 5), rand(4), rand(4)]),
    "group_norm_rank2": (lambda x, w: F.group_norm(x, 2, w), [rand(2, 4), rand(4)]),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str) -> None:
    cell, args = NORMS[name]
    assert_all_mixes(trace(cell, *args), args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["layer_norm", "native_layer_norm", "rms_norm", "group_norm"])
def test_norms_round_once_in_low_precision(name: str, dtype: torch.dtype) -> None:
    cell, args = NORMS[name]
    low = [value.to(dtype) for value in args]
    lifted = lift(trace(cell, *low), [f"x{i}" for i in range(len(args))])
    inputs = [stacked(value, 3) for value in low]
    got = run(lifted.graph, *inputs)[0]
    result = [cell(*(value[c] for value in inputs)) for c in range(3)]
    want = torch.stack([one[0] if isinstance(one, tuple) else one for one in result])
    exact = [cell(*(value[c].double() for value in inputs)) for c in range(3)]
    truth = torch.stack([one[0] if isinstance(one, tuple) else one for one in exact])
    assert (got.double() - truth).norm() <= 1.05 * (want.double() - truth).norm()


def test_embedding() -> None:
    args = [rand(7, 3), torch.arange(10).view(2, 5) % 7]
    assert_all_mixes(trace(lambda w, i: F.embedding(i, w), *args), args, exact=True)
    args = [rand(7, 3), torch.tensor(4)]
    assert_all_mixes(trace(lambda w, i: F.embedding(i, w), *args), args, exact=True)


INTS = torch.tensor([3, 1, 4, 0, 2])
MOVES: dict[str, tuple[Cell, list[torch.Tensor]]] = {
    "view": (lambda x: x.view(2, 20), [rand(2, 4, 5)]),
    "view_minus_one": (lambda x: x.view(-1, 2), [rand(2, 4, 5)]),
    "view_scalar": (lambda x: x.view(()), [rand(1)]),
    "view_empty": (lambda x: x.view(2, 0, 3), [rand(2, 3, 0)]),
    "view_of_transposed": (lambda x: x.transpose(0, 1).reshape(20, 2), [rand(2, 4, 5)]),
    "flatten": (lambda x: x.flatten(1), [rand(2, 4, 5)]),
    "unflatten": (lambda x: x.unflatten(1, (2, 2)), [rand(2, 4, 5)]),
    "unsqueeze": (lambda x: (x.unsqueeze(0), x.unsqueeze(-1), x.unsqueeze(-3), x.unsqueeze(2)), [rand(2, 4)]),
    "unsqueeze_scalar": (lambda x: (x.unsqueeze(0), x.unsqueeze(-1)), [rand()]),
    "squeeze": (lambda x: (x.squeeze(), x.squeeze(1), x.squeeze(-1), x.squeeze((0, 1))), [rand(1, 1, 3, 1)]),
    "squeeze_nothing": (lambda x: (x.squeeze(), x.squeeze(0)), [rand(2, 3)]),
    "transpose": (lambda x: (x.transpose(0, 1), x.transpose(-1, 0), x.mT), [rand(2, 4, 5)]),
    "t": (lambda x: x.t(), [rand(2, 4)]),
    "t_vector": (lambda x: x.t(), [rand(4)]),
    "numpy_T": (lambda x: x.T, [rand(2, 4)]),
    "permute": (lambda x: (x.permute(2, 0, 1), x.permute(-1, 0, -2)), [rand(2, 4, 5)]),
    "movedim": (lambda x: (x.movedim(0, -1), x.movedim((0, 1), (2, 0))), [rand(2, 4, 5)]),
    "expand": (lambda x: (x.expand(2, 4, 5), x.expand(3, -1, -1, 5)), [rand(2, 4, 1)]),
    "expand_scalar": (lambda x: x.expand(2, 3), [rand()]),
    "expand_as": (lambda x, y: x.expand_as(y), [rand(1, 3), rand(2, 3)]),
    "view_as": (lambda x, y: x.view_as(y), [rand(6), rand(2, 3)]),
    "slice": (lambda x: (x[1:], x[:, 1:3], x[..., ::2], x[:, -2:]), [rand(2, 4, 5)]),
    "select": (lambda x: (x[0], x[:, 1], x[..., -1]), [rand(2, 4, 5)]),
    "narrow": (lambda x: (x.narrow(1, 1, 2), x.narrow(-1, 0, 2)), [rand(2, 4, 5)]),
    "unfold": (lambda x: x.unfold(1, 3, 1), [rand(2, 5, 4)]),
    "diagonal": (lambda x: (x.diagonal(), x.diagonal(0, -2, -1), x.diag_embed()), [rand(2, 4, 5)]),
    "split": (lambda x: (*x.split(2), *x.split([1, 4], -1), *x.chunk(2, 1), *x.unbind()), [rand(3, 4, 5)]),
    "tensor_split": (lambda x: (*x.tensor_split(2), *x.tensor_split((1, 3), 1)), [rand(3, 4, 5)]),
    "cat": (lambda x, y: (torch.cat([x, y]), torch.cat([x, y, x], -1)), [rand(2, 3), rand(2, 3)]),
    "cat_legacy_empty": (
        lambda x, y: torch.cat([torch.empty(0, dtype=F64), x, y], 1),
        [rand(2, 3), rand(2, 1)],
    ),
    "cat_empty": (lambda x, y: torch.cat([x, y], 1), [rand(2, 0, 3), rand(2, 4, 3)]),
    "stack": (lambda x, y: (torch.stack([x, y]), torch.stack([y, x], -1)), [rand(2, 3), rand(2, 3)]),
    "stack_scalars": (lambda x, y: torch.stack([x, y]), [rand(), rand()]),
    "repeat": (lambda x: (x.repeat(2, 1), x.repeat(3, 1, 2), x.tile(2), x.tile(2, 1, 1)), [rand(2, 3)]),
    "repeat_interleave": (lambda x: (x.repeat_interleave(2), x.repeat_interleave(2, 1)), [rand(2, 3)]),
    "roll": (lambda x: (x.roll(1), x.roll(1, 0), x.roll((1, 2), (0, -1))), [rand(2, 3)]),
    "flip": (lambda x: (x.flip(0), x.flip((0, -1)), x.flip(())), [rand(2, 3)]),
    "pad": (lambda x: (F.pad(x, (1, 2)), F.pad(x, (0, 0, 1, 0), value=3.0)), [rand(2, 3)]),
    "tril": (lambda x: (x.tril(), x.triu(1)), [rand(2, 3, 3)]),
    "sort": (lambda x: (*x.sort(0), *x.sort(descending=True), *x.topk(2, 0), x.argsort(0)), [rand(4, 3)]),
    "gather": (lambda x, i: x.gather(0, i), [rand(5, 3), INTS[:, None].expand(5, 2).contiguous()]),
    "scatter": (
        lambda x, i, s: (x.scatter(0, i, s), x.scatter(0, i, 2.0)),
        [rand(5, 3), INTS[:, None].expand(5, 2).contiguous(), rand(5, 2)],
    ),
    "index_select": (lambda x, i: (x.index_select(0, i), x.index_select(-2, i)), [rand(5, 3), INTS]),
    "slice_scatter": (lambda x, y: torch.slice_scatter(x, y, 0, 1, 3), [rand(5, 3), rand(2, 3)]),
    "select_scatter": (lambda x, y: torch.select_scatter(x, y, 1, -1), [rand(5, 3), rand(5)]),
    "copy": (aten.copy.default, [rand(2, 3), rand(3)]),
    "clone": (lambda x: (x.clone(), x.contiguous(), x.detach(), F.dropout(x, 0.5, False)), [rand(2, 3)]),
    "channels_last": (lambda x: x.clone(memory_format=torch.channels_last), [rand(2, 3, 4, 5)]),
    "convert": (lambda x: (x.to(torch.float32), x.half(), x.bool(), x.long()), [rand(2, 3)]),
    "one_hot": (lambda i: F.one_hot(i, 5), [INTS]),
}


@pytest.mark.parametrize("name", MOVES)
def test_data_movement_is_exact(name: str) -> None:
    cell, args = MOVES[name]
    assert_all_mixes(trace(cell, *args), args, exact=True)


REDUCTIONS: dict[str, Cell] = {
    "sum": lambda x: (x.sum(), x.sum(0), x.sum((0, -1), keepdim=True), x.sum((), keepdim=True)),
    "mean": lambda x: (x.mean(), x.mean(-1), x.mean((0, 1))),
    "extremes": lambda x: (
        x.max(),
        x.min(),
        *x.max(0),
        *x.min(-1),
        x.amax(),
        x.amin(1),
        x.amax((0, 2), True),
    ),
    "arguments": lambda x: (x.argmax(), x.argmin(0), x.argmax(-1, keepdim=True)),
    "any": lambda x: ((x > 0).any(), (x > 0).all(), (x > 1).any(0), (x > -1).all(-1)),
    "prod": lambda x: (x.prod(), x.prod(0)),
    "var": lambda x: (x.var(), x.var(0), x.std(unbiased=False), *torch.var_mean(x, (0, 1), correction=0)),
    "norm": lambda x: (x.norm(), x.norm(dim=-1), torch.linalg.vector_norm(x), F.normalize(x, dim=0)),
    "softmax": lambda x: (x.softmax(0), x.softmax(-1), x.log_softmax(1), x.logsumexp(0), x.logsumexp((0, 1))),
    "cumulative": lambda x: (x.cumsum(0), x.cumsum(-1), x.cumprod(1), *x.cummax(0)),
    "glu": lambda x: (F.glu(x, 0), F.glu(x)),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 1, 2)])
def test_reductions(name: str, shape: tuple[int, ...]) -> None:
    args = [rand(*shape)]
    assert_all_mixes(trace(REDUCTIONS[name], *args), args)


def test_whole_reductions_of_numbers() -> None:
    args = [rand()]
    assert_all_mixes(trace(lambda x: (x.sum(), x.mean(), x.max()), *args), args)


INDEXINGS: dict[str, Cell] = {
    "first": lambda x, i: x[i],
    "second": lambda x, i: x[:, i],
    "two": lambda x, i: x[i, i],
    "two_apart": lambda x, i: x[i, :, i],
    "pair": lambda x, i: x[:, i[:, None], i[None, :]],
}


@pytest.mark.parametrize("name", INDEXINGS)
def test_shared_indices(name: str) -> None:
    args = [rand(3, 3, 3), torch.tensor([2, 0])]
    lifted = assert_lifts(trace(INDEXINGS[name], *args), args, [0], exact=True)
    assert vmapped not in [node.target for node in lifted.graph.nodes]


@pytest.mark.parametrize("name", INDEXINGS)
def test_indices_per_cell(name: str) -> None:
    args = [rand(3, 3, 3), torch.tensor([2, 0])]
    graph = trace(INDEXINGS[name], *args)
    assert_lifts(graph, args, [1], exact=True)
    assert_lifts(graph, args, [0, 1], exact=True)


@pytest.mark.parametrize("batched", [(0,), (2,), (0, 2), (0, 1, 2)])
def test_index_add(batched: tuple[int, ...]) -> None:
    args = [rand(5, 3), torch.tensor([2, 0]), rand(2, 3)]
    assert_lifts(trace(lambda x, i, y: x.index_add(0, i, y, alpha=2), *args), args, batched)


POINTWISE: dict[str, tuple[Cell, list[torch.Tensor]]] = {
    "activations": (
        lambda x: (F.silu(x), F.gelu(x, approximate="tanh"), F.elu(x) + 1, F.softplus(x)),
        [rand(2, 3)],
    ),
    "clamp": (lambda x, lo: (x.clamp(-1, 1), x.clamp(min=lo), torch.maximum(x, lo)), [rand(2, 3), rand(3)]),
    "lerp": (torch.lerp, [rand(2, 3), rand(3), rand()]),
    "addcmul": (lambda x, y, z: torch.addcmul(x, y, z, value=0.5), [rand(3), rand(2, 3), rand(2, 1)]),
    "where_per_cell": (torch.where, [torch.tensor(True), rand(2, 3), rand(2, 3)]),
    "where_scalars": (
        lambda m: (torch.where(m, 1.0, -1.0), torch.where(m, 2, 3)),
        [torch.tensor([True, False])],
    ),
    "masked_fill": (lambda x, m: x.masked_fill(m, -1.0), [rand(2, 3), torch.tensor([True, False, True])]),
    "masked_fill_tensor": (
        lambda x, m, v: x.masked_fill(m, v),
        [rand(2, 3), torch.tensor([[True], [False]]), rand(dtype=torch.float32)],
    ),
    "fill": (aten.fill.Tensor, [rand(2, 3), rand(dtype=torch.float32)]),
    "number_of_other_type": (lambda x, y: (x * y, x < y), [rand(2, 3, dtype=torch.float32), rand()]),
    "number_raises_type": (lambda x, y: x * y, [torch.arange(3), rand(dtype=torch.float32)]),
    "numbers": (lambda x, y: x * y, [rand(dtype=torch.float32), rand()]),
    "type_as": (lambda x, y: x.type_as(y), [rand(2, 3), rand(3, dtype=torch.float32)]),
    "ranks": (lambda x, y, z: x * y + z, [rand(4, 2, 3), rand(3), rand()]),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(name: str) -> None:
    cell, args = POINTWISE[name]
    graph = trace(cell, *args)
    for size in range(1, len(args) + 1):
        for batched in itertools.combinations(range(len(args)), size):
            assert_lifts(graph, args, batched)


@st.composite
def operands(draw: st.DrawFn) -> tuple[list[torch.Tensor], list[int]]:
    """Three operands that broadcast, each with or without the axis (one has it), of mixed types."""
    full = draw(st.lists(st.integers(1, 3), max_size=3))
    args = []
    for _ in range(3):
        rank = draw(st.integers(0, len(full)))
        shape = [size if draw(st.booleans()) else 1 for size in full[len(full) - rank :]]
        dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.int64]))
        args.append((torch.randn(shape) * 4).to(dtype))
    batched = draw(st.sets(st.integers(0, 2), min_size=1))
    return args, sorted(batched)


@given(operands())
@settings(max_examples=60)
def test_broadcasting(drawn: tuple[list[torch.Tensor], list[int]]) -> None:
    args, batched = drawn
    graph = trace(lambda x, y, z: (x + y * z, torch.where(x > y, x, z), torch.maximum(y, z)), *args)
    lifted = lift(graph, [f"x{i}" for i in batched])
    for n in (1, 3):
        inputs = [stacked(value, n) if i in batched else value for i, value in enumerate(args)]
        got = run(lifted.graph, *inputs)
        cells = [run(graph, *(v[c] if i in batched else v for i, v in enumerate(inputs))) for c in range(n)]
        for value, one, is_batched in zip(got, zip(*cells), lifted.batched_outputs, strict=True):
            torch.testing.assert_close(value, torch.stack(one) if is_batched else one[0])


def attention_block(
    h: torch.Tensor,
    g: torch.Tensor,
    wqkv: torch.Tensor,
    b: torch.Tensor,
    wo: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    batch, length, width = h.shape
    x = F.rms_norm(h, (width,), g, 1e-6)
    q, k, v = F.linear(x, wqkv, b).split([width, width // 2, width // 2], -1)
    heads = [t.view(batch, length, -1, 4).transpose(1, 2) for t in (q, k, v)]
    angle = torch.arange(length, dtype=F64)[:, None] * torch.arange(1, 5, dtype=F64)
    cos, sin = angle.cos(), angle.sin()
    turned = [t * cos + torch.cat((-t[..., 2:], t[..., :2]), -1) * sin for t in heads[:2]]
    out = F.scaled_dot_product_attention(*turned, heads[2], attn_mask=mask, enable_gqa=True)
    return h + F.linear(out.transpose(1, 2).reshape(batch, length, width), wo)


def mlp(
    h: torch.Tensor, g: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    x = F.layer_norm(h, (h.shape[-1],), g)
    return h + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def association(
    h: torch.Tensor,
    memory: torch.Tensor,
    total: torch.Tensor,
    wk: torch.Tensor,
    wv: torch.Tensor,
    wb: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read an associative memory with the segment, write it with the last two tokens by the delta rule."""

    def features(x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([F.relu(x), F.relu(-x)], -1)
        return F.normalize(torch.cat([x * x.roll(shift, -1) for shift in (1, 2)], -1), dim=-1)

    q = features(F.linear(h, wk))
    read = torch.einsum("bsk,bkd->bsd", q, memory) / (torch.einsum("bsk,bk->bs", q, total)[..., None] + 1e-5)
    h = h + read
    tail = h[:, -2:]
    k, v = features(F.linear(tail, wk)), F.linear(tail, wv)
    known = torch.einsum("bsk,bkd->bsd", k, memory)
    fresh = 1 - torch.einsum("bsk,bk->bs", k, total) / (k.norm(dim=-1) ** 2 + 1e-5)
    beta = F.linear(tail, wb).sigmoid()
    memory = memory + torch.einsum("bsk,bsd->bkd", k, beta * (v - known))
    return h, memory, total + (fresh.clamp(0, 1)[..., None] * k).sum(1)


BLOCKS: dict[str, tuple[Cell, list[torch.Tensor], list[tuple[int, ...]]]] = {
    "attention": (
        attention_block,
        [rand(2, 5, 8), rand(8), rand(16, 8), rand(16), rand(8, 8), rand(5, 5)],
        [(0, 1, 2, 3, 4), (0,), (0, 2), (1, 2, 3, 4)],
    ),
    "mlp": (
        mlp,
        [rand(2, 5, 8), rand(8), rand(12, 8), rand(12, 8), rand(8, 12)],
        [(0, 1, 2, 3, 4), (0,), (2,)],
    ),
    "association": (
        association,
        [rand(2, 5, 6), rand(2, 16, 6), rand(2, 16).abs() + 8, rand(4, 6), rand(6, 6), rand(1, 6)],
        [(0, 1, 2, 3, 4, 5), (0, 1, 2), (1,)],
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    cell, args, choices = BLOCKS[name]
    graph = trace(cell, *args)
    for batched in choices:
        lifted = lift(graph, [f"x{i}" for i in batched])
        assert vmapped not in [node.target for node in lifted.graph.nodes]
        for n in (1, 2, 5):
            scale = [
                torch.ones(n, *(1,) * v.dim(), dtype=F64) + 0.1 * torch.rand(n, *(1,) * v.dim()) for v in args
            ]
            inputs = [scale[i] * value if i in batched else value for i, value in enumerate(args)]
            got = run(lifted.graph, *inputs)
            cells = [
                run(graph, *(v[c] if i in batched else v for i, v in enumerate(inputs))) for c in range(n)
            ]
            for value, one in zip(got, zip(*cells), strict=True):
                want = torch.stack(one)
                assert (value - want).abs().max() <= 1e-12 * want.abs().max()


def test_what_all_cells_share_is_computed_once() -> None:
    graph = trace(lambda x, y: (x + 1, (y * 2).cos() + x, y.exp()), rand(2, 3), rand(3))
    lifted = lift(graph, ["x0"])
    assert lifted.batched_outputs == (True, True, False)
    shapes = [list(n.meta["val"].shape) for n in lifted.graph.nodes if n.op == "call_function"]
    assert shapes == [[2, 2, 3], [3], [3], [2, 2, 3], [3]]


def test_zeros_like_a_batched_value_are_shared() -> None:
    graph = trace(lambda x: (torch.zeros_like(x), x.new_full((2, 2), 3.0), torch.full_like(x, 2)), rand(2, 3))
    lifted = lift(graph, ["x0"])
    assert lifted.batched_outputs == (False, False, False)
    for got, want in zip(run(lifted.graph, rand(4, 2, 3)), run(graph, rand(2, 3)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_names_order_meta_and_graph_are_kept() -> None:
    graph = trace(lambda x, y: x * y, rand(2, 3), rand(3))
    for node in graph.nodes:
        node.meta |= {"scope": (1, 7), "source": "model.py:3"}
    before = str(graph)
    lifted = lift(graph, ["x1"])
    assert str(graph) == before
    assert [n.target for n in lifted.graph.nodes if n.op == "placeholder"] == ["x0", "x1"]
    assert {(n.meta["scope"], n.meta["source"]) for n in lifted.graph.nodes} == {((1, 7), "model.py:3")}
    assert [list(n.meta["val"].shape) for n in lifted.graph.nodes if n.op != "output"][:2] == [[2, 3], [2, 3]]


def test_number_of_cells_is_not_in_the_graph() -> None:
    args = [rand(3, 5, 7), rand(4, 7), rand(4, 3, 5)]
    lifted = lift(trace(lambda x, w, y: F.linear(x, w).sum((0, 1)) + y.sum((1, 2)), *args), ["x1"])
    calls = [node for node in lifted.graph.nodes if node.op == "call_function"]
    shapes = [arg for node in calls if node.target is not aten.sum.dim_IntList for arg in node.args]
    leading = [shape[0] for shape in shapes if isinstance(shape, list | tuple)]
    (n,) = [node for node in calls if node.target is aten.sym_size.int]
    assert leading == [n, -1, -1]


def test_order_markers_stay_in_place() -> None:
    def cell(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            z = x.sin()
        with torch.autocast("cpu", enabled=False):
            return z.cos() + y

    def targets(graph: fx.Graph) -> list[Any]:
        return [node.target for node in graph.nodes if node.op == "call_function"]

    args = [rand(2, 3), rand(3)]
    graph = trace(cell, *args)
    assert len(targets(graph)) == 7
    assert targets(lift(graph, ["x0"]).graph) == targets(graph)
    assert_lifts(graph, args, [0])


def test_context_of_nodes_is_respected() -> None:
    """Under autocast a bmm gives what the linear it stands for gave."""
    args = [rand(2, 3, dtype=torch.float32), rand(4, 3, dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        graph = trace(F.linear, *args)
    with pytest.raises(InternalError, match=r"expected torch\.bfloat16"):
        lift(graph, ["x0", "x1"])
    for node in graph.nodes:
        node.meta["context"] = ("torch.autocast('cpu', torch.bfloat16, True, True)",)
    lifted = lift(graph, ["x0", "x1"])
    assert [n.meta["val"].dtype for n in lifted.graph.nodes if n.target is aten.bmm.default] == [
        torch.bfloat16
    ]


def test_everything_else_goes_through_vmap() -> None:
    args = [rand(4, 4), rand(2, 4)]
    graph = trace(lambda x, y: (torch.linalg.inv(x), torch.cdist(y, x), *torch.aminmax(y, dim=0)), *args)
    lifted = assert_lifts(graph, args, [0, 1])
    assert sum(node.target is vmapped for node in lifted.graph.nodes) == 3
    assert_lifts(graph, args, [0])


def test_boolean_masks_and_index_put_go_through_vmap() -> None:
    args = [rand(4, 3), torch.tensor([2, 0]), rand(2, 3)]
    graph = trace(lambda x, i, y: x.index_put((i,), y, accumulate=True), *args)
    for batched in [(0,), (1,), (0, 2), (0, 1, 2)]:
        assert_lifts(graph, args, batched)


def test_sizes_and_plain_numbers() -> None:
    args = [rand(4, 3)]
    graph = trace(lambda x: x + 1, *args)
    x, add, _ = graph.nodes
    with graph.inserting_before(add):
        size = graph.call_function(aten.sym_size.int, (x, 0))
        double = graph.call_function(operator.mul, (size, 2))
        shift = graph.placeholder("x1")
    size.meta["val"], double.meta["val"], shift.meta["val"] = 4, 8, 3
    add.args = (x, double)
    add.kwargs = {"alpha": shift}
    x.append(shift)
    lifted = lift(graph, ["x0"])
    inputs = rand(5, 4, 3)
    torch.testing.assert_close(run(lifted.graph, inputs, 3), [inputs + 24], rtol=0, atol=0)


def test_lifted_graph_compiles_once_for_any_n() -> None:
    def cell(*args: torch.Tensor) -> torch.Tensor:
        y = mlp(*args)
        return y + torch.cdist(y, y).sum(-1, keepdim=True)

    args = BLOCKS["mlp"][1]
    lifted = lift(trace(cell, *args), [f"x{i}" for i in range(5)])
    assert vmapped in [node.target for node in lifted.graph.nodes]
    module = fx.GraphModule(nn.Module(), lifted.graph)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, dynamic=True, fullgraph=True)
    for n in (3, 5, 7):
        inputs = [stacked(value, n) for value in args]
        torch.testing.assert_close(compiled(*inputs), module(*inputs), rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


def test_no_batched_placeholder_is_a_copy() -> None:
    graph = trace(lambda x: x + 1, rand(3))
    lifted = lift(graph, [])
    assert (str(lifted.graph), lifted.batched_outputs) == (str(graph), (False,))


REFUSED: dict[str, tuple[Cell, list[torch.Tensor], str]] = {
    "data_dependent_shape": (lambda x: x.nonzero(), [rand(3)], "vmap: "),
    "strides": (lambda x: x.as_strided((2, 2), (1, 1)), [rand(3)], "whose layout differs"),
    "in_place": (lambda x: x.clone().add_(1), [rand(3)], "must be functional"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_operation_module_and_line(name: str) -> None:
    cell, args, reason = REFUSED[name]
    if name == "data_dependent_shape":
        graph = fx.Graph()
        x = graph.placeholder("x0")
        x.meta["val"] = args[0]
        node = graph.call_function(aten.nonzero.default, (x,))
        node.meta["val"] = cell(args[0])
        graph.output(node)
    else:
        graph = trace(cell, *args)
    for node in graph.nodes:
        node.meta |= {"scope": "layers.3.mlp", "source": "modeling.py:12"}
    with pytest.raises(LiftError) as error:
        lift(graph, ["x0"])
    lines = str(error.value).splitlines()
    assert re.fullmatch(r"aten\.\S+ cannot be computed for several cells at once", lines[0])
    assert lines[2] == "  module layers.3.mlp  modeling.py:12"
    assert reason in lines[3]
    assert lines[-1].startswith("  help: ")


def test_unknown_placeholders_are_refused() -> None:
    with pytest.raises(ValueError, match="no such placeholders: \\['y'\\]"):
        lift(trace(torch.sin, rand(3)), ["y"])


def test_wrong_rules_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check behind every rule can fail: a rule that forgets the axis is an internal error."""
    monkeypatch.setitem(
        RULES, aten.softmax.int, lambda b, call: b.emit(aten.sum.dim_IntList, call.args["self"], [0])
    )
    with pytest.raises(
        InternalError, match=r"gives torch.float64\[3\] for 2 cells, expected torch.float64\[2, 3\]"
    ):
        lift(trace(lambda x: x.softmax(0), rand(3)), ["x0"])


def test_values_without_meta_are_caught() -> None:
    graph = trace(torch.sin, rand(3))
    next(n for n in graph.nodes if n.op == "call_function").meta.clear()
    with pytest.raises(InternalError, match="sin has no meta 'val'"):
        lift(graph, ["x0"])
