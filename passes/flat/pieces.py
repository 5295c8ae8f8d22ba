"""Pieces: a split into pieces of one length, however it says so, becomes `split` with that length.

    split_with_sizes(x, [4, 4, 2], 1)   ->   split(x, 4, 1)
    tensor_split(x, [4, 8], 1)
    hsplit(x, [4, 8])

A list that grows with the number of segments follows no rule; one length does.

Requires: a functional graph with meta `val`. Ensures: the same pieces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_SPLITS: dict[Any, int | None] = {
    **dict.fromkeys((aten.split_with_sizes.default, aten.tensor_split.indices, aten.tensor_split.sections)),
    **dict.fromkeys((aten.vsplit.array, aten.vsplit.int), 0),
    **dict.fromkeys((aten.hsplit.array, aten.hsplit.int), 1),
    **dict.fromkeys((aten.dsplit.array, aten.dsplit.int), 2),
}
"""The dimension that each cuts, None where it is told; `hsplit` of a vector cuts its only one."""


def pieces(module: fx.GraphModule) -> fx.GraphModule:
    """Rewrite every such split; the same object where there is none."""
    changed = False
    for node in module.graph.nodes:
        if node.target not in _SPLITS:
            continue
        dim = _dim(node)
        *whole, last = [piece.shape[dim] for piece in node.meta["val"]]
        if len(set(whole)) == 1 and 0 < last <= whole[0]:
            node.target, node.args, node.kwargs = aten.split.Tensor, (node.args[0], whole[0], dim), {}
            changed = True
    if changed:
        module.recompile()
    return module


def _dim(node: fx.Node) -> int:
    dim = _SPLITS[node.target]
    if dim is not None:
        return min(dim, node.args[0].meta["val"].dim() - 1)  # type: ignore[union-attr]
    told = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    assert isinstance(told, int)
    return told
