"""Batching rules: linear, matrix products, einsum, attention, convolution."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

from torch import fx

from rmtcompile.passes.cell.lift.builder import Builder, Call, Value, aten
from rmtcompile.passes.cell.lift.fallback import fallback


def linear(b: Builder, call: Call) -> fx.Node:
    """`linear(x, w[n,E,D], c[n,E])` -> `baddbmm(c[n,1,E], x[n,M,D], transpose(w, 1, 2))`."""
    x, weight, bias = call.args["input"], call.args["weight"], call.args["bias"]
    if weight.rank != 2:
        return fallback(b, call)
    if weight.batched:
        transposed = b.emit(aten.transpose.int, weight, 1, 2)
        return b.reshape(_product(b, bias, _rows(b, x), transposed), call.shape)
    if bias is None or not bias.batched:
        return b.again(call)
    y = b.again(call, bias=None)
    return b.emit(aten.add.Tensor, y, b.aligned(bias, len(call.shape)))


def addmm(b: Builder, call: Call) -> fx.Node:
    """`addmm(c, x[n,M,K], w[n,K,N])` -> `baddbmm(c, x, w)`; with shared weights one product over n*M rows."""
    bias, x, weight = call.args["self"], call.args["mat1"], call.args["mat2"]
    scale = {name: call.args[name] for name in ("beta", "alpha") if name in call.given}
    per_column = not bias.batched and (bias.rank < 2 or bias.shape[0] == 1)
    if weight.batched or not per_column:
        return _product(b, bias, _rows(b, x), b.spread(weight), **scale)
    return b.reshape(b.again(call, mat1=b.folded(x.node)), call.shape)


def baddbmm(b: Builder, call: Call) -> fx.Node:
    """`baddbmm(c, x[n,B,M,K], w[n,B,K,N])`: axis and batch folded into one batch."""
    batch = call.shape[0]
    changes = {name: _folded(b, call.args[name], batch, 3) for name in ("batch1", "batch2")}
    changes["self"] = _folded(b, call.args["self"], batch, 3)
    return b.reshape(b.again(call, **changes), call.shape)


def matmul(b: Builder, call: Call) -> fx.Node:
    """`matmul(x[n,B,T,D], w[D,E])` stays one product, `w[n,D,E]` makes it a `bmm`; else batches broadcast."""
    x, y = call.values
    if not y.batched and y.rank <= 2:
        return b.emit(aten.matmul.default, x, y)
    if y.batched and y.rank == 2 and x.rank > 0:
        return b.reshape(b.emit(aten.bmm.default, _rows(b, x), y), call.shape)
    rank = max(x.rank, y.rank, 2)
    product = b.emit(aten.matmul.default, _matrix(b, x, rank, -2), _matrix(b, y, rank, -1))
    extra = [dim for dim, value in ((-2, x), (-1, y)) if value.rank == 1]
    return b.emit(aten.squeeze.dims, product, extra) if extra else product


def einsum(b: Builder, call: Call) -> fx.Node:
    """`bhd,bde->bhe` -> `nbhd,nbde->nbhe`: a new letter in front of the operands that have the axis."""
    values: list[Value] = call.args["tensors"]
    inputs, output = _explicit(call.args["equation"])
    axis = next(letter for letter in "n" + string.ascii_letters if letter not in "".join(inputs))
    terms = [axis + term if value.batched else term for term, value in zip(inputs, values, strict=True)]
    return b.again(call, equation=f"{','.join(terms)}->{axis}{output}")


def attention(b: Builder, call: Call) -> fx.Node:
    """`scaled_dot_product_attention(q[n,B,H,T,D], ...)`: the axis is folded into the batch, [n*B,H,T,D]."""
    query, key, value = (call.args[name] for name in ("query", "key", "value"))
    mask: Value | None = call.args["attn_mask"]
    if len({query.rank, key.rank, value.rank}) > 1 or (mask is not None and mask.rank > query.rank):
        return fallback(b, call)
    if query.rank < 4:  # the axis itself is the batch
        changes: dict[str, Any] = {name: b.spread(call.args[name]) for name in ("query", "key", "value")}
        if mask is not None:
            changes["attn_mask"] = b.aligned(mask, query.rank)
        return b.again(call, **changes)
    batch = call.shape[0]
    changes = {name: _folded(b, call.args[name], batch, query.rank) for name in ("query", "key", "value")}
    if mask is not None:
        is_same_for_all = not mask.batched and (mask.rank < query.rank or mask.shape[0] == 1)
        changes["attn_mask"] = mask.node if is_same_for_all else _folded(b, mask, batch, query.rank)
    return b.reshape(b.again(call, **changes), call.shape)


def convolution(b: Builder, call: Call) -> fx.Node:
    """Shared weights: the axis joins the batch. Weights per cell: it joins channels and groups."""
    x, weight, bias = call.args["input"], call.args["weight"], call.args["bias"]
    batch = (1,) if x.rank == weight.rank - 1 else ()
    shape, out = batch + x.shape, batch + call.shape
    if not weight.batched and (bias is None or not bias.batched):
        folded = x.node if batch else b.folded(x.node)
        return b.reshape(b.again(call, input=folded), call.shape)
    cells = b.emit(aten.transpose.int, b.reshape(b.spread(x), shape), 0, 1)
    by_group, groups = b.spread(weight), call.args["groups"]
    if groups > 1:
        rows = weight.shape[0] // groups
        by_group = b.emit(aten.reshape.default, by_group, [-1, rows, *weight.shape[1:]])
    changes = {
        "input": b.emit(aten.flatten.using_ints, cells, 1, 2),
        "weight": b.folded(by_group),
        "groups": b.emit(aten.sym_size.int, by_group, 0),
    }
    if bias is not None:
        changes["bias"] = b.folded(b.spread(bias))
    y = b.emit(aten.reshape.default, b.again(call, **changes), [out[0], -1, *out[1:]])
    return b.reshape(b.emit(aten.transpose.int, y, 0, 1), call.shape)


def _rows(b: Builder, x: Value) -> fx.Node:
    """x[n, ..., D] as [n, M, D]."""
    return b.reshape(b.spread(x), (math.prod(x.shape[:-1]), x.shape[-1]))


def _product(b: Builder, bias: Value | None, x: fx.Node, y: fx.Node, **scale: Any) -> fx.Node:
    """`bias + x @ y` for x[n,M,K], y[n,K,N]."""
    if bias is None:
        return b.emit(aten.bmm.default, x, y)
    return b.emit(aten.baddbmm.default, b.aligned(bias, 2), x, y, **scale)


def _matrix(b: Builder, value: Value, rank: int, vector_dim: int) -> fx.Node:
    """The operand of a matmul with cells of `rank` dims; a vector becomes a row (dim -2) or a column (-1)."""
    if value.rank > 1:
        return b.aligned(value, rank)
    node = b.emit(aten.unsqueeze.default, value, vector_dim)
    return b.aligned(Value(node, value.batched, value.cell.unsqueeze(vector_dim)), rank)


def _folded(b: Builder, value: Value, batch: int, rank: int) -> fx.Node:
    """The operand as [n * batch, ...]: lined up, with a batch of one repeated."""
    rest = ((1,) * rank + value.shape)[1 - rank :]
    node = b.aligned(value, rank)
    if not value.batched or value.shape != (batch, *rest):
        node = b.emit(aten.expand.default, node, [-1 if value.batched else b.n(), batch, *rest])
    return b.folded(node)


def _explicit(equation: str) -> tuple[Sequence[str], str]:
    """Input terms and output term of an einsum equation; an implicit output is spelt out."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if not arrow:
        once = sorted(letter for letter in left if letter.isalpha() and left.count(letter) == 1)
        output = ("..." if "..." in left else "") + "".join(once)
    return inputs, output
