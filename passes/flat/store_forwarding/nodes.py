"""What a node is to this pass: a load in normal form, a reshape, a permutation."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rmtcompile.passes.flat.functionalise import RESHAPES, bind, overload_name
from rmtcompile.passes.flat.store_forwarding.ranges import Range, slice_range

aten = torch.ops.aten

SPLITS = {"split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"}


@dataclass(frozen=True)
class View:
    """A load in normal form: `range` of dimension `dim` of `source`."""

    source: fx.Node
    dim: int
    range: Range


def val_of(node: Any) -> torch.Tensor:
    """The fake value of a node."""
    return node.meta["val"]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The sizes of a node's value."""
    return tuple(val_of(node).shape)


def is_static_tensor(node: Any) -> bool:
    """Whether a node gives one tensor of known sizes."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    return all(isinstance(size, int) for size in node.meta["val"].shape)


def is_reshape(node: fx.Node) -> bool:
    """Whether a node only counts the elements of its operand in other dimensions (no `view` of a dtype)."""
    operand = node.args[0] if overload_name(node) in RESHAPES else None
    return (
        is_static_tensor(node) and is_static_tensor(operand) and val_of(node).dtype == val_of(operand).dtype
    )


def operand_of(node: fx.Node) -> fx.Node:
    """The first operand."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def as_load(node: fx.Node) -> View | None:
    """The load that a node is, or None."""
    if not is_static_tensor(node):
        return None
    if node.target is operator.getitem:
        return _item_load(node)
    name = overload_name(node)
    if name not in ("select", "slice", "narrow") or not is_static_tensor(node.args[0]):
        return None
    bound = bind(node)
    source = bound["self"]
    shape = shape_of(source)
    if not shape or not isinstance(bound["dim"], int):
        return None
    dim = bound["dim"] % len(shape)
    found: Range | None = None
    if node.target is aten.select.int and isinstance(bound["index"], int):
        found = Range(bound["index"] % shape[dim], 1, 1, True)
    elif node.target is aten.slice.Tensor:
        found = slice_range(shape[dim], bound["start"], bound["end"], bound["step"])
    elif node.target is aten.narrow.default and isinstance(bound["start"], int) and shape_of(node)[dim]:
        found = Range(bound["start"] % shape[dim], shape_of(node)[dim])
    return None if found is None else View(source, dim, found)


def _item_load(node: fx.Node) -> View | None:
    several, item = node.args
    if not isinstance(several, fx.Node) or not isinstance(item, int):
        return None
    name = overload_name(several)
    if name not in SPLITS | {"unbind"} or not is_static_tensor(several.args[0]):
        return None
    bound = bind(several)
    source, vals = bound["self"], several.meta["val"]
    dim, item = bound["dim"] % len(shape_of(source)), item % len(vals)
    if name == "unbind":
        return View(source, dim, Range(item, 1, 1, True))
    size = vals[item].shape[dim]
    return View(source, dim, Range(sum(v.shape[dim] for v in vals[:item]), size)) if size else None


def permutation(node: fx.Node) -> tuple[int, ...]:
    """Which dimension of its operand each dimension of a permutation is."""
    probe = torch.empty_strided(
        tuple(range(2, 2 + len(shape_of(node)))), (0,) * len(shape_of(node)), device="meta"
    )
    assert callable(node.target)
    return tuple(size - 2 for size in node.target(probe, *node.args[1:], **node.kwargs).shape)
