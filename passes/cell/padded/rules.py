"""What each operation becomes in a padded cell."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rmtcompile.ir.size import Size
from rmtcompile.passes.cell.lift.elementwise import pointwise as _each_element
from rmtcompile.passes.cell.lift.rules import rule_for as _lifting_rule
from rmtcompile.passes.cell.padded.builder import Builder, argument, aten, total
from rmtcompile.passes.cell.padded.products import WHOLE, Rule, attention, convolution, einsum, product

_INFINITY = float("inf")


def padded_node(b: Builder, node: fx.Node) -> fx.Node:
    """What stands for an operation that has to do with the rest."""
    rule = RULES.get(node.target, _unknown)
    if rule is _unknown and isinstance(node.target, torch._ops.OpOverload):
        rule = pointwise if _lifting_rule(node.target) is _each_element else rule
    if rule not in _APART and any(x in b.apart for x in node.all_input_nodes):
        raise b.refused(node, "a dim that depends on the rest is joined with another one")
    return rule(b, node)


def _unknown(b: Builder, node: fx.Node) -> fx.Node:
    raise b.refused(node, "there is no rule for it at the size of a whole segment")


def as_it_is(b: Builder, node: fx.Node) -> fx.Node:
    """Positions stay where they are."""
    return b.keep(node)


def pointwise(b: Builder, node: fx.Node) -> fx.Node:
    """Each position by itself; a number that depends on the rest becomes a tensor."""
    shapes = {b.apart.get(x) for x in node.all_input_nodes}
    if shapes != {None}:
        if len(shapes) > 1:
            raise b.refused(node, "a dim that depends on the rest is joined with another one in one operand")
        b.apart[node] = next(shape for shape in shapes if shape is not None)
    if any(map(b.depends, pytree.tree_leaves(dict(node.kwargs)))):
        raise b.refused(node, "an option depends on the rest")
    if not any(map(b.depends, pytree.tree_leaves(node.args))):
        return b.keep(node)
    if node.target not in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
        raise b.refused(node, "a number depends on the rest")
    args = [b.count(node, x) if isinstance(x, int) else b.mapped(x) for x in node.args]
    return b.call(node, node.target, *args, **dict(node.kwargs))


def reshape(b: Builder, node: fx.Node) -> fx.Node:
    """Dims that depend on the rest stay dims of their own."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    before, after = b.apart.get(x, b.sizes(x)), b.sizes(node)
    if _between(b, before) == _between(b, after):
        return b.keep(node)
    if x in b.apart or before[-1] != after[-1] or len(after) not in (2, 3) or len(after) >= len(before):
        raise b.refused(node, "a dim that depends on the rest is joined with another one, or split")
    if len(after) == 3 and before[0] != after[0]:
        raise b.refused(node, "a dim that depends on the rest is joined with the cells")
    b.apart[node] = before
    copy = b.mapped(x)
    assert isinstance(copy, fx.Node)
    return copy


def _between(b: Builder, sizes: Sequence[int]) -> list[Any]:
    """Elements between the dims that depend on the rest, and those dims."""
    found: list[Any] = [1]
    for n in sizes:
        if b.depends(n):
            assert isinstance(n, Size)
            found += [n.terms, 1]
        else:
            found[-1] *= int(n)
    return found


# ---- along a dim -------------------------------------------------------------------------------------------


def _dims(node: fx.Node, rank: int) -> tuple[int, ...]:
    """The dims along which an operation works; all of them where it names none."""
    given = argument(node, "dim", argument(node, "dims", ()))
    given = () if given is None else given
    dims = given if isinstance(given, (list, tuple)) else (given,)
    return tuple(dim % rank for dim in dims) if dims else tuple(range(rank))


def other_dims_only(b: Builder, node: fx.Node) -> fx.Node:
    """What has a form of fixed shapes along dims that do not depend on the rest alone."""
    for x in node.all_input_nodes:
        if set(_dims(node, len(b.sizes(x)))).intersection(b.open_dims(x)):
            raise b.refused(node, "it works along a dim that depends on the rest")
    return b.keep(node)


