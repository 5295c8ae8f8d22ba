"""Attention: kernels of attention become `scaled_dot_product_attention` again.

    _scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        ->   scaled_dot_product_attention(q, k, v, is_causal=True)

A forward that is traced below autograd shows the kernel that torch chose for one cell on this device. Which
one is best for many is chosen when they run, and the whole operation is what the later passes know.

Requires: a graph with meta `val`. Ensures: the same values up to rounding; kernels whose other results are
read, or that drop out values, stay.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

KERNELS = {
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
}


def attention(module: fx.GraphModule) -> fx.GraphModule:
    """Rewrite every such kernel; the same object where there is none."""
    found = [node for node in module.graph.nodes if node.target in KERNELS]
    for node in found:
        _rewrite(node)
    if found:
        module.recompile()
    return module


def _rewrite(node: fx.Node) -> None:
    target: Any = node.target
    given: dict[str, Any] = {
        argument.name: value for argument, value in zip(target._schema.arguments, node.args, strict=False)
    }
    given |= node.kwargs
    taken = {user.args[1] if user.target is operator.getitem else -1 for user in node.users if user.users}
    if given.get("dropout_p", 0.0) or taken - {0}:
        return
    query, key, value = given["query"], given["key"], given["value"]
    options: dict[str, Any] = {"is_causal": given.get("is_causal", False), "scale": given.get("scale")}
    if query.meta["val"].shape[-3] != key.meta["val"].shape[-3]:
        options["enable_gqa"] = True
    mask = given.get("attn_bias", given.get("attn_mask"))
    with node.graph.inserting_before(node):
        whole = node.graph.call_function(
            aten.scaled_dot_product_attention.default, (query, key, value, mask, 0.0), options
        )
    whole.meta = {**node.meta, "val": node.meta["val"][0]}
    for user in list(node.users):
        user.replace_all_uses_with(whole)
        node.graph.erase_node(user)
    node.graph.erase_node(node)
