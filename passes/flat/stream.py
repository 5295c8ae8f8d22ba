"""stream: take a part of a value before the operations that treat each position by itself, not after them.

    e  = embedding(W, ids)             i0 = slice(ids, 1, 0, 8)        y  = linear(cat([h0, h1], 1), W)
    x0 = slice(e, 1, 0, 8)       =>    x0 = embedding(W, i0)           z  = select(y, 1, -1)
    x1 = slice(e, 1, 8, 16)            i1 = slice(ids, 1, 8, 16)   =>  z  = linear(select(h1, 1, -1), W)
                                       x1 = embedding(W, i1)

So a model that embeds its whole input first is embedded segment by segment, and a head of which one position
is wanted runs on that position: nothing as long as the input is held, other segments' heads are dead code.

An operation is *row-wise* along a dimension if each index of its result along it needs one index of its
operands (`row_wise`); a load moves up through it as it moves up through glue in `forward`.

requires: a functional graph (`functionalise`) whose loads are forwarded (`forward`), with `meta["val"]`.
ensures:  the same values up to the rounding of kernels that run on other sizes.  A value is computed in parts
          only where every use of it is a load along one dimension, so nothing is computed twice but where
          loads overlap.  The inside of the layers' calls stays as it is: cells are compared with each other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from rmtcompile.ir.modes import contexts
from rmtcompile.ir.randomness import is_random
from rmtcompile.ir.segmentation import Cuts
from rmtcompile.passes.flat.functionalise import PERMUTES, bind, is_pointwise, overload_name
from rmtcompile.passes.flat.store_forwarding.nodes import (
    SPLITS,
    as_load,
    is_reshape,
    is_static_tensor,
    permutation,
    shape_of,
    val_of,
)
from rmtcompile.passes.flat.store_forwarding.ranges import Range, blocks
from rmtcompile.passes.flat.store_forwarding.rewrite import Forwarder, deep_recursion
from rmtcompile.passes.flat.store_forwarding.shapes import COPIES

aten = torch.ops.aten

# fmt: off
_CASTS = {"to", "_to_copy", "type_as"}
_REDUCTIONS = {
    "mean", "sum", "amax", "amin", "argmax", "argmin", "var", "std", "prod", "logsumexp", "any", "all",
    "norm", "linalg_vector_norm",
}
_ALONG = {"softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp"}
_FILLED = {
    "new_zeros": aten.zeros.default, "new_ones": aten.ones.default, "new_full": aten.full.default,
    "zeros_like": aten.zeros.default, "ones_like": aten.ones.default, "full_like": aten.full.default,
}
# fmt: on
Dims = dict[fx.Node, int]


def stream(
    gm: fx.GraphModule, inside: Callable[[fx.Node], bool], windows: str = "", cuts: Cuts | None = None
) -> fx.GraphModule:
    """Move loads up through row-wise operations; see the module docstring.

    Args:
        inside: whether a node belongs to a layer's call.
        windows, cuts: see `forward_stores`.

    Returns:
        A new module, or the same object if there is nothing to do.
    """
    with deep_recursion():
        return Streamer(gm, inside, windows, cuts).run()


# ---- legality ----------------------------------------------------------------------------------------------


def row_wise(node: fx.Node, d: int) -> Dims | None:
    """Which dimension of which operands a load along `d` of the result loads, the other operands being read
    whole; None where one index of the result needs several of an operand.

    `add(x: [2, 6, 4], y: [6, 1])`: along 1 it is `{x: 1, y: 0}`, along 2 `{x: 2}`.
    """
    if node.op != "call_function" or not is_static_tensor(node):
        return None
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return None
    name, rank = overload_name(node), len(shape_of(node))
    is_cast = name in _CASTS and shape_of(node.all_input_nodes[0]) == shape_of(node)
    if is_pointwise(node) or is_cast:
        return _aligned([n for n in node.all_input_nodes if is_static_tensor(n)], shape_of(node), d)
    rule = _RULES.get(name)
    return None if rule is None else rule(node, d, rank)


def _aligned(operands: list[fx.Node], shape: tuple[int, ...], d: int) -> Dims:
    """The dimension of each operand that broadcasting puts at `d`, for those that have it."""
    found: Dims = {}
    for operand in operands:
        at = d - (len(shape) - len(shape_of(operand)))
        if at >= 0 and shape_of(operand)[at] == shape[d]:
            found[operand] = at
    return found


def _embedding(node: fx.Node, d: int, rank: int) -> Dims | None:
    indices = node.args[1]
    return {indices: d} if d < rank - 1 and isinstance(indices, fx.Node) else None


def _linear(node: fx.Node, d: int, rank: int) -> Dims | None:
    x, *rest = node.args
    return {x: d} if d < rank - 1 and isinstance(x, fx.Node) and x not in rest else None


def _norm(node: fx.Node, d: int, rank: int) -> Dims | None:
    bound = bind(node)
    return {bound["input"]: d} if d < rank - len(bound["normalized_shape"]) else None


def _matmul(node: fx.Node, d: int, rank: int) -> Dims | None:
    """Rows of the left operand, columns of the right one, and the batch dimensions of both."""
    operands = node.all_input_nodes
    if len(operands) != len([arg for arg in node.args if isinstance(arg, fx.Node)]):
        return None  # one value twice
    *bias, a, b = operands
    if min(len(shape_of(a)), len(shape_of(b))) < 2:
        return None
    found = _aligned(bias, shape_of(node), d)
    if d >= rank - 2:
        side = a if d == rank - 2 else b
        return {**found, side: len(shape_of(side)) - (rank - d)}
    for side in (a, b):
        at = d - (rank - len(shape_of(side)))
        if at >= 0 and shape_of(side)[at] == shape_of(node)[d]:
            found[side] = at
    return found


def _along(node: fx.Node, d: int, rank: int) -> Dims | None:
    bound = bind(node)
    return {bound["self"]: d} if d != bound["dim"] % max(rank, 1) else None


def _reduction(node: fx.Node, d: int, _: int) -> Dims | None:
    bound = bind(node)
    source, dims = bound["self"], bound.get("dim")
    if dims is None or not is_static_tensor(source):
        return None
    inner = len(shape_of(source))
    gone = {k % inner for k in ([dims] if isinstance(dims, int) else dims)}
    kept = range(inner) if bound.get("keepdim") else [k for k in range(inner) if k not in gone]
    return {source: kept[d]} if gone and kept[d] not in gone else None


def _pad(node: fx.Node, d: int, rank: int) -> Dims | None:
    bound = bind(node)
    pads = list(bound["pad"])[2 * (rank - 1 - d) :][:2]
    return {bound["self"]: d} if not any(pads) and bound.get("mode", "constant") == "constant" else None


def _gather(node: fx.Node, d: int, rank: int) -> Dims | None:
    bound = bind(node)
    source, index = bound["self"], bound["index"]
    same = shape_of(source)[d] == shape_of(index)[d] and source is not index
    return {source: d, index: d} if same and d != bound["dim"] % rank else None


_RULES: dict[str, Callable[[fx.Node, int, int], Dims | None]] = {
    "embedding": _embedding,
    "linear": _linear,
    "layer_norm": _norm,
    "rms_norm": _norm,
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm"), _matmul),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "gather": _gather,
}


def passed_on(node: fx.Node, operand: fx.Node, d: int) -> list[int]:
    """The dimensions of a node along which a load is a load of dimension `d` of an operand."""
    if not is_static_tensor(node):
        return []
    name, rank, view = overload_name(node), len(shape_of(node)), as_load(node)
    if view is not None:
        return [d - (view.range.drop and view.dim < d)] if view.source is operand and view.dim != d else []
    if name in PERMUTES:
        return [permutation(node).index(d)]
    if name == "expand":
        return [d + rank - len(shape_of(operand))] if shape_of(operand)[d] > 1 else []
    if name in ("cat", "stack"):
        at = bind(node)["dim"] % rank
        return [d + (name == "stack" and d >= at)]
    if is_reshape(node):
        return _in_reshape(shape_of(operand), shape_of(node), d)
    if name in COPIES | {"detach"} and shape_of(node) == shape_of(operand) and not is_random(node):
        return [d]
    return [o for o in range(rank) if (row_wise(node, o) or {}).get(operand) == d]


def _in_reshape(inner: tuple[int, ...], outer: tuple[int, ...], d: int) -> list[int]:
    """Where a reshape puts the elements along `d` in order: the first dimension of what it is cut into."""
    a, b = next(block for block in blocks(inner, outer) if d in block[0])
    return b[:1] if b and a[0] == d else []


def _end(node: fx.Node, r: Range) -> int:
    """Where a load would end if its operand went on."""
    end = r.at(r.n - 1) + 1
    if node.target is aten.slice.Tensor:
        given = bind(node)["end"]
        return max(end, given) if isinstance(given, int) else end
    several = node.args[0]
    if node.target is operator.getitem and isinstance(several, fx.Node) and overload_name(several) == "split":
        return r.lo + int(bind(several)["split_size"])
    return end


# ---- rewrite -----------------------------------------------------------------------------------------------


class Streamer(Forwarder):
    """Loads move up through row-wise operations too, where nobody needs the whole value."""

    moves_layouts = False  # whether constants may be laid out anew

    def __init__(
        self,
        gm: fx.GraphModule,
        inside: Callable[[fx.Node], bool],
        windows: str = "",
        cuts: Cuts | None = None,
    ) -> None:
        super().__init__(gm, windows, cuts)
        self.inside = inside
        self.partial: dict[tuple[fx.Node, int], bool] = {}
        self.asked = (Range(0, 0), 0, 0)  # of the load that is visited: range, size of the dimension, end

    def run(self) -> fx.GraphModule:
        for node in list(self.graph.nodes):
            if overload_name(node) in _FILLED and not self.inside(node):
                self._fill(node)
        return super().run()

    def _fill(self, node: fx.Node) -> None:
        """`x.new_zeros(size)` reads nothing of x."""
        val, target = val_of(node), _FILLED[overload_name(node)]
        if not val.is_contiguous() and not self.moves_layouts:
            return
        self.here, self.count = node, self.count + 1
        fill = [arg for name, arg in bind(node).items() if name == "fill_value"]
        made = self._like(node, target, (list(val.shape), *fill), {"dtype": val.dtype, "device": val.device})
        self._replace(node, made)
        self.graph.erase_node(node)

    def _visit(self, node: fx.Node) -> None:
        view = as_load(node)
        if view is not None and not self.inside(node):
            self.asked = (view.range, shape_of(view.source)[view.dim], _end(node, view.range))
            super()._visit(node)

    def take(self, x: fx.Node, d: int, r: Range) -> fx.Node:
        """With the end that the user's code has, where it lies behind the last position: integers of a short
        last segment follow the same rule as the others."""
        if (r, shape_of(x)[d]) != self.asked[:2] or r.drop:
            return super().take(x, d, r)
        return self.emit(aten.slice.Tensor, x, d, r.lo, self.asked[2], r.step)

    def try_load(self, x: fx.Node, d: int, r: Range) -> fx.Node | None:
        found = super().try_load(x, d, r)
        if found is not None or x in self.pinned or self.inside(x) or not self.is_open(x):
            return found
        if shape_of(x)[d] == 1:
            return None
        key = (x, d, r, repr(self.here.meta.get("scope")), self.grad is False)
        if key in self.memo and self._only_loaded(x, d):
            self.memo[key] = found = self._load_made(x, d, r) or self._load_row_wise(x, d, r)
        return found

    def _load_made(self, x: fx.Node, d: int, r: Range) -> fx.Node | None:
        """A part of a constant or of a range of integers is a smaller one."""
        name = overload_name(x)
        if r.drop or name not in ("full", "zeros", "ones", "arange"):
            return None
        if name != "arange":
            size = [*shape_of(x)[:d], r.n, *shape_of(x)[d + 1 :]]
            return self._like(x, x.target, (size, *x.args[1:]), x.kwargs)
        start, step = (x.args[0] if len(x.args) > 1 else 0), (x.args[2] if len(x.args) > 2 else 1)
        if type(start) is not int or type(step) is not int or val_of(x).is_floating_point():
            return None
        first, by = start + r.lo * step, step * r.step
        return self._like(x, aten.arange.start_step, (first, first + r.n * by, by), x.kwargs)

    def rows(self, x: fx.Node, d: int) -> Dims | None:
        """What a load along `d` loads of the operands; see `row_wise`."""
        return row_wise(x, d)

    def _load_row_wise(self, x: fx.Node, d: int, r: Range) -> fx.Node | None:
        """The operation on what is loaded of its operands."""
        operands = self.rows(x, d)
        if operands is None:
            return None
        if r.drop:
            row = self.load(x, d, Range(r.lo, 1))
            return self.take(row, d, Range(0, 1, 1, True))
        moved = {operand: self.load(operand, at, r) for operand, at in operands.items()}
        args, kwargs = (map_arg(a, lambda n: moved.get(n, n)) for a in (x.args, x.kwargs))
        return self._like(x, x.target, args, kwargs)

    def _like(self, x: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """A node in the place of `x` in the user's code."""
        with self.graph.inserting_before(self.here):
            node = self.graph.create_node("call_function", target, args, kwargs)
        node.meta = {k: v for k, v in x.meta.items() if k != "val"}
        with contexts(x):
            node.meta["val"] = self.values.run(target, args, kwargs)
        assert val_of(node).dtype == val_of(x).dtype
        return node

    def _only_loaded(self, x: fx.Node, d: int) -> bool:
        """Whether every use of a value is a load along `d`, at once or after operations that keep it."""
        key = (x, d)
        if key not in self.partial:
            self.partial[key] = all(self._is_load(user, x, d) for user in x.users)
        return self.partial[key]

    def _is_load(self, user: fx.Node, x: fx.Node, d: int) -> bool:
        if user.op == "call_function" and not user.users:
            return True  # dead, or a load that was moved
        if user.op != "call_function" or self.inside(user) or user in self.pinned:
            return False
        if overload_name(user) in SPLITS | {"unbind"}:
            return all(self._is_load(item, x, d) for item in user.users)
        view = as_load(user)
        if view is not None and view.source is x and view.dim == d:
            return True
        return any(self._only_loaded(user, at) for at in passed_on(user, x, d))
