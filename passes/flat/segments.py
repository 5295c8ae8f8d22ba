"""Segments: which segments of the inputs a node of a flat graph depends on.

Requires: a graph whose loads are forwarded, and along which dimensions its inputs are cut.
"""

from __future__ import annotations

from torch import fx

from rmtcompile.ir.segmentation import Cuts
from rmtcompile.passes.flat.store_forwarding.nodes import as_load


class Segments:
    """The last segment that each node depends on; -1 where it depends on none."""

    def __init__(self, cuts: Cuts, n_segments: int) -> None:
        self.cuts, self.n_segments = cuts, n_segments
        self.known: dict[fx.Node, int] = {}
        self.whole: dict[fx.Node, bool] = {}

    def of(self, node: fx.Node) -> int:
        """The last segment whose input a node reads, in the end."""
        if node not in self.known:
            self.known[node] = self._of(node)
        return self.known[node]

    def is_whole(self, node: fx.Node) -> bool:
        """Whether a node reads a cut input other than by pieces of it."""
        if node not in self.whole:
            is_cut = node.op == "placeholder" and node.target in self.cuts
            self.whole[node] = is_cut or (
                self._piece(node) is None and any(self.is_whole(operand) for operand in node.all_input_nodes)
            )
        return self.whole[node]

    def _of(self, node: fx.Node) -> int:
        if node.op == "placeholder":
            return self.n_segments - 1 if node.target in self.cuts else -1
        piece = self._piece(node)
        if piece is not None:
            return piece
        return max((self.of(operand) for operand in node.all_input_nodes), default=-1)

    def _piece(self, node: fx.Node) -> int | None:
        """The last segment of a piece of an input; None for other nodes."""
        view = as_load(node)
        if view is not None and view.source.op == "placeholder" and view.source.target in self.cuts:
            dim, length = self.cuts[str(view.source.target)]
            if view.dim == dim:
                return min(view.range.at(view.range.n - 1) // length, self.n_segments - 1)
        return None
