"""Attention over open sizes: an operation of its own, which chooses its kernel where it runs.

    scaled_dot_product_attention(q[1, H, R, d], k, v, mask)   ->   rmtcompile.attention(q, k, v, mask)

Compiled code has one kernel for all sizes. The efficient one is compiled again for masks whose rows are
multiples of 16, and cuDNN's makes a plan for each shape that it meets, which takes the host 20 to 800 ms
(2026-11-28, H100, torch 2.11). Here flash, efficient and plain attention are asked in this order, for the
sizes at hand.

Requires: cells of a program of free sizes (`passes/sizes.py`). Fires where a size of the operands is free.
Ensures: the same attention, gradients too; kernels may round differently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rmtcompile.ir.size import Size

aten = torch.ops.aten

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor"
)


@torch.library.custom_op("rmtcompile::attention", mutates_args=(), schema=_SCHEMA)
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Arguments and result as of `torch.nn.functional.scaled_dot_product_attention`; the result is
    contiguous."""
    with sdpa_kernel(_KERNELS, set_priority=True):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        ).contiguous()


@attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    query, key, value, mask, _, ctx.is_causal = inputs
    ctx.save_for_backward(query, key, value, mask)
    scale = keyword_only_inputs["scale"]
    ctx.scale = query.shape[-1] ** -0.5 if scale is None else scale
    ctx.has_groups = keyword_only_inputs["enable_gqa"]


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key, value, and of a mask that is added; the weights of attention are computed
    again, in float32 at least."""
    query, key, value, mask = ctx.saved_tensors
    groups = query.shape[-3] // key.shape[-3] if ctx.has_groups else 1
    keys, values = (x.repeat_interleave(groups, -3) if groups > 1 else x for x in (key, value))
    scores = (query @ keys.mT) * ctx.scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if ctx.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        is_added = mask.is_floating_point()
        scores = scores + mask if is_added else scores.masked_fill(~mask, float("-inf"))
    weights = aten._safe_softmax.default(scores, -1)
    inner = (grad @ values.mT).to(weights.dtype)
    inner = weights * (inner - (inner * weights).sum(-1, keepdim=True))
    by_key = (inner.to(query.dtype).mT @ query) * ctx.scale
    by_value = weights.to(grad.dtype).mT @ grad
    return (
        ((inner.to(query.dtype) @ keys) * ctx.scale).sum_to_size(query.shape),
        _ungrouped(by_key, groups).sum_to_size(key.shape),
        _ungrouped(by_value, groups).sum_to_size(value.shape),
        inner.sum_to_size(mask.shape).to(mask.dtype) if mask is not None and mask.requires_grad else None,
        None,
        None,
    )


def _ungrouped(grad: torch.Tensor, groups: int) -> torch.Tensor:
    return grad.unflatten(-3, (-1, groups)).sum(-3) if groups > 1 else grad


attention.register_autograd(_gradients, setup_context=_keep)


def open_attention(graph: fx.Graph) -> fx.Graph:
    """A lifted cell with that operation wherever a size of attention's operands is free; the same object
    where there is none."""
    if not any(_is_open(node) for node in graph.nodes):
        return graph
    changed, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    changed.output(changed.graph_copy(graph, copies))
    for node, copy in copies.items():
        if _is_open(node):
            copy.target = torch.ops.rmtcompile.attention.default
    return changed


def _is_open(node: fx.Node) -> bool:
    """Whether a node is attention, without dropout, and one of its operands has a free size."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    if any(node.args[4:5]) or node.kwargs.get("dropout_p"):
        return False
    return any(isinstance(n, Size) for x in node.all_input_nodes for n in x.meta.get("sizes", ()))


__all__ = ["attention", "open_attention"]
