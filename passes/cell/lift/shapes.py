"""Batching rules: views, operations along dims, joining and splitting, indexing, reductions."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from rmtcompile.passes.cell.lift.builder import Builder, Call, Value, aten
from rmtcompile.passes.cell.lift.fallback import fallback

_DIMS = frozenset(
    ["dim", "dims", "dim0", "dim1", "dim2", "axis0", "axis1", "dimension", "source", "destination"]
)  # schema names of arguments that count dims


def along_dims(b: Builder, call: Call) -> Any:
    """`softmax(x, 0)` -> `softmax(x, 1)`: dims counted from the front move by one."""
    return _along(b, call, list(call.args))


def along_dims_shared_index(b: Builder, call: Call) -> Any:
    """`index_add(x, 0, index, source)` -> `index_add(x, 1, index, source)` if all cells share the index."""
    if call.args["index"].batched:
        return fallback(b, call)
    return _along(b, call, [name for name in call.args if name != "index"])


def _along(b: Builder, call: Call, spread: list[str]) -> Any:
    if any(value.rank == 0 for value in call.values):
        return fallback(b, call)
    changes: dict[str, Any] = {}
    for name, argument in call.args.items():
        if isinstance(argument, Value) and name in spread:
            changes[name] = b.spread(argument)
        elif name in _DIMS and not isinstance(argument, Value):
            shifted = _shifted(argument, call)
            if shifted != argument:
                changes[name] = shifted
    return b.again(call, **changes)


def _shifted(dims: Any, call: Call) -> Any:
    """Dims behind the axis; negative ones count from the end and stay; no dims for a reduction are all."""
    if isinstance(dims, int):
        return dims if dims < 0 else dims + 1
    if not dims and "keepdim" in call.args:
        return list(range(1, call.values[0].rank + 1))
    return [_shifted(dim, call) for dim in dims]


def flattened(b: Builder, call: Call) -> Any:
    """`argmax(x)` -> `argmax(reshape(x, [n, -1]), 1)` where no dim is given; also roll, repeat_interleave."""
    x = call.args["self"]
    name = "dims" if "dims" in call.args else "dim"
    if call.args[name] not in (None, []):
        return along_dims(b, call)
    if call.args.get("keepdim"):
        return fallback(b, call)
    dim: Any = [1] if name == "dims" else 1
    result = b.again(call, self=b.reshape(x.node, (math.prod(x.shape),)), **{name: dim})
    return b.reshape(result, call.shape)


_WHOLE: dict[Any, tuple[Any, bool]] = {  # reduction of everything: the one along dims, does it take a list
    aten.sum.default: (aten.sum.dim_IntList, True),
    aten.mean.default: (aten.mean.dim, True),
    aten.prod.default: (aten.prod.dim_int, False),
    aten.max.default: (aten.amax.default, True),
    aten.min.default: (aten.amin.default, True),
    aten.any.default: (aten.any.dim, False),
    aten.all.default: (aten.all.dim, False),
    aten.var.default: (aten.var.dim, True),
    aten.std.default: (aten.std.dim, True),
    aten.norm.Scalar: (aten.norm.ScalarOpt_dim, True),
}


def reduce_whole(b: Builder, call: Call) -> fx.Node:
    """`sum(x)` -> `sum(reshape(x, [n, -1]), [1])`."""
    op, takes_list = _WHOLE[call.op]
    x = call.args["self"]
    flat = b.reshape(x.node, (math.prod(x.shape),))
    dims: Any = [1] if takes_list else 1
    options = {name: call.args[name] for name in ("dtype",) if name in call.given}
    if call.op is aten.norm.Scalar:
        return b.emit(op, flat, call.args["p"], dims)
    if "unbiased" in call.args:
        return b.emit(op, flat, dims, call.args["unbiased"])
    return b.emit(op, flat, dims, **options)


def unchanged(b: Builder, call: Call) -> Any:
    """Operations on trailing dims, or on elements: the same call."""
    return b.again(call)


def reshape(b: Builder, call: Call) -> fx.Node:
    """`view(x, [B, T * D])` -> `reshape(x, [-1, B, T * D])`: lifted operands may have other strides."""
    return b.reshape(call.values[0].node, call.shape)


def expand(b: Builder, call: Call) -> fx.Node:
    """`expand(x, [B, T])` -> `expand(x, [-1, B, T])`."""
    x = b.aligned(call.args["self"], len(call.shape))
    return b.emit(aten.expand.default, x, [-1, *call.shape])


def squeeze(b: Builder, call: Call) -> fx.Node:
    """`squeeze(x)` -> `squeeze(x, dims)`: never the axis, also where n = 1."""
    x = call.args["self"]
    dims = [dim + 1 for dim, size in enumerate(x.shape) if size == 1]
    return b.emit(aten.squeeze.dims, x, dims) if dims else x.node


def unsqueeze(b: Builder, call: Call) -> fx.Node:
    """`unsqueeze(x, 0)` -> `unsqueeze(x, 1)`."""
    return b.again(call, dim=_shifted(call.args["dim"], call))


def permute(b: Builder, call: Call) -> fx.Node:
    """`permute(x, [1, 0])` -> `permute(x, [0, 2, 1])`."""
    x = call.args["self"]
    return b.emit(aten.permute.default, x, [0, *(dim % x.rank + 1 for dim in call.args["dims"])])


def reverse_dims(b: Builder, call: Call) -> fx.Node:
    """`t(x)` -> `transpose(x, 1, 2)`; `numpy_T` likewise."""
    x = call.args["self"]
    if x.rank < 2:
        node: fx.Node = x.node
        return node
    if x.rank == 2:
        return b.emit(aten.transpose.int, x, 1, 2)
    return b.emit(aten.permute.default, x, [0, *range(x.rank, 0, -1)])


def repeat(b: Builder, call: Call) -> fx.Node:
    """`repeat(x, [2, 1])` -> `repeat(x, [1, 2, 1])`; also `tile`."""
    repeats = call.args["repeats"] if "repeats" in call.args else call.args["dims"]
    x = call.args["self"]
    repeats = [1] * (x.rank - len(repeats)) + list(repeats)
    return b.emit(aten.repeat.default, b.aligned(x, len(repeats)), [1, *repeats])


def join(b: Builder, call: Call) -> fx.Node:
    """`cat([x, y], 0)` -> `cat([x, y], 1)`, shared operands expanded; also `stack`."""
    values: list[Value] = call.args["tensors"]
    if call.op is not aten.stack.default:  # cat skips operands of shape [0], whatever the rank of the others
        values = [value for value in values if value.shape != (0,)] if len(call.shape) > 1 else values
    dim = _shifted(call.args["dim"], call)
    return b.again(call, tensors=[b.spread(value) for value in values], dim=dim)


def pad(b: Builder, call: Call) -> fx.Node:
    """Constant padding names its dims from the end; other modes depend on the rank."""
    return b.again(call) if call.args.get("mode", "constant") == "constant" else fallback(b, call)


def index(b: Builder, call: Call) -> fx.Node:
    """`index(x, [i])` -> `index(x, [None, i])` where all cells share the indices."""
    x, indices = call.args["self"], list(call.args["indices"])
    places = [i for i, item in enumerate(indices) if item is not None]
    if any(indices[i].batched for i in places):
        return fallback(b, call)
    result = b.again(call, indices=[None, *indices])
    if places == list(range(places[0], places[-1] + 1)):
        return result
    front = len(call.shape) - (x.rank - len(places))  # indices not side by side: their dims come first
    return b.emit(aten.movedim.int, result, front, 0)


def index_select(b: Builder, call: Call) -> fx.Node:
    """`index_select(x, 0, i)` -> `index_select(x, 1, i)`; with indices per cell a `gather`."""
    x, dim, indices = call.args["self"], call.args["dim"], call.args["index"]
    if x.rank == 0 or indices.rank == 0:
        return fallback(b, call)
    if not indices.batched:
        return b.again(call, dim=_shifted(dim, call))
    dim = dim % x.rank
    column = b.reshape(indices.node, ((1,) * dim + indices.shape + (1,) * (x.rank - dim - 1)))
    everywhere = b.emit(aten.expand.default, column, [-1, *call.shape])
    return b.emit(aten.gather.default, b.spread(x), dim + 1, everywhere)
