"""What the rules for padded cells build with: sizes, how much of a dim is valid, and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rmtcompile.ir.size import Size

aten = torch.ops.aten

REST = "rest"


class CannotPad(Exception):
    """A cell has no form of fixed shapes; the message says why."""


class Builder:
    """Copies a lifted cell node by node.

    Args:
        size: name of the size that becomes the largest one.
        argument: name of the new first argument, which says how much of it is valid.

    Attributes:
        graph: what is built.
        least: the smallest rest for which all positions that are read are there: of three, the last four are
            three.
        apart: shapes of values in which a dim that depends on the rest is joined with others (the rows of all
            inputs of a batch, for a product): there it stays a dim of its own until it is one again.
    """

    def __init__(self, size: str, argument: str) -> None:
        self.size = size
        self.graph = fx.Graph()
        self.apart: dict[fx.Node, tuple[int, ...]] = {}
        self.least = 1
        self._copies: dict[fx.Node, Any] = {}
        self._standing: set[fx.Node] = set()  # for operations of the cell
        self._rest = self.graph.placeholder(argument)
        self._counts: dict[Any, fx.Node] = {}  # by the terms of sizes
        self._valid: dict[Any, fx.Node] = {}  # by terms and device

    # ---- the cell as it was --------------------------------------------------------------------------------

    def depends(self, value: Any) -> bool:
        """Whether an integer depends on the rest."""
        return isinstance(value, Size) and self.size in value.names

    def concerns(self, node: fx.Node) -> bool:
        """Whether an operation has to do with the rest at all."""
        integers = pytree.tree_leaves((node.args, dict(node.kwargs)))
        return (
            any(map(self.depends, integers))
            or bool(self.open_dims(node))
            or any(self.open_dims(x) for x in node.all_input_nodes)
        )

    def sizes(self, node: Any) -> tuple[int, ...]:
        """Shape of a value of the cell, the axis of cells in front included; of no dims if it is none."""
        val = node.meta.get("val") if isinstance(node, fx.Node) else None
        if not isinstance(val, torch.Tensor):
            return ()
        found: tuple[int, ...] = node.meta.get("sizes", tuple(map(int, val.shape)))
        return found

    def open_dims(self, node: Any) -> tuple[int, ...]:
        """Dims of a value that depend on the rest."""
        return tuple(i for i, n in enumerate(self.sizes(node)) if self.depends(n))

    def keep(self, node: fx.Node) -> fx.Node:
        """Copy an operation as it is."""
        copy = self.graph.node_copy(node, self.mapped)
        self._copies[node] = copy
        self._standing.add(copy)
        return copy

    def done(self, node: fx.Node, copy: fx.Node) -> None:
        """Note what stands for an operation."""
        if copy not in self._standing:
            copy.meta = dict(node.meta)
            if node in self.apart:
                copy.meta["sizes"] = self.apart[node]
        self._copies[node] = copy
        self._standing.add(copy)

    def check_results(self, output: fx.Node) -> None:
        """Results have the shapes of the cell's."""
        for node in output.all_input_nodes:
            if node in self.apart:
                raise self.refused(node, "a result joins a dim that depends on the rest with another one")

    def mapped(self, value: Any) -> Any:
        """Arguments of the cell, in the padded cell."""
        return fx.map_arg(value, self._copies.__getitem__)

    def refused(self, node: fx.Node, why: str) -> CannotPad:
        """An error that names the operation."""
        source = node.meta.get("source", "")
        return CannotPad(f"{why}: {getattr(node.target, '__name__', node.target)}{source and f'   {source}'}")

    # ---- new operations ------------------------------------------------------------------------------------

    def call(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new operation, where another one was in the model."""
        made = self.graph.call_function(target, args, kwargs)
        made.meta = {k: v for k, v in like.meta.items() if k in ("source", "context")}
        return made

    def count(self, node: fx.Node, size: int) -> Any:
        """How large a size is at this rest: an int64 tensor of no dims, or the integer where it is none."""
        if not self.depends(size):
            return size
        assert isinstance(size, Size)
        terms = dict(size.terms)
        if set(terms) - {(self.size,), ()}:
            raise self.refused(node, f"a size of {size} is a product of sizes")
        if size.terms not in self._counts:
            factor, more = terms[(self.size,)], terms.get((), 0)
            made: fx.Node = self._rest
            if factor != 1:
                made = self.call(node, aten.mul.Tensor, made, factor)
            if more:
                made = self.call(node, aten.add.Tensor, made, more)
            self._counts[size.terms] = made
        return self._counts[size.terms]

    def needs(self, size: int, enough: int) -> None:
        """Note that a size has to be so large."""
        if isinstance(size, Size) and self.depends(size) and not set(dict(size.terms)) - {(self.size,), ()}:
            terms = dict(size.terms)
            self.least = max(self.least, -((terms.get((), 0) - enough) // terms[(self.size,)]))

    def device(self, node: fx.Node) -> torch.device:
        """Where a value of the cell is."""
        device: torch.device = node.meta["val"].device
        return device

    def positions(self, node: fx.Node, size: int, device: torch.device) -> fx.Node:
        """0, 1, ... size - 1."""
        return self.call(node, aten.arange.default, size, device=device)

    def valid(self, node: fx.Node, size: int, device: torch.device) -> fx.Node:
        """Which positions of a dim of this size the segment has, bool [size]."""
        assert isinstance(size, Size)
        key = size.terms, device
        if key not in self._valid:
            positions = self.positions(node, size, device)
            self._valid[key] = self.call(node, aten.lt.Tensor, positions, self.count(node, size))
        return self._valid[key]

    def masks(self, node: fx.Node, x: fx.Node, dim: int) -> fx.Node:
        """`valid` of a dim of a value of the cell, in a shape that broadcasts with it."""
        shape = self.sizes(x)
        found = self.valid(node, shape[dim], self.device(x))
        behind = len(shape) - dim - 1
        if not behind:
            return found
        return self.call(node, aten.view.default, found, [shape[dim], *([1] * behind)])

    def filled(self, node: fx.Node, x: fx.Node, dims: Sequence[int], value: float | bool) -> fx.Node:
        """A value of the cell with `value` behind what the segment has, along the dims that depend on it."""
        found: fx.Node = self.mapped(x)
        for dim in dims:
            if dim in self.open_dims(x):
                found = self.call(node, aten.where.ScalarOther, self.masks(node, x, dim), found, value)
        return found

    def taken(self, node: fx.Node, x: fx.Node, dim: int, size: int, positions: fx.Node) -> fx.Node:
        """Positions of one dim of a padded value; those past its end are of no use.

        Args:
            size: of that dim.
            positions: which of them, int64 [k].
        """
        inside = self.call(node, aten.clamp.default, positions, 0, total(size, -1))
        return self.call(node, aten.index_select.default, x, dim, inside)


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an operation by its name; where it is not given, what the operation takes for it, or
    `default` where it has none of that name."""
    target: Any = node.target
    known = {one.name: (i, one) for i, one in enumerate(target._schema.arguments)}
    if name in node.kwargs:
        return node.kwargs[name]
    if name not in known:
        return default
    place, declared = known[name]
    if place < len(node.args):
        return node.args[place]
    return declared.default_value if declared.has_default_value() else default


def total(*sizes: int) -> int:
    """The sum of sizes and numbers, as a size where one of them is."""
    terms: dict[tuple[str, ...], int] = {}
    for size in sizes:
        for names, factor in size.terms if isinstance(size, Size) else (((), int(size)),):
            terms[names] = terms.get(names, 0) + factor
    kept = [(names, factor) for names, factor in terms.items() if factor]
    value = sum(map(int, sizes))
    if not any(names for names, _ in kept):
        return value
    return Size(value, tuple(sorted(kept, key=lambda term: (-len(term[0]), term[0]))))


__all__ = ["REST", "Builder", "CannotPad", "argument", "aten", "total"]
