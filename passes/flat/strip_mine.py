"""strip_mine: what a layer-major forward computes of the whole input at once is computed segment by segment.

    h  = linear(x, W)                            x0 = slice(x, 1, 0, 8)        x1 = slice(x, 1, 8, 16)
    h0 = slice(h, 1, 0, 8)                 =>    h0 = linear(x0, W)            h1 = linear(x1, W)
    h1 = slice(h, 1, 8, 16)                      y0 = add(x0, read(h0, m0))    y1 = add(x1, read(h1, m1))
    y  = add(x, cat([read(h0, m0), ...], 1))     y  = cat([y0, y1], 1)

The loop over segments lies inside of each layer there; between these loops stand operations on all segments.
From the input on, in order, each value along which the segments lie is kept as the join of its segments'
pieces, and an operation that treats each position by itself (`row_wise`) is applied to the pieces.  Loads of
a join are the pieces themselves; put in the order of their segments, what is left is the graph of the same
forward written segment by segment.

requires: a functional graph whose loads are forwarded, and along which dimension its inputs are cut.
ensures:  the same values up to the rounding of kernels that run on other sizes.  Where pieces end changes how
          much runs in parallel, never a value; what needs several segments at once stays as it is.
Reference: strip mining, loop distribution, loop interchange.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import fx
from torch.fx.node import map_arg

from rmtcompile.ir.modes import graph_module
from rmtcompile.ir.randomness import is_random
from rmtcompile.ir.segmentation import Cuts
from rmtcompile.passes.flat.functionalise import is_pointwise, overload_name
from rmtcompile.passes.flat.segments import Segments
from rmtcompile.passes.flat.store_forwarding.joins import parts_of
from rmtcompile.passes.flat.store_forwarding.nodes import (
    View,
    as_load,
    is_reshape,
    is_static_tensor,
    operand_of,
    shape_of,
)
from rmtcompile.passes.flat.store_forwarding.ranges import Range
from rmtcompile.passes.flat.store_forwarding.rewrite import Forwarder, deep_recursion
from rmtcompile.passes.flat.store_forwarding.stores import store_of
from rmtcompile.passes.flat.stream import Dims
from rmtcompile.passes.flat.strip_pieces import PADS, PieceMaker
from rmtcompile.passes.flat.strip_rows import DRAWS, places_of, rows_of, window_of

aten = torch.ops.aten
_AS = {
    "expand_as": aten.expand.default, "view_as": aten.reshape.default, "reshape_as": aten.reshape.default
}  # fmt: skip
_SCATTERS = ("slice_scatter", "select_scatter")


def strip_mine(gm: fx.GraphModule, cuts: Cuts, n_segments: int, are_parts: bool = False) -> fx.GraphModule:
    """Apply row-wise operations to the pieces of segments; see the module docstring.

    Args:
        cuts: where inputs are cut.
        n_segments: segments in this capture.
        are_parts: whether they are parts of the model's own, which the forward walks in order: then joins of
            some of them are taken apart, too, and the order stays.
    """
    with deep_recursion():
        return _StripMiner(gm, cuts, n_segments, are_parts).run()


class _StripMiner(PieceMaker):
    """Walks the graph from the inputs on, and keeps values as joins of their segments' pieces."""

    moves_layouts = True

    def __init__(self, gm: fx.GraphModule, cuts: Cuts, n_segments: int, are_parts: bool) -> None:
        super().__init__(gm, lambda node: False, cuts=cuts)
        self.n_segments, self.are_parts = n_segments, are_parts
        self.first: dict[fx.Node, int] = {}  # segment of a join, where it is not of all
        self.segments = Segments(cuts, n_segments)
        self.strips: dict[fx.Node, tuple[int, tuple[int, ...]] | None] = {}
        self.usual = {}
        self.merged: dict[fx.Node, tuple[int, ...]] = {}  # rows of all batches: the dimensions they were
        self.mined: fx.Node | None = None  # whose pieces are made

    def run(self) -> fx.GraphModule:
        for node in list(self.graph.nodes):
            if overload_name(node) in _AS:
                self._given_sizes(node)
        cut = [n for n in self.graph.nodes if n.op == "placeholder" and n.target in self.segments.cuts]
        cut = cut if self.n_segments > 1 else []
        joined = [(node, self._join_input(node, *self.segments.cuts[str(node.target)])) for node in cut]
        super().run()
        for placeholder, whole in joined:
            whole.replace_all_uses_with(placeholder)
        self.graph.eliminate_dead_code()
        return graph_module(self.gm, self.graph if self.are_parts else self._interchanged())

    def _interchanged(self) -> fx.Graph:
        """The same nodes segment by segment: operands never lie in a later segment."""
        found, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
        ends = {"placeholder": -2, "output": self.n_segments}
        nodes = list(self.graph.nodes)
        for node in nodes:  # in order, since each asks for its operands
            self.segments.of(node)
        for node in sorted(nodes, key=lambda node: ends.get(node.op, self.segments.of(node))):
            mapping[node] = found.node_copy(node, mapping.__getitem__)
            mapping[node].meta = dict(node.meta)
        return found

    def _given_sizes(self, node: fx.Node) -> None:
        """`x.expand_as(y)` reads nothing of y but its sizes."""
        self.here = node
        given = self.emit(_AS[overload_name(node)], node.args[0], list(shape_of(node)))
        self._replace(node, given)
        self.graph.erase_node(node)

    def _join_input(self, placeholder: fx.Node, dim: int, length: int) -> fx.Node:
        """The input as the join of its segments; a slice ends where the segment would if it were whole."""
        after = next(n for n in self.graph.nodes if n.op != "placeholder")
        users, self.here = list(placeholder.users), after
        bounds = [(s * length, (s + 1) * length) for s in range(self.n_segments)]
        pieces = [self.emit(aten.slice.Tensor, placeholder, dim, *bound) for bound in bounds]
        whole = self.emit(aten.cat.default, pieces, dim)
        for node in (*pieces, whole):
            node.meta.update(scope=(), site=(), source="the input", context=after.meta.get("context", ()))
        for user in users:
            user.replace_input_with(placeholder, whole)
        sizes = tuple(shape_of(piece)[dim] for piece in pieces)
        self.strips[whole] = dim, sizes
        self.usual[shape_of(placeholder)[dim]] = sizes
        return whole

    def _visit(self, node: fx.Node) -> None:
        view = as_load(node)
        if view is not None:
            self.asked = (view.range, shape_of(view.source)[view.dim], 0)
        Forwarder._visit(self, node)
        if not node.users:
            return
        if overload_name(node) in _SCATTERS and self._join_stores(node):
            return
        if view is not None and (strips := self.strips_of(view.source)) is not None:
            if view.dim == strips[0]:
                self._shorten(node, view, strips[1])
                return
        if overload_name(node) in ("cat", "stack"):
            self._flatten(node)
            return
        node = self._on_rows(node) or node
        self._mine(node)
        if node.users and is_reshape(node) and self.strips_of(operand_of(node)) is not None:
            before, after = shape_of(operand_of(node)), shape_of(node)
            if len(before) > len(after) > 0 and before[len(before) - len(after) + 1 :] == after[1:]:
                self.merged[node] = before[: len(before) - len(after) + 1]

    def rows(self, x: fx.Node, d: int) -> Dims | None:
        if is_random(x):  # once: where its pieces are made
            is_drawn = overload_name(x) in DRAWS and len(x.all_input_nodes) == 1
            return {x.all_input_nodes[0]: d} if x is self.mined and is_drawn else None
        return rows_of(x, d)

    def take(self, x: fx.Node, d: int, r: Range) -> fx.Node:
        return Forwarder.take(self, x, d, r)

    def _only_loaded(self, x: fx.Node, d: int) -> bool:
        """Whether a load may go up through an operation: where its pieces are made, and of what no segment
        changes. A cell's own loads (token by token) stay."""
        if self.segments.of(x) >= 0:
            return x is self.mined
        return self.mined is not None or super()._only_loaded(x, d)

    def _flatten(self, node: fx.Node) -> None:
        """The join of segments' joins of parts is the join of all parts."""
        known = parts_of(node) if self.are_parts and overload_name(node) == "cat" else None
        if known is None:
            return
        joins, dim = known
        parts = [part for join in joins for part in self._parts_of(join, dim)]
        if len(parts) > len(joins):
            self._replace(node, self.join(aten.cat.default, parts, dim))

    def _parts_of(self, join: fx.Node, dim: int) -> list[fx.Node]:
        """The pieces of a join along a dimension, or what is none of several."""
        strips = self.strips_of(join)
        if strips is None or strips[0] != dim:
            return [join]
        ranges = zip(accumulate(strips[1], initial=0), strips[1], strict=False)
        return [self.load(join, dim, Range(lo, size)) for lo, size in ranges]

    # ---- pieces --------------------------------------------------------------------------------------------

    def strips_of(self, x: fx.Node) -> tuple[int, tuple[int, ...]] | None:
        """Along which dimension the segments lie in a join, and how long the pieces of each are."""
        if x not in self.strips:
            name = overload_name(x)
            known = parts_of(x) if name in ("cat", "stack") and is_static_tensor(x) else None
            parts = [] if known is None else self._flat_parts(known, name == "stack")
            sizes = self._grouped(parts) if parts else None
            if sizes is None and self.are_parts and (sizes := self._some(parts)) is not None:
                self.first[x] = parts[0][1]
            self.strips[x] = None if known is None or sizes is None else (known[1], sizes)
        return self.strips[x]

    def _some(self, parts: list[tuple[int, int]]) -> tuple[int, ...] | None:
        """The parts of a join of several segments in order, one of each, if it is one."""
        first = parts[0][1] if parts else -1
        is_each = first >= 0 and [s for _, s in parts] == list(range(first, first + len(parts)))
        return tuple(size for size, _ in parts) if is_each and len(parts) > 1 else None

    def _flat_parts(self, known: tuple[list[fx.Node], int], is_stack: bool) -> list[tuple[int, int]]:
        """(size, segment) of the parts of a join; a part that is the join of segments itself counts as its
        pieces."""
        parts, at = known
        found = []
        for part in parts:
            inner = None if is_stack else self.strips_of(part)
            if inner is not None and inner[0] == at:
                found += [(size, s) for s, size in enumerate(inner[1], self.first.get(part, 0))]
            else:
                found.append((1 if is_stack else shape_of(part)[at], self.segments.of(part)))
        return found

    def _grouped(self, parts: list[tuple[int, int]]) -> tuple[int, ...] | None:
        """The parts of a join put together by segment: as the input, if it is as long; as many for each; or
        what no segment changes with the segment before it. None where they are not those of all segments in
        order."""
        usual = self.usual.get(sum(size for size, _ in parts))
        if usual is not None and len({s for _, s in parts if s >= 0}) > 1:
            return usual
        each, rest = divmod(len(parts), self.n_segments)
        if not rest and each:
            groups = [parts[s * each : (s + 1) * each] for s in range(self.n_segments)]
            if all(max(s for _, s in group) == k for k, group in enumerate(groups)):
                return tuple(sum(size for size, _ in group) for group in groups)
        sizes, now = [0] * self.n_segments, 0
        for size, s in parts:
            if s > now + 1 or 0 <= s < now:
                return None
            now = max(s, now)
            sizes[now] += size
        if now != self.n_segments - 1 or not all(sizes):
            return None
        return tuple(sizes)

    def _mine(self, node: fx.Node) -> None:
        """Apply an operation to the pieces of its operands."""
        view = as_load(node)
        read = node.all_input_nodes if view is None else [view.source]
        operands = {n: s for n in read if is_static_tensor(n) and (s := self.strips_of(n))}
        found = [set(self._places(node, operand, *strips)) for operand, strips in operands.items()]
        places = sorted(set.intersection(*found)) if found else []
        if not places:  # operands that are cut in other places: as the first of them
            places = sorted(set().union(*found), key=lambda place: len(set(place[1])))
        for d, sizes in places:
            pieces = self._pieces(node, d, sizes)
            if pieces is not None:
                whole = self.join(aten.cat.default, pieces, d)
                self.strips[whole] = d, sizes
                self.first[whole] = next((self.first[n] for n in operands if n in self.first), 0)
                self._replace(node, whole)
                return

    def _pieces(self, node: fx.Node, d: int, sizes: tuple[int, ...]) -> list[fx.Node] | None:
        """A node's pieces along `d`, if each can be computed without the node."""
        self.mined = node
        try:
            pieces = []
            for lo, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
                piece = self.special(node, d, lo, size) or self.try_load(node, d, Range(lo, size))
                if piece is None:
                    return None
                pieces.append(piece)
            return pieces
        finally:
            self.mined = None

    def _places(
        self, node: fx.Node, operand: fx.Node, d: int, sizes: tuple[int, ...]
    ) -> list[tuple[int, tuple[int, ...]]]:
        """The dimensions of a node along which its pieces are made of pieces of the operand, with their
        sizes."""
        if not is_static_tensor(node):
            return []
        if overload_name(node) in PADS:
            return [(d, self.pads(node, d, sizes))]
        if (window := window_of(node)) is not None:
            return [(d, self.moved(sizes, shape_of(node)[d]))] if operand is window.source and d == 2 else []
        total, found = sum(sizes), []
        for at in places_of(node, operand, d):
            length = shape_of(node)[at]
            scaled = [size * length for size in sizes]
            if length == total or (is_reshape(node) and not any(n % total for n in scaled)):
                found.append((at, tuple(n // total for n in scaled)))
        return found

    def _on_rows(self, node: fx.Node) -> fx.Node | None:
        """`f(reshape(x, [B * N, D]))` is `reshape(f(x), [B * N, E])`: the `f(x)`, where that is so."""
        read = [n for n in node.all_input_nodes if n in self.merged]
        is_known = overload_name(node) in ("linear", "layer_norm", "rms_norm", "embedding", "matmul")
        if not read or not is_static_tensor(node) or not (is_known or is_pointwise(node)):
            return None
        others = [n for n in node.all_input_nodes if n not in self.merged]
        most = 2 if overload_name(node) in ("matmul", "embedding") else len(shape_of(node)) - 1
        flat = [len(shape_of(n)) <= most for n in others if overload_name(node) != "linear"]
        if self.rows(node, 0) != dict.fromkeys(read, 0) or not all(flat):
            return None
        if len({(self.merged[n], len(shape_of(n))) for n in read}) > 1:
            return None
        self.here = node
        args, kwargs = (
            map_arg(a, lambda n: operand_of(n) if n in self.merged else n) for a in (node.args, node.kwargs)
        )
        inner = self._like(node, node.target, args, kwargs)
        rows = self.emit(aten.reshape.default, inner, list(shape_of(node)))
        self.merged[rows] = self.merged[read[0]]
        self._replace(node, rows)
        self.here = rows  # what stands for the inner one is read by it
        return inner

    def _shorten(self, node: fx.Node, view: View, sizes: tuple[int, ...]) -> None:
        """A part of a join is the join of parts of its pieces, the first and the last of them cut."""
        start, end = view.range.lo, view.range.at(view.range.n - 1) + 1
        if view.range.drop or view.range.step != 1 or not start < end <= sum(sizes):
            return  # a load behind the end says that the segments are others
        parts = []
        for lo, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
            first, last = max(lo, start), min(lo + size, end)
            if first < last:
                parts.append(self.load(view.source, view.dim, Range(first, last - first)))
        self._replace(node, self.join(aten.cat.default, parts, view.dim))

    def _join_stores(self, node: fx.Node) -> bool:
        """A buffer into which every segment was written is the join of what was written. Whether it is."""
        if any(overload_name(user) in _SCATTERS and user.args[0] is node for user in node.users):
            return False
        stores: list[tuple[Range, fx.Node]] = []
        at, below = None, node
        while overload_name(below) in _SCATTERS and self.is_open(below):
            store = store_of(below)
            if store is None or (at is not None and store[2] != at) or store[3].step != 1:
                break
            below, at = store[0], store[2]
            stores.append((store[3], store[1]))
        stores.sort(key=lambda store: store[0].lo)
        ends = list(accumulate((r.n for r, _ in stores), initial=0))
        if at is None or ends[-1] != shape_of(node)[at] or [r.lo for r, _ in stores] != ends[:-1]:
            return False
        shape = shape_of(node)
        parts = [self.reshape(src, (*shape[:at], r.n, *shape[at + 1 :])) for r, src in stores]
        self._replace(node, self.join(aten.cat.default, parts, at))
        return True