def filling(value: float | bool) -> Rule:
    """What works along a dim as if the rest ended with this value, which changes nothing."""

    def rule(b: Builder, node: fx.Node) -> fx.Node:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        dims = set(_dims(node, len(b.sizes(x)))).intersection(b.open_dims(x))
        if not dims:
            return b.keep(node)
        if isinstance(value, float) and math.isinf(value) and not x.meta["val"].is_floating_point():
            raise b.refused(node, "integers have no infinity to be filled up with")
        if isinstance(value, bool) and x.meta["val"].dtype is not torch.bool:
            raise b.refused(node, "numbers are taken for truth values along a dim that depends on the rest")
        filled = b.filled(node, x, sorted(dims), value)
        return b.call(node, node.target, filled, *b.mapped(node.args[1:]), **b.mapped(dict(node.kwargs)))

    return rule


def mean(b: Builder, node: fx.Node) -> fx.Node:
    """A sum, over what there is."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    sizes = b.sizes(x)
    dims = _dims(node, len(sizes))
    if not set(dims).intersection(b.open_dims(x)):
        return b.keep(node)
    filled = b.filled(node, x, dims, 0)
    keepdim = bool(argument(node, "keepdim", False))
    wanted = argument(node, "dtype") or x.meta["val"].dtype
    exact = torch.promote_types(wanted, torch.float32)  # a sum in 16 bits may be too large
    total = b.call(node, aten.sum.dim_IntList, filled, list(dims), keepdim, dtype=exact)
    count: Any = math.prod(int(sizes[dim]) for dim in dims if not b.depends(sizes[dim]))
    for dim in dims:
        if b.depends(sizes[dim]):
            count = b.call(node, aten.mul.Tensor, b.count(node, sizes[dim]), count)
    found = b.call(node, aten.div.Tensor, total, count)
    return found if exact is wanted else b.call(node, aten.to.dtype, found, wanted)


def norm(b: Builder, node: fx.Node) -> fx.Node:
    """To which zeros add nothing."""
    if argument(node, "ord", 2) <= 0:
        raise b.refused(node, "zeros add something to a norm of that order")
    return filling(0)(b, node)


def layer_norm(b: Builder, node: fx.Node) -> fx.Node:
    """Over the last dims."""
    shape: Any = node.args[1]
    rank = len(b.sizes(node.args[0]))
    if set(range(rank - len(shape), rank)).intersection(b.open_dims(node.args[0])):
        raise b.refused(node, "it norms along a dim that depends on the rest")
    return b.keep(node)


def cut(b: Builder, node: fx.Node) -> fx.Node:
    """A slice: from a fixed start as it is, else from where the rest says."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    sizes = b.sizes(x)
    dim = argument(node, "dim", 0) % len(sizes)
    start = argument(node, "start")
    start = 0 if start is None else start
    out = b.sizes(node)[dim]
    if dim not in b.open_dims(x):
        if b.depends(start) or b.depends(out):
            raise b.refused(node, "how much it takes depends on the rest")
        return b.keep(node)
    if argument(node, "step", 1) != 1:
        raise b.refused(node, "it skips positions of a dim that depends on the rest")
    if not b.depends(start) and start >= 0:
        b.needs(sizes[dim], start if b.depends(out) else start + out)
        return b.call(node, aten.slice.Tensor, b.mapped(x), dim, start, total(start, out))
    b.needs(sizes[dim], 0 if b.depends(start) else -start)
    first = b.count(node, start if b.depends(start) else total(sizes[dim], start))
    where = b.call(node, aten.add.Tensor, b.positions(node, out, b.device(x)), first)
    return b.taken(node, b.mapped(x), dim, sizes[dim], where)


