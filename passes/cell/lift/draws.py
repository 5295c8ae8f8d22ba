"""Batching rules of operations that draw random numbers: each cell draws its own.

    dropout(x[n,B,T,D], 0.1)       one mask over all n cells, whose elements are independent
    dropout(w[D,D], 0.1)           dropout(expand(w, [n,D,D]), 0.1), also where all cells share w
    rand([B, T])                   rand([n, B, T])

As `torch.vmap(randomness="different")` does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rmtcompile.passes.cell.lift.algebra import attention
from rmtcompile.passes.cell.lift.builder import Builder, Call, Rule, Value, aten, replaced, values_in
from rmtcompile.passes.cell.lift.fallback import fallback, refusal


def each(b: Builder, call: Call) -> Any:
    """`bernoulli(x[n,B,T], p[T])` -> `bernoulli(x, expand(p, [n,1,T]))`: a number for each element of each
    cell."""
    named = {name: value for name, value in call.args.items() if isinstance(value, Value)}
    if len(named) != len(list(values_in(list(call.args.values())))):
        return fallback(b, call)
    rank = max(value.rank for value in named.values())
    changes = {name: b.aligned(b.spread_as_value(value), rank) for name, value in named.items()}
    return b.again(call, **changes)


def sized(b: Builder, call: Call) -> fx.Node:
    """`rand([B, T])` -> `rand([n, B, T])`."""
    return b.again(call, size=[b.n(), *call.args["size"]])


def randperm(b: Builder, call: Call) -> fx.Node:
    """`randperm(k)` -> `argsort(rand([n, k]))`."""
    val = call.out
    size = [b.n(), *call.shape]
    order = b.emit(
        aten.argsort.default, b.emit(aten.rand.default, size, dtype=torch.float64, device=val.device)
    )
    return order if val.dtype == torch.int64 else b.emit(aten._to_copy.default, order, dtype=val.dtype)


def by_channel(b: Builder, call: Call) -> fx.Node:
    """`feature_dropout(x[n,B,C,T])`: it drops whole [T] of each batch and channel, so the axis joins the
    batch."""
    return b.reshape(b.again(call, input=b.folded(b.spread(call.args["input"]))), call.shape)


def multinomial(b: Builder, call: Call) -> fx.Node:
    """`multinomial(p[n,B,K])` -> `multinomial(p[n*B,K])`."""
    x = call.args["self"]
    weights = b.spread(x)
    return b.reshape(b.again(call, self=weights if x.rank == 1 else b.folded(weights)), call.shape)


DRAWS: dict[Any, Rule] = {
    **dict.fromkeys(
        [
            aten.dropout.default,
            aten.native_dropout.default,
            aten._fused_dropout.default,
            aten.alpha_dropout.default,
            aten.bernoulli.default,
            aten.bernoulli.p,
            aten.bernoulli.Tensor,
            aten.rand_like.default,
            aten.randn_like.default,
            aten.randint_like.default,
            aten.randint_like.low_dtype,
            aten.random.default,
            aten.random.to,
            getattr(aten.random, "from"),
            aten.uniform.default,
            aten.normal_functional.default,
            aten.normal.Tensor_float,
            aten.normal.float_Tensor,
            aten.normal.Tensor_Tensor,
            aten.log_normal.default,
            aten.exponential.default,
            aten.geometric.default,
            aten.cauchy.default,
            aten.poisson.default,
            aten.binomial.default,
            aten._standard_gamma.default,
            aten._sample_dirichlet.default,
            aten.rrelu.default,
            aten.rrelu_with_noise_functional.default,
        ],
        each,
    ),
    aten.rand.default: sized,
    aten.randn.default: sized,
    aten.randint.default: sized,
    aten.randint.low: sized,
    aten.normal.float_float: sized,
    aten.randperm.default: randperm,
    aten.feature_dropout.default: by_channel,
    aten.feature_alpha_dropout.default: by_channel,
    aten.multinomial.default: multinomial,
}
"""Rules for when numbers are drawn; where none are (evaluation mode), an operation is one like others."""


def drawing(op: Any) -> Rule:
    """The batching rule of an operation that draws numbers."""
    return DRAWS.get(op, _other)


def _other(b: Builder, call: Call) -> Any:
    """Attention, whose rule folds the axis into the batch; others one by one, each cell with its operands."""
    if call.op is aten.scaled_dot_product_attention.default:
        return attention(b, call)
    if not call.values:
        raise refusal(call.node, "how it draws its numbers for several cells is not known")
    spread = replaced(call.args, lambda a: b.spread_as_value(a) if isinstance(a, Value) else a)
    return fallback(b, replace(call, args=spread))
