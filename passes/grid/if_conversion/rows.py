"""What a merged program consists of while classes are folded into it: ports, rows of operations, masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from rmtcompile.ir.grown import grown
from rmtcompile.ir.program import Affine

aten = torch.ops.aten


class CannotMergeError(Exception):
    """The classes differ in a way that a selection cannot bridge."""


@dataclass(eq=False)
class Port:
    """A live-in placeholder under construction: its index in each class, and what identifies it."""

    index: dict[int, int]
    val: Any
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Row:
    """One operation of the merged program; ports, rows and masks stand in its arguments."""

    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any]

    @property
    def val(self) -> Any:
        return self.meta.get("val")


@dataclass(frozen=True)
class Mask:
    """Whether a cell is of a class."""

    number: int


def port_of(node: fx.Node, number: int, index: int) -> Port:
    """A port for the live-in `index` of a class."""
    return Port({number: index}, node.meta.get("val"), kept_meta(node.meta))


def row_of(node: fx.Node, get: Callable[[fx.Node], Any], ints: Sequence[Affine] | None = None) -> Row:
    """An operation of a body as a row, its operands as `get` has them.

    Args:
        ints: of each integer among its arguments, in order, its value as a function of the segment.
    """
    args, kwargs = (node.args, node.kwargs) if ints is None else grown((node.args, dict(node.kwargs)), ints)
    return Row(node.target, mapped(args, get), mapped(kwargs, get), dict(node.meta))


def selection(number: int, theirs: Row | Port, mine: Row | Port) -> Row:
    """where(is_class, theirs, mine)."""
    a, b = theirs.val, mine.val
    meta = kept_meta(mine.meta) if isinstance(mine, Row) else {}
    with b.fake_mode:
        meta["val"] = torch.empty(torch.broadcast_shapes(a.shape, b.shape), dtype=b.dtype, device=b.device)
    return Row(aten.where.self, (Mask(number), theirs, mine), {}, meta)


def mask_val(rows: Sequence[Row]) -> Any:
    """A bool scalar where the rows compute."""
    val = next(row.val for row in rows if isinstance(row.val, torch.Tensor))
    with val.fake_mode:  # type: ignore[attr-defined]
        return torch.empty((), dtype=torch.bool, device=val.device)


def kept_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Where in the model a value comes from."""
    return {k: v for k, v in meta.items() if k in ("scope", "source")}


def mapped(value: Any, get: Callable[[fx.Node], Any]) -> Any:
    """Arguments with `get(node)` in place of each node."""
    return _replaced(value, lambda one: isinstance(one, fx.Node), get)


def renamed(value: Any, new: Mapping[Row, Row]) -> Any:
    """Arguments with rows replaced by those that stand for them now."""
    return _replaced(value, lambda one: isinstance(one, Row), lambda row: new.get(row, row))


def resolved(value: Any, made: Mapping[Row | Port | Mask, fx.Node]) -> Any:
    """Arguments with nodes in place of rows, ports and masks."""
    return _replaced(value, lambda one: isinstance(one, (Row, Port, Mask)), made.__getitem__)


def _replaced(value: Any, is_leaf: Callable[[Any], bool], get: Callable[[Any], Any]) -> Any:
    if is_leaf(value):
        return get(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(one, is_leaf, get) for one in value)
    if isinstance(value, dict):
        return {k: _replaced(one, is_leaf, get) for k, one in value.items()}
    return value
