"""Batching rules: pointwise and broadcasting operations, norms with per-cell weights, embeddings."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import torch
from torch import fx

from rmtcompile.passes.cell.lift.builder import Builder, Call, Value, aten
from rmtcompile.passes.cell.lift.fallback import fallback

_LOW_PRECISION = (torch.float16, torch.bfloat16)
_CHANNELS_LAST = (torch.channels_last, torch.channels_last_3d)


def pointwise(b: Builder, call: Call) -> Any:
    """`add(x[n,B,T,D], s[n])` -> `add(x, s[n,1,1,1])`: singleton dims line operands up behind the axis."""
    named = {name: value for name, value in call.args.items() if isinstance(value, Value)}
    if len(named) != len(call.values):
        return fallback(b, call)
    changes: dict[str, Any] = dict(zip(named, broadcast(b, *named.values()), strict=True))
    if call.args.get("memory_format") in _CHANNELS_LAST:  # a format of the cell's rank, not of the lifted one
        changes["memory_format"] = torch.contiguous_format
    return b.again(call, **changes)


def broadcast(b: Builder, *values: Value) -> list[fx.Node]:
    """Operands of a broadcasting operation, lined up, with the type promotion that they have in one cell."""
    rank = max(value.rank for value in values)
    return [_promoted(b, value, b.aligned(value, rank), values) for value in values]


def _promoted(b: Builder, value: Value, node: fx.Node, values: tuple[Value, ...]) -> fx.Node:
    """A 0-d tensor yields to others in type promotion, but with the axis it is 1-d: cast it beforehand."""
    if value.rank > 0 or len({other.dtype for other in values}) == 1:
        return node
    with_dims = [other.dtype for other in values if other.rank > 0]
    if not with_dims:
        return node if value.batched else b.emit(aten.unsqueeze.default, node, 0)
    promoted = reduce(torch.promote_types, with_dims)
    yields = value.dtype != torch.bool and _category(value.dtype) <= _category(promoted)
    return _cast(b, node, promoted) if value.batched and yields else node


def _category(dtype: torch.dtype) -> int:
    """bool < integers < floats < complex."""
    if dtype is torch.bool:
        return 0
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else 1


def masked_fill(b: Builder, call: Call) -> fx.Node:
    """`masked_fill(x, mask, value[n])` -> `where(mask, value, x)`: masked_fill takes 0-d values only."""
    x, mask, value = call.args["self"], call.args["mask"], call.args["value"]
    if not value.batched:
        return b.again(call, **dict(zip(("self", "mask"), broadcast(b, x, mask), strict=True)))
    rank = max(x.rank, mask.rank)
    cast = _cast(b, value.node, x.dtype)
    filler = b.aligned(Value(cast, True, value.cell), rank)
    return b.emit(aten.where.self, b.aligned(mask, rank), filler, b.aligned(x, rank))


def fill(b: Builder, call: Call) -> fx.Node:
    """`fill(x, value[n])` -> the value in the shape of x."""
    x, value = call.args["self"], call.args["value"]
    if not value.batched:
        return b.again(call)
    cast = _cast(b, value.node, x.dtype)
    return b.emit(aten.expand.default, b.aligned(Value(cast, True, value.cell), x.rank), [-1, *x.shape])


def copy(b: Builder, call: Call) -> fx.Node:
    """`copy(x, src)`: the result has the shape of x, so x gets the axis."""
    x = call.args["self"]
    return b.again(call, self=b.spread(x), src=b.aligned(call.args["src"], x.rank))


def norm(b: Builder, call: Call) -> Any:
    """`layer_norm(x, [D], w[n,D], c[n,D])` -> `layer_norm(x, [D]) * w[n,1,1,D] + c[n,1,1,D]`."""
    x = call.args["input"]
    weight, bias = call.args["weight"], call.args.get("bias")
    if not (_is_batched(weight) or _is_batched(bias)):
        return b.again(call)
    plain = _without_weights(b, call, _widened(b, x, x.node))
    if not isinstance(call.out, list | tuple):
        return _cast(b, _affine(b, plain, x, weight, bias), call.out.dtype)
    parts = [b.emit(operator.getitem, plain, i) for i in range(3)]  # native_layer_norm: also statistics
    statistics = [
        _cast(b, b.spread(Value(part, x.batched, cell)), cell.dtype)
        for part, cell in zip(parts[1:], call.out[1:], strict=True)
    ]
    return (_cast(b, _affine(b, parts[0], x, weight, bias), call.out[0].dtype), *statistics)


def group_norm(b: Builder, call: Call) -> fx.Node:
    """`group_norm(x[n,B,C,T], G, w[n,C])`: the axis joins the batch, then the weights as for `norm`."""
    x = call.args["input"]
    weight, bias = call.args["weight"], call.args["bias"]
    shared = not (_is_batched(weight) or _is_batched(bias))
    folded = b.folded(x.node) if x.batched else x.node
    if shared:
        return b.reshape(b.again(call, input=folded), call.shape)
    plain = _without_weights(b, call, _widened(b, x, folded))
    if x.batched:
        plain = b.reshape(plain, x.shape)
    y = _affine(b, plain, x, _channels(b, weight, x), _channels(b, bias, x))
    return _cast(b, y, call.out.dtype)


def embedding(b: Builder, call: Call) -> fx.Node:
    """`embedding(w[n,V,D], i[T])` -> `index_select(w, 1, i)`; with i[n,T], rows of one long table."""
    weight, indices = call.args["weight"], call.args["indices"]
    if not weight.batched:
        return b.again(call)
    if not indices.batched:
        flat = b.emit(aten.reshape.default, indices, [-1])
        return b.reshape(b.emit(aten.index_select.default, weight, 1, flat), call.shape)
    first_row = b.emit(aten.arange.default, b.n(), device=weight.cell.device)
    first_row = b.emit(aten.mul.Tensor, first_row, weight.shape[0])
    offset = b.aligned(Value(first_row, True, weight.cell.new_empty(())), indices.rank)
    rows = b.emit(aten.add.Tensor, indices, offset)
    return b.emit(aten.embedding.default, b.folded(weight.node), rows)


def _is_batched(value: Value | None) -> bool:
    return value is not None and value.batched


def _cast(b: Builder, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if node.meta["val"].dtype == dtype else b.emit(aten._to_copy.default, node, dtype=dtype)


def _widened(b: Builder, x: Value, node: fx.Node) -> fx.Node:
    """In low precision a norm is computed in float32 and rounded after the weights, as fused kernels do."""
    return _cast(b, node, torch.float32) if x.dtype in _LOW_PRECISION else node


def _without_weights(b: Builder, call: Call, x: fx.Node) -> fx.Node:
    changes = {name: None for name in ("weight", "bias") if name in call.args}
    return b.again(call, input=x, **changes)


def _affine(b: Builder, y: fx.Node, x: Value, weight: Value | None, bias: Value | None) -> fx.Node:
    """Scale and shift the normalised value, each lined up with the trailing dims of x."""
    if weight is not None:
        y = b.emit(aten.mul.Tensor, y, b.aligned(weight, x.rank))
    if bias is not None:
        y = b.emit(aten.add.Tensor, y, b.aligned(bias, x.rank))
    return y


def _channels(b: Builder, value: Value | None, x: Value) -> Value | None:
    """Per-channel weights [C] as [C, 1, ...], so that they line up with x[B, C, ...]."""
    if value is None:
        return None
    node, cell = value.node, value.cell
    for _ in range(x.rank - 2):
        node, cell = b.emit(aten.unsqueeze.default, node, -1), cell.unsqueeze(-1)
    return Value(node, value.batched, cell)
