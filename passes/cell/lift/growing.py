"""Values that grow with the segment: one tensor a cell, since the cells of one level lie in other
segments.

    k = cat([cache, new], 2)               cache[B,H,8*s,D], new[B,H,8,D]
        ->  each_cell(lambda s, x0, x1: cat([x0, x1], 2), segments, [cache, new], [])     a tuple of n
    y = attention(q, k, v, mask)           mask[8,8*s+8]
        ->  grouped_attention(q, k, v, mask)                                              [n,B,H,8,D]

Operations on such values run cell by cell, each as the model has it and at its own size, so that every
operation is right. What comes out in one size is stacked; all else of the cell stays one call for n cells.
Attention is one call: keys and values are filled up to the largest count of the window, and a mask keeps out
what was filled in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn.functional import pad

from rmtcompile.ir.grown import Grown, replaced
from rmtcompile.passes.cell.lift.builder import Builder, Value, aten
from rmtcompile.passes.cell.lift.fallback import refusal

SEGMENTS = "segments"
"""The parameter of a cell function that says the cells' segments."""

Cells = tuple[Any, ...]
"""A value that grows: that of each cell, in order."""


@dataclass(frozen=True)
class Hole:
    """Where an operand stands among the arguments of an operation."""

    index: int

    def __repr__(self) -> str:
        return f"x{self.index}"


@dataclass(frozen=True)
class PerCell:
    """One operation of a cell as a function of the segment and its operands.

    Attributes:
        op: the operation.
        args, kwargs: its arguments; `Hole`s for operands, `Grown` integers for what the segment decides.
        count: number of operands.
    """

    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    count: int

    def __call__(self, segment: int | None, *operands: Any) -> Any:
        """The result in a cell of this segment; None for that of the capture."""

        def value(one: Any) -> Any:
            if isinstance(one, Hole):
                return operands[one.index]
            return int(one) if segment is None else one.affine.at(segment, 0)

        args, kwargs = replaced((self.args, self.kwargs), lambda x: isinstance(x, (Hole, Grown)), value)
        return self.op(*args, **kwargs)

    @property
    def name(self) -> str:
        """What the operation is called."""
        return str(getattr(self.op, "_opname", self.op.__name__))

    def text(self, literal: Callable[[Any], str]) -> str:
        """Python source; `literal` gives that of what stands among the arguments."""
        parts = [literal(one) for one in self.args]
        parts += [f"{name}={literal(one)}" for name, one in self.kwargs.items()]
        names = ", ".join(["s", *(f"x{i}" for i in range(self.count))])
        if self.op is operator.getitem:
            return f"lambda {names}: {parts[0]}[{parts[1]}]"
        return f"lambda {names}: {literal(self.op)}({', '.join(parts)})"


def each(b: Builder, node: fx.Node, segments: fx.Node, values: Mapping[fx.Node, Value], cell: Any) -> Value:
    """Emit an operation cell by cell; see the module docstring.

    Args:
        segments: the placeholder of the cells' segments.
        values: lifted values by node of the cell.
        cell: fake result of one cell.
    """
    operands = [x for x in node.all_input_nodes if not isinstance(values[x].cell, int | float)]
    own = [x for x in operands if values[x].batched]
    shared = [x for x in operands if not values[x].batched]
    if not all(isinstance(values[x].node, fx.Node) for x in operands):
        raise refusal(node, "it reads a list of values as one that grows with the segments")

    def hole(x: fx.Node) -> Any:
        return Hole([*own, *shared].index(x)) if x in operands else values[x].node

    args, kwargs = replaced((tuple(node.args), dict(node.kwargs)), lambda x: isinstance(x, fx.Node), hole)
    op: Any = node.target
    function = PerCell(op, args, kwargs, len(operands))
    made = b.emit(each_cell, function, segments, [values[x] for x in own], [values[x] for x in shared])
    if isinstance(cell, torch.Tensor) and not node.meta.get("grows"):
        return Value(b.emit(stack_cells, made), True, cell)
    return Value(made, True, cell, grows=True)


def each_cell(
    function: Callable[..., Any], segments: Sequence[Any], own: Sequence[Any], shared: Sequence[Any]
) -> Cells:
    """`function(s, *operands)` for each cell.

    Args:
        function: of the segment and the operands of one cell.
        segments: of the cells.
        own: operands of which each cell has its own: tensors [n, ...], and tuples of one value a cell.
        shared: operands that all cells share, behind the others.

    Returns:
        One result a cell.
    """
    return tuple(function(s, *(x[i] for x in own), *shared) for i, s in enumerate(segments))


def stack_cells(values: Cells) -> torch.Tensor:
    """Values of one size, one a cell, as [n, ...]."""
    return torch.stack(values)


def grouped_attention(
    query: torch.Tensor, key: Cells, value: Cells, mask: Any, is_causal: bool = False, **options: Any
) -> torch.Tensor:
    """`scaled_dot_product_attention` of n cells that read different numbers of keys, in one call.

    Args:
        query: [n, B, H, T, D].
        key, value: of each cell, [B, H', C, D] with a count C of its own.
        mask: None; or of each cell, bool or added to the scores, to be broadcast to [B, H, T, C]: a tuple, or
            [n, ...] where its last dim is 1.
        is_causal: row i reads columns 0 .. i.
        options: further arguments of the operation.

    Returns:
        [n, B, H, T, D'].
    """
    counts = [int(one.shape[-2]) for one in key]
    most, rows = max(counts), int(query.shape[-2])
    masks = None
    if mask is not None:
        masks = [_closed(one, count, most) for one, count in zip(mask, counts, strict=True)]
    elif len(set(counts)) > 1 and not (is_causal and rows <= min(counts)):  # rows read what is filled in
        allowed = torch.ones(rows, most, dtype=torch.bool, device=query.device)
        allowed, is_causal = allowed.tril() if is_causal else allowed, False
        columns = torch.arange(most, device=query.device)
        masks = [allowed & (columns < count) for count in counts]
    batch = int(query.shape[1])
    keys, values = (_joined([_filled(one, most) for one in many]) for many in (key, value))
    together = None if masks is None else _joined([_batched(one, batch) for one in masks])
    result = aten.scaled_dot_product_attention.default(
        query.flatten(0, 1), keys, values, together, is_causal=is_causal, **options
    )
    return result.unflatten(0, (len(counts), batch))


def _joined(values: list[torch.Tensor]) -> torch.Tensor:
    return values[0] if len(values) == 1 else torch.cat(values)


def _filled(value: torch.Tensor, most: int) -> torch.Tensor:
    """Keys or values with zeros behind them."""
    missing = most - int(value.shape[-2])
    return pad(value, (0, 0, 0, missing)) if missing else value


def _closed(mask: torch.Tensor, count: int, most: int) -> torch.Tensor:
    """A mask of `most` columns that is closed behind those that there are."""
    mask = mask.expand(*mask.shape[:-1], count)
    return pad(mask, (0, most - count), value=False if mask.dtype is torch.bool else float("-inf"))


def _batched(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """A mask as [B, H or 1, T or 1, C]."""
    mask = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
    return mask.expand(batch, *mask.shape[1:])


__all__ = ["SEGMENTS", "Hole", "PerCell", "each", "each_cell", "grouped_attention", "stack_cells"]
