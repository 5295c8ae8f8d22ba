"""Strides after the rewrite: metadata is kept true, and what is read by address keeps its layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rmtcompile.errors import UnsupportedError
from rmtcompile.passes.flat.functionalise import dense_order, same_strides, where
from rmtcompile.passes.flat.store_forwarding.builder import Builder
from rmtcompile.passes.flat.store_forwarding.nodes import is_reshape, shape_of

aten = torch.ops.aten


def refresh(w: Builder, node: fx.Node) -> bool:
    """Brings the metadata of a node up to date whose operands have other strides than at capture.

    Gives whether its users have to be looked at, too.
    """
    before = node.meta.get("val")
    if node.op != "call_function" or not isinstance(before, (torch.Tensor, list, tuple)):
        return False
    try:
        val = w.values.run(node.target, node.args, node.kwargs)
    except (RuntimeError, ValueError):
        _make_valid(w, node)
        val = w.values.run(node.target, node.args, node.kwargs)
    node.meta["val"] = val
    if _same_layout(before, val):
        return False
    if node in w.pinned and isinstance(before, torch.Tensor):
        _restore(w, node, before)
        return False
    return True


def _make_valid(w: Builder, node: fx.Node) -> None:
    """Rewrites a view of memory that is laid out differently now."""
    if is_reshape(node):
        node.target, node.args = aten.reshape.default, (node.args[0], list(shape_of(node)))
        node.kwargs = {}
        return
    w.here = node
    for operand in node.all_input_nodes:
        if isinstance(operand.meta.get("val"), torch.Tensor):
            plain = w.emit(aten.clone.default, operand, memory_format=torch.contiguous_format)
            node.replace_input_with(operand, plain)


def _same_layout(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and same_strides(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return all(_same_layout(x, y) for x, y in zip(a, b, strict=True))
    return True


def _restore(w: Builder, node: fx.Node, before: torch.Tensor) -> None:
    """Gives a node that is read by address its layout at capture back."""
    order = dense_order(before)
    if order is None:
        raise UnsupportedError("as_strided on a tensor whose layout was rewritten", [where(node)])
    users = list(node.users)
    w.here = node.next
    moved = w.emit(aten.permute.default, node, order)
    moved = w.emit(aten.clone.default, moved, memory_format=torch.contiguous_format)
    back = w.emit(aten.permute.default, moved, sorted(range(len(order)), key=lambda d: order[d]))
    for user in users:
        user.replace_input_with(node, back)
    w.here = node