def select(b: Builder, node: fx.Node) -> fx.Node:
    """One position: the last one moves with the rest."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    sizes = b.sizes(x)
    dim, index = argument(node, "dim") % len(sizes), argument(node, "index")
    b.needs(sizes[dim], 0 if b.depends(index) else index + 1 if index >= 0 else -index)
    if not b.depends(index) and (index >= 0 or dim not in b.open_dims(x)):
        return b.keep(node)
    at = b.count(node, index if b.depends(index) else total(sizes[dim], index))
    at = b.call(node, aten.view.default, at, [1])
    return b.call(node, aten.squeeze.dim, b.taken(node, b.mapped(x), dim, sizes[dim], at), dim)


def join(b: Builder, node: fx.Node) -> fx.Node:
    """What stands behind a part that depends on the rest moves up to its end."""
    parts: Any = node.args[0]
    shapes = [b.sizes(part) for part in parts]
    if any(len(shape) != len(shapes[-1]) for shape in shapes):
        raise b.refused(node, "it joins what has no dims")
    dim = argument(node, "dim", 0) % len(shapes[-1])
    sizes = [shape[dim] for shape in shapes]
    joined = b.keep(node)
    gaps = [i for i, size in enumerate(sizes[:-1]) if b.depends(size)]
    if not gaps:
        return joined
    positions = where = b.positions(node, total(*sizes), b.device(node))
    for i in gaps:
        is_behind = b.call(node, aten.ge.Tensor, positions, b.count(node, total(*sizes[: i + 1])))
        missing = b.call(node, aten.rsub.Scalar, b.count(node, sizes[i]), sizes[i])
        where = b.call(node, aten.add.Tensor, where, b.call(node, aten.mul.Tensor, is_behind, missing))
    return b.taken(node, joined, dim, total(*sizes), where)


def pad(b: Builder, node: fx.Node) -> fx.Node:
    """What is put in front moves all; what is put behind follows the segment."""
    x, widths = node.args[0], node.args[1]
    assert isinstance(x, fx.Node) and isinstance(widths, (list, tuple))
    rank = len(b.sizes(x))
    if node.target is aten.pad.default and argument(node, "mode", "constant") != "constant":
        raise b.refused(node, "what it puts behind the segment depends on where that ends")
    padded = [rank - 1 - i for i in range(len(widths) // 2) if any(widths[2 * i : 2 * i + 2])]
    value = argument(node, "value")
    filled = b.filled(node, x, padded, 0 if value is None else value)
    return b.call(node, node.target, filled, *b.mapped(node.args[1:]), **b.mapped(dict(node.kwargs)))


def lookup(b: Builder, node: fx.Node) -> fx.Node:
    """Where to look is 0 behind what the segment has; positions are those that they were."""
    place = 1 if node.target is aten.embedding.default else 2
    args = list(b.mapped(node.args))
    where = node.args[place]
    assert isinstance(where, fx.Node)
    args[place] = b.filled(node, where, b.open_dims(where), 0)
    return b.call(node, node.target, *args, **b.mapped(dict(node.kwargs)))


def indexing(b: Builder, node: fx.Node) -> fx.Node:
    """The same for several dims; what is counted from the end is counted from where the segment ends."""
    x, places = node.args[0], node.args[1]
    assert isinstance(x, fx.Node) and isinstance(places, (list, tuple))
    found: list[Any] = []
    for dim, where in enumerate(places):
        if not isinstance(where, fx.Node):
            found.append(None)
            continue
        if where.meta["val"].dtype in (torch.bool, torch.uint8):
            raise b.refused(node, "how much a mask picks depends on values")
        inside = b.filled(node, where, b.open_dims(where), 0)
        if dim in b.open_dims(x):
            is_from_end = b.call(node, aten.lt.Scalar, inside, 0)
            from_start = b.call(node, aten.add.Tensor, inside, b.count(node, b.sizes(x)[dim]))
            inside = b.call(node, aten.where.self, is_from_end, from_start, inside)
        found.append(inside)
    return b.call(node, node.target, b.mapped(x), found)


def length(b: Builder, node: fx.Node) -> fx.Node:
    """Of a dim that does not depend on the rest."""
    if node.args[1] in b.open_dims(node.args[0]):
        raise b.refused(node, "a length depends on the rest")
    return b.keep(node)


def made(b: Builder, node: fx.Node) -> fx.Node:
    """A tensor of its own: as long as for a whole segment."""
    if node.target not in (aten.arange.default, aten.full.default, aten.zeros.default, aten.ones.default):
        first, *_ = node.args
        if b.depends(first):
            raise b.refused(node, "its first value depends on the rest")
    elif node.target is aten.full.default and b.depends(node.args[1]):
        raise b.refused(node, "its value depends on the rest")
    return b.keep(node)


def triangle(b: Builder, node: fx.Node) -> fx.Node:
    """A diagonal counted from the start."""
    if b.depends(argument(node, "diagonal", 0)):
        raise b.refused(node, "its diagonal depends on the rest")
    return b.keep(node)


_PRODUCT, _PRODUCT_AND_SUM = product(0, 1), product(1, 2)

_APART = {reshape, pointwise, _PRODUCT, _PRODUCT_AND_SUM}
"""Rules for values in which dims are kept apart."""

RULES: dict[Any, Rule] = {
    operator.getitem: as_it_is,
    **dict.fromkeys(
        (
            aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.movedim.int,
            aten.movedim.intlist, aten.permute.default, aten.t.default, aten.numpy_T.default, aten.mT.default,
            aten.expand.default, aten.broadcast_to.default, aten.clone.default,
            aten.stack.default, aten.cumsum.default, aten.cumprod.default, aten.view.dtype,
            aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
        ),
        as_it_is,
    ),
    **dict.fromkeys(
        (
            aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default,
            aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim,
            aten.squeeze.dims, aten.unsqueeze.default,
        ),
        reshape,
    ),
    **dict.fromkeys(
        (
            aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unsafe_chunk.default,
            aten.roll.default, aten.flip.default, aten.glu.default, aten.sort.default, aten.topk.default,
            aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim, aten.var_mean.correction,
            aten.unbind.int, aten.argsort.default, aten.cummax.default, aten.cummin.default,
        ),
        other_dims_only,
    ),
    **dict.fromkeys(
        (
            aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.log_softmax.int,
            aten._log_softmax.default, aten.logsumexp.default, aten.amax.default, aten.max.dim,
            aten.argmax.default,
        ),
        filling(-_INFINITY),
    ),
    **dict.fromkeys((aten.amin.default, aten.min.dim, aten.argmin.default), filling(_INFINITY)),
    aten.sum.dim_IntList: filling(0),
    aten.linalg_vector_norm.default: norm,
    aten.prod.dim_int: filling(1),
    **dict.fromkeys((aten.any.dim, aten.any.dims), filling(False)),
    **dict.fromkeys((aten.all.dim, aten.all.dims), filling(True)),
    aten.mean.dim: mean,
    **dict.fromkeys(
        (aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default), layer_norm
    ),
    aten.slice.Tensor: cut,
    aten.select.int: select,
    **dict.fromkeys((aten.cat.default, aten.concat.default), join),
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), pad),
    **dict.fromkeys((aten.index_select.default, aten.gather.default, aten.embedding.default), lookup),
    aten.index.Tensor: indexing,
    aten.sym_size.int: length,
    **dict.fromkeys(
        (aten.arange.default, aten.arange.start, aten.full.default, aten.zeros.default, aten.ones.default),
        made,
    ),
    **dict.fromkeys((aten.tril.default, aten.triu.default), triangle),
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.matmul.default, aten.mv.default), _PRODUCT),
    aten.linear.default: _PRODUCT,
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), _PRODUCT_AND_SUM),
    aten.einsum.default: einsum,
    **dict.fromkeys((aten.convolution.default, aten.conv1d.default), convolution),
    WHOLE: attention,
    torch.ops.rmtcompile.attention.default: attention,
}  # fmt: skip
