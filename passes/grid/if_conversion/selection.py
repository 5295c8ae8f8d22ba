"""Legality: where a selection, or a lane that starts with another value, leaves every result as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from rmtcompile.ir.program import Body
from rmtcompile.passes.flat.functionalise import is_pointwise
from rmtcompile.passes.grid.if_conversion.rows import CannotMergeError, aten


def check_selection(theirs: Any, mine: Any, reader: fx.Node) -> None:
    """A selection has one type, and its reader must not see that the smaller operand was expanded."""
    if not isinstance(theirs, torch.Tensor) or not isinstance(mine, torch.Tensor):
        raise CannotMergeError
    if (theirs.dtype, theirs.device) != (mine.dtype, mine.device):
        raise CannotMergeError
    if theirs.shape != mine.shape:
        wide = _broadcast(theirs.shape, mine.shape)
        if wide is None or not all(v.shape == wide or _hides(reader, v.shape, wide) for v in (theirs, mine)):
            raise CannotMergeError


def can_fill(start: fx.Node, lane: Any, body: Body) -> bool:
    """Whether a first value can be stored in the lane: same dtype and device, and the same shape or one that
    is expanded to it unseen."""
    val = start.meta.get("val")
    if not isinstance(val, torch.Tensor) or not isinstance(lane, torch.Tensor):
        return False
    if (val.dtype, val.device) != (lane.dtype, lane.device):
        return False
    if val.shape == lane.shape:
        return True
    readers = [node for node in body.nodes if start in node.all_input_nodes]
    return val.dim() == lane.dim() and all(_hides(node, val.shape, lane.shape) for node in readers)


def _hides(node: Any, shape: Sequence[int], wide: Sequence[int]) -> bool:
    """Whether an operation gives the same result if an operand of this shape is expanded to `wide` before: it
    broadcasts where it is expanded, and its result has all of `wide` already. A sum, say, would count more
    summands."""
    result = node.meta.get("val")
    if not isinstance(result, torch.Tensor) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in (aten.matmul.default, aten.bmm.default, aten.baddbmm.default):
        if min(len(shape), len(wide)) < 3 or shape[-2:] != wide[-2:]:
            return False
        shape, wide, covered = shape[:-2], wide[:-2], result.shape[:-2]
    elif is_pointwise(node):
        covered = result.shape
    else:
        return False
    return _broadcast(shape, wide) == wide and _broadcast(wide, covered) == covered


def _broadcast(a: Sequence[int], b: Sequence[int]) -> Sequence[int] | None:
    try:
        return torch.broadcast_shapes(a, b)
    except RuntimeError:
        return None
