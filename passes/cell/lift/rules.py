"""The table of batching rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rmtcompile.passes.cell.lift.algebra import addmm, attention, baddbmm, convolution, einsum, linear, matmul
from rmtcompile.passes.cell.lift.builder import Rule, aten
from rmtcompile.passes.cell.lift.elementwise import (
    copy,
    embedding,
    fill,
    group_norm,
    masked_fill,
    norm,
    pointwise,
)
from rmtcompile.passes.cell.lift.fallback import fallback, refusal
from rmtcompile.passes.cell.lift.shapes import (
    along_dims,
    along_dims_shared_index,
    expand,
    flattened,
    index,
    index_select,
    join,
    pad,
    permute,
    reduce_whole,
    repeat,
    reshape,
    reverse_dims,
    squeeze,
    unchanged,
    unsqueeze,
)


def refuse_storage(b: Any, call: Any) -> None:
    """Operations that read strides see other strides once lifted."""
    raise refusal(call.node, "it reads the storage of its operand, whose layout differs for several cells")


RULES: dict[Any, Rule] = {
    # products
    aten.linear.default: linear,
    aten.addmm.default: addmm,
    aten.mm.default: matmul,
    aten.mv.default: matmul,
    aten.dot.default: matmul,
    aten.bmm.default: matmul,
    aten.matmul.default: matmul,
    aten.baddbmm.default: baddbmm,
    aten.einsum.default: einsum,
    aten.scaled_dot_product_attention.default: attention,
    aten.conv1d.default: convolution,
    aten.conv1d.padding: convolution,
    aten.conv2d.default: convolution,
    aten.conv2d.padding: convolution,
    aten.convolution.default: convolution,
    # norms, embeddings
    aten.layer_norm.default: norm,
    aten.native_layer_norm.default: norm,
    aten.rms_norm.default: norm,
    aten.group_norm.default: group_norm,
    aten.embedding.default: embedding,
    # element by element, without the tag that says so
    aten.masked_fill.Tensor: masked_fill,
    aten.fill.Tensor: fill,
    aten.copy.default: copy,
    aten.where.ScalarOther: pointwise,
    aten.where.ScalarSelf: pointwise,
    aten.where.Scalar: pointwise,
    aten._to_copy.default: pointwise,
    aten.to.dtype: pointwise,
    aten.to.dtype_layout: pointwise,
    aten.to.device: pointwise,
    aten.contiguous.default: pointwise,
    aten.alias.default: pointwise,
    aten.detach.default: pointwise,
    aten.lift_fresh_copy.default: pointwise,
    aten.dropout.default: pointwise,
    aten.native_dropout.default: pointwise,
    aten.alpha_dropout.default: pointwise,
    aten.feature_dropout.default: unchanged,
    aten.feature_alpha_dropout.default: unchanged,
    aten.multiply.Tensor: pointwise,
    aten.subtract.Tensor: pointwise,
    aten.divide.Tensor: pointwise,
    aten.nan_to_num.default: pointwise,
    aten.one_hot.default: unchanged,
    # views
    aten.view.default: reshape,
    aten._unsafe_view.default: reshape,
    aten.reshape.default: reshape,
    aten._reshape_alias.default: reshape,
    aten.flatten.using_ints: reshape,
    aten.unflatten.int: reshape,
    aten.ravel.default: reshape,
    aten.expand.default: expand,
    aten.broadcast_to.default: expand,
    aten.squeeze.default: squeeze,
    aten.squeeze.dim: along_dims,
    aten.squeeze.dims: along_dims,
    aten.unsqueeze.default: unsqueeze,
    aten.transpose.int: along_dims,
    aten.swapaxes.default: along_dims,
    aten.swapdims.default: along_dims,
    aten.movedim.int: along_dims,
    aten.movedim.intlist: along_dims,
    aten.moveaxis.int: along_dims,
    aten.moveaxis.intlist: along_dims,
    aten.permute.default: permute,
    aten.t.default: reverse_dims,
    aten.numpy_T.default: reverse_dims,
    aten.mT.default: unchanged,
    aten.select.int: along_dims,
    aten.slice.Tensor: along_dims,
    aten.narrow.default: along_dims,
    aten.unfold.default: along_dims,
    aten.diagonal.default: along_dims,
    aten.diag_embed.default: along_dims,
    aten.split.Tensor: along_dims,
    aten.split.sizes: along_dims,
    aten.split_with_sizes.default: along_dims,
    aten.chunk.default: along_dims,
    aten.unsafe_chunk.default: along_dims,
    aten.tensor_split.sections: along_dims,
    aten.tensor_split.indices: along_dims,
    aten.unbind.int: along_dims,
    aten.as_strided.default: refuse_storage,
    aten.view.dtype: unchanged,
    # joining, repeating, moving
    aten.cat.default: join,
    aten.concat.default: join,
    aten.stack.default: join,
    aten.repeat.default: repeat,
    aten.tile.default: repeat,
    aten.repeat_interleave.self_int: flattened,
    aten.roll.default: flattened,
    aten.flip.default: along_dims,
    aten.constant_pad_nd.default: pad,
    aten.pad.default: pad,
    aten.tril.default: unchanged,
    aten.triu.default: unchanged,
    # along a dim
    aten.softmax.int: along_dims,
    aten._softmax.default: along_dims,
    aten.log_softmax.int: along_dims,
    aten._log_softmax.default: along_dims,
    aten.logsumexp.default: along_dims,
    aten.glu.default: along_dims,
    aten.cumsum.default: along_dims,
    aten.cumprod.default: along_dims,
    aten.cummax.default: along_dims,
    aten.cummin.default: along_dims,
    aten.logcumsumexp.default: along_dims,
    aten.sort.default: along_dims,
    aten.sort.stable: along_dims,
    aten.argsort.default: along_dims,
    aten.argsort.stable: along_dims,
    aten.topk.default: along_dims,
    aten.kthvalue.default: along_dims,
    aten.median.dim: along_dims,
    # reductions
    aten.sum.default: reduce_whole,
    aten.mean.default: reduce_whole,
    aten.prod.default: reduce_whole,
    aten.max.default: reduce_whole,
    aten.min.default: reduce_whole,
    aten.any.default: reduce_whole,
    aten.all.default: reduce_whole,
    aten.var.default: reduce_whole,
    aten.std.default: reduce_whole,
    aten.norm.Scalar: reduce_whole,
    aten.argmax.default: flattened,
    aten.argmin.default: flattened,
    aten.sum.dim_IntList: along_dims,
    aten.mean.dim: along_dims,
    aten.prod.dim_int: along_dims,
    aten.max.dim: along_dims,
    aten.min.dim: along_dims,
    aten.amax.default: along_dims,
    aten.amin.default: along_dims,
    aten.any.dim: along_dims,
    aten.any.dims: along_dims,
    aten.all.dim: along_dims,
    aten.all.dims: along_dims,
    aten.var.dim: along_dims,
    aten.var.correction: along_dims,
    aten.var_mean.dim: along_dims,
    aten.var_mean.correction: along_dims,
    aten.std.dim: along_dims,
    aten.std.correction: along_dims,
    aten.linalg_vector_norm.default: along_dims,
    aten.norm.ScalarOpt_dim: along_dims,
    aten.norm.ScalarOpt_dim_dtype: along_dims,
    # indexing
    aten.index.Tensor: index,
    aten.index_select.default: index_select,
    aten.index_add.default: along_dims_shared_index,
    aten.index_copy.default: along_dims_shared_index,
    aten.gather.default: along_dims,
    aten.scatter.src: along_dims,
    aten.scatter.value: along_dims,
    aten.scatter.reduce: along_dims,
    aten.scatter.value_reduce: along_dims,
    aten.scatter_add.default: along_dims,
    aten.scatter_reduce.two: along_dims,
    aten.slice_scatter.default: along_dims,
    aten.select_scatter.default: along_dims,
    aten.diagonal_scatter.default: along_dims,
}


def rule_for(op: Any) -> Rule:
    """The batching rule of an operation."""
    if op in RULES:
        return RULES[op]
    return pointwise if torch.Tag.pointwise in op.tags else fallback


_FILLS: dict[Any, float | None] = {  # None: the call itself says what to fill with
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.new_empty.default: 0,
    aten.new_full.default: None,
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.empty_like.default: 0,
    aten.full_like.default: None,
}


def without_pattern(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The node's operation and arguments, less an operand of which only shape, dtype or device count.

    `zeros_like(x)` -> `full([B, T], 0)`: does not depend on the values of x, so all cells can share it.
    """
    op: Any = node.target
    val: Any = node.meta.get("val")
    if op in _FILLS:
        filler = _FILLS[op]
        if filler is None:
            filler = node.kwargs.get("fill_value", node.args[-1])  # type: ignore[assignment]
        return aten.full.default, (_shape(val), filler), {"dtype": val.dtype, "device": val.device}
    if op in (aten.type_as.default, aten.to.other):
        return aten._to_copy.default, (node.args[0],), {"dtype": val.dtype, "device": val.device}
    if op is aten.expand_as.default:
        return aten.expand.default, (node.args[0], _shape(val)), {}
    if op in (aten.view_as.default, aten.reshape_as.default):
        return aten.reshape.default, (node.args[0], _shape(val)), {}
    return op, tuple(node.args), dict(node.kwargs)


def _shape(val: torch.Tensor) -> list[int]:
    return [int(size) for size in val.shape]
