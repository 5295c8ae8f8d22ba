"""Which view of its operand a node takes, and the views that lead from one tensor to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from rmtcompile.ir.schema import bind
from rmtcompile.passes.flat.functionalise.memory import Link
from rmtcompile.passes.flat.functionalise.nodes import PERMUTES, RESHAPES, UNDECLARED, overload_name
from rmtcompile.passes.flat.functionalise.values import dense_order, same_strides

aten = torch.ops.aten

# fmt: off
# Operations that may hand back their own argument, and then are no computation at all.
IDENTITIES = {
    "to", "contiguous", "type_as", "positive", "resolve_conj", "resolve_neg", "lift_fresh", "cpu", "cuda",
    "data",
}
# fmt: on


def _is_static(shape: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in shape)


def link_of(
    node: fx.Node, parent: torch.Tensor, val: torch.Tensor, item: int | None, vals: Sequence[Any]
) -> Link:
    """The link for a view node, or for one of the views that it gives."""
    target, name, bound = node.target, overload_name(node), bind(node)
    generic = Link("generic", (item,), (target, node.args, dict(node.kwargs)))
    if not _is_static(parent.shape) or not _is_static(val.shape) or parent.dtype != val.dtype:
        return Link("dtype", (val.dtype,)) if target is aten.view.dtype else generic
    dim = bound.get("dim", 0)
    dim = dim % parent.dim() if isinstance(dim, int) and parent.dim() else dim
    if item is not None:
        if name == "unbind":
            return Link("select", (dim, item))
        if name in ("split", "split_with_sizes", "chunk", "tensor_split"):
            start = sum(v.shape[dim] for v in vals[:item])
            return Link("slice", (dim, start, start + val.shape[dim], 1))
        return generic
    if target is aten.select.int:
        return Link("select", (dim, bound["index"]))
    if target is aten.slice.Tensor:
        return Link("slice", (dim, bound["start"], bound["end"], bound["step"]))
    if target is aten.narrow.default and isinstance(bound["start"], int):
        start = bound["start"] % max(parent.shape[dim], 1)
        return Link("slice", (dim, start, start + bound["length"], 1))
    if name in RESHAPES:
        return Link("reshape", (tuple(val.shape),))
    if name in PERMUTES:
        # Distinct sizes show which dimension went where, whatever the spelling of the operation.
        probe = torch.empty_strided(tuple(range(2, 2 + parent.dim())), (0,) * parent.dim(), device="meta")
        shape = target(probe, *node.args[1:], **node.kwargs).shape  # type: ignore[operator]
        return Link("permute", (tuple(size - 2 for size in shape),))
    if name in ("expand", "expand_as", "broadcast_to"):
        return Link("expand", (tuple(val.shape),))
    if name == "detach":
        return Link("detach")
    if name == "diagonal":
        return Link("diagonal", (bound["offset"], bound["dim1"], bound["dim2"]))
    if (
        parent.shape == val.shape
        and (name in IDENTITIES | UNDECLARED | {"alias"})
        and same_strides(parent, val)
    ):
        return Link("identity")
    return generic


def path_between(cover: torch.Tensor, part: torch.Tensor) -> list[tuple[Link, torch.Tensor]] | None:
    """The views that lead from one tensor to another of the same storage, or None if none is known."""
    if cover.dtype != part.dtype or cover.numel() < part.numel() or dense_order(cover) is None:
        return None
    rest = int(part.storage_offset()) - int(cover.storage_offset())
    if rest < 0:
        return None
    path: list[tuple[Link, torch.Tensor]] = []
    current = cover

    def step(kind: str, args: tuple[Any, ...], value: torch.Tensor) -> None:
        nonlocal current
        current = value
        path.append((Link(kind, args), value))

    if cover.is_contiguous() and part.is_contiguous() and cover.numel() == part.numel() and not rest:
        step("reshape", (tuple(part.shape),), cover.reshape(part.shape))
        return path
    starts = {}
    for d in sorted(range(cover.dim()), key=cover.stride, reverse=True):
        starts[d], rest = divmod(rest, max(cover.stride(d), 1)) if cover.size(d) > 1 else (0, rest)
    wanted = {stride: size for size, stride in zip(part.shape, part.stride(), strict=True) if size > 1}
    if len(wanted) != sum(size > 1 for size in part.shape):
        return None
    kept: list[int] = []
    for d in reversed(range(cover.dim())):
        size = wanted.pop(cover.stride(d), None) if cover.size(d) > 1 else None
        if starts[d] + (size or 1) > cover.size(d):
            return None
        if size is None:
            step("select", (d, starts[d]), current.select(d, starts[d]))
            continue
        kept.insert(0, cover.stride(d))
        if size != cover.size(d):
            step("slice", (d, starts[d], starts[d] + size, 1), current.narrow(d, starts[d], size))
    if wanted or rest:
        return None
    order = tuple(
        kept.index(stride) for size, stride in zip(part.shape, part.stride(), strict=True) if size > 1
    )
    if order != tuple(range(len(order))):
        step("permute", (order,), current.permute(order))
    if current.shape != part.shape:
        step("reshape", (tuple(part.shape),), current.reshape(part.shape))
    same = current.storage_offset() == part.storage_offset() and same_strides(current, part)
    return path if same else None
