"""The pieces of operations that know where a piece lies: padding, triangles, convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rmtcompile.passes.flat.functionalise import bind, overload_name
from rmtcompile.passes.flat.store_forwarding.nodes import shape_of
from rmtcompile.passes.flat.store_forwarding.ranges import Range
from rmtcompile.passes.flat.stream import Streamer
from rmtcompile.passes.flat.strip_rows import TRIANGLES, window_of

aten = torch.ops.aten
PADS = ("pad", "constant_pad_nd")


class PieceMaker(Streamer):
    """Loads of a piece of such an operation; see `strip_mine`.

    Attributes:
        usual: pieces of the inputs, by the length of all.
    """

    usual: dict[int, tuple[int, ...]]

    def special(self, node: fx.Node, d: int, lo: int, size: int) -> fx.Node | None:
        """The piece of an operation that knows where its piece lies."""
        name, rank = overload_name(node), len(shape_of(node))
        if name in PADS:
            return self._padded(node, d, lo, size)
        if name in TRIANGLES and d >= rank - 2:
            bound = bind(node)
            piece = self.load(bound["self"], d, Range(lo, size))
            return self.emit(node.target, piece, bound["diagonal"] + (lo if d == rank - 2 else -lo))
        return self._convolved(node, lo, size) if window_of(node) is not None else None

    def moved(self, sizes: tuple[int, ...], total: int) -> tuple[int, ...]:
        """The pieces of a convolution's result: as those of its operand, what it adds or loses at one end."""
        more = total - sum(sizes)
        at_end = more > 0 or sizes[0] <= sizes[-1]
        first, last = (0, more) if at_end else (more, 0)
        return self.usual.get(total, (sizes[0] + first, *sizes[1:-1], sizes[-1] + last))

    def _convolved(self, node: fx.Node, lo: int, size: int) -> fx.Node | None:
        """The piece of a convolution: of the positions that it reads, padded at the ends of the input."""
        window = window_of(node)
        assert window is not None
        bound, n = bind(node), shape_of(window.source)[-1]
        start, end = lo - window.padding, lo - window.padding + size + window.beyond
        first, last = max(start, 0), min(end, n)
        if first >= last or size < 1:
            return None
        piece = self.load(window.source, 2, Range(first, last - first))
        if (pads := [first - start, end - last]) != [0, 0]:
            piece = self.emit(aten.constant_pad_nd.default, piece, pads, 0.0)
        weights = (bound["weight"], bound["bias"], [1], [0], bound["dilation"], bound["groups"])
        return self.emit(node.target, piece, *weights)

    def pads(self, node: fx.Node, d: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of pieces whose first and last one are padded."""
        left, right = _pads_along(node, d)
        return (sizes[0] + left, *sizes[1:-1], sizes[-1] + right)

    def _padded(self, node: fx.Node, d: int, lo: int, size: int) -> fx.Node | None:
        """The piece of a padded value: that of the operand, with its share of the padding."""
        if overload_name(node) not in PADS or bind(node).get("mode", "constant") != "constant":
            return None
        bound, at = bind(node), 2 * (len(shape_of(node)) - 1 - d)
        (left, right), n = _pads_along(node, d), shape_of(bound["self"])[d]
        if min(left, right) < 0 or (left, right) == (0, 0):
            return None
        first, last = max(lo - left, 0), min(lo - left + size, n)
        if first >= last:
            return None
        pads = list(bound["pad"])
        pads[at : at + 2] = max(left - lo, 0), max(lo - left + size - n, 0)
        piece = self.load(bound["self"], d, Range(first, last - first))
        return self.emit(node.target, piece, pads, *node.args[2:], **node.kwargs) if any(pads) else piece


def _pads_along(node: fx.Node, d: int) -> tuple[int, int]:
    """Elements that a padding adds before and behind a dimension."""
    pads: list[Any] = list(bind(node)["pad"])
    at = 2 * (len(shape_of(node)) - 1 - d)
    left, right = (*pads[at : at + 2], 0, 0)[:2]
    return left, right
