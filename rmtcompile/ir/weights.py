"""Weights: which leaves of the model make the value of a weight placeholder."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx


@dataclass(frozen=True)
class Weight:
    """Leaves that make one placeholder's value: per layer, a tuple of leaf names concatenated along dim 0.

        Weight((("layers.0.q", "layers.0.k"), ("layers.1.q", "layers.1.k")))      # 2 layers, 2 parts each

    Attributes:
        leaves: `leaves[layer][part]` is the name of a leaf; all layers have the same number of parts.
        dtype: what they are converted to, once a run; None: they are read as they are.
    """

    leaves: tuple[tuple[str, ...], ...]
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if len({len(parts) for parts in self.leaves}) > 1:
            raise ValueError(f"layers differ in their number of parts: {self.leaves}")

    @property
    def n_layers(self) -> int:
        """How many layers share the placeholder."""
        return len(self.leaves)

    @property
    def conversion(self) -> str:
        """What is done to the leaves, in words: ` as bfloat16`, or nothing."""
        return f" as {str(self.dtype).removeprefix('torch.')}" if self.dtype is not None else ""


@dataclass(frozen=True)
class Rows:
    """Rows of one leaf that is stacked already, [L, ...], in the model itself: one row a layer."""

    leaf: str
    rows: tuple[int, ...]

    @property
    def index(self) -> str:
        """Source of the index that picks them: `[0:3]`, or a list where they are not in a row."""
        first = self.rows[0]
        if self.rows == tuple(range(first, first + len(self.rows))):
            return f"[{first}:{first + len(self.rows)}]"
        return f"[{list(self.rows)}]"


def row_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(leaf, i) of `leaf[i]`, or of the i-th of `leaf.unbind()`; None for other nodes."""
    if node.target is torch.ops.aten.select.int and node.args[1] == 0:
        leaf, index = node.args[0], node.args[2]
    elif node.target is operator.getitem:
        parts, index = node.args
        if not isinstance(parts, fx.Node) or parts.target is not torch.ops.aten.unbind.int:
            return None
        if (*parts.args, *parts.kwargs.values())[1:] not in ((), (0,)):
            return None
        leaf = parts.args[0]
    else:
        return None
    if not isinstance(leaf, fx.Node) or leaf.op != "get_attr" or not isinstance(index, int):
        return None
    return leaf, index % leaf.meta["val"].shape[0]
