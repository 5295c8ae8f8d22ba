"""Grouped query: key/value heads repeated for attention become `enable_gqa`, without the repeated copies.

    k8 = reshape(expand(unsqueeze(k[B,2,S,D], 2), [B,2,4,S,D]), [B,8,S,D])
    v8 = reshape(expand(unsqueeze(v[B,2,S,D], 2), [B,2,4,S,D]), [B,8,S,D])
    attention(q[B,8,T,D], k8, v8)                             ->  attention(q, k, v, enable_gqa=True)

Requires: a functional graph of one cell with meta `val`.
Ensures: same outputs up to rounding.  With `enable_gqa` query head h reads key/value head h // factor, so
only repeats in that order are taken: each head `factor` times in a row, as `repeat_interleave` does and
`repeat` does not.

16 cells at once, bf16, 32 query and 8 key/value heads of 64, 1152 tokens, one H200, torch 2.11, milliseconds:
causal 0.24 instead of 0.41, with a mask 0.71 instead of 0.88.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from rmtcompile.passes.cell.lift.builder import bind

aten = torch.ops.aten
HEADS = 1  # the heads' dim in [B, H, S, D]
_COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)


@dataclass(frozen=True)
class Repeat:
    """What a value with repeated heads is made of.

    Attributes:
        base: the value before the repeat.
        factor: how many times each head stands in a row.
        transposes: `transpose`s between the repeat and its use, in order.
    """

    base: fx.Node
    factor: int
    transposes: tuple[tuple[int, int], ...] = ()


def repeat_of(node: fx.Node, dim: int) -> Repeat | None:
    """The repeat of each entry along `dim` that a value is, or None."""
    node = _behind_copies(node)
    if not isinstance(node.target, torch._ops.OpOverload) or not node.all_input_nodes:
        return None
    source, args = node.all_input_nodes[0], _arguments(node)
    if node.target is aten.transpose.int:
        a, b = (int(args[name]) % len(_shape(node)) for name in ("dim0", "dim1"))
        found = repeat_of(source, {a: b, b: a}.get(dim, dim))
        return None if found is None else replace(found, transposes=(*found.transposes, (a, b)))
    if node.target is aten.repeat_interleave.self_int:
        is_along = args["dim"] is not None and args["dim"] % len(_shape(node)) == dim
        return Repeat(source, args["repeats"]) if is_along else None
    if node.target in _RESHAPES:
        return _expanded(_behind_copies(source), _shape(node), dim)
    return None


def can_group(attention: fx.Node) -> tuple[Repeat, Repeat] | None:
    """The repeats of key and value, where they are alike and give one head for each of the query's."""
    args = _arguments(attention)
    operands = [args[name] for name in ("query", "key", "value")]
    if args["enable_gqa"] or any(len(_shape(operand)) != 4 for operand in operands):
        return None
    if not _has_kernel(operands[0].meta["val"]):
        return None
    key, value = (repeat_of(operand, HEADS) for operand in operands[1:])
    has_same_heads = len({_shape(operand)[HEADS] for operand in operands}) == 1
    if key is None or value is None or key.factor != value.factor or not has_same_heads:
        return None
    return key, value


def grouped_query(graph: fx.Graph) -> fx.Graph:
    """Let attention read key/value heads before they are repeated.

    Args:
        graph: the cell; not modified.

    Returns:
        The new graph, or the same object where no attention reads repeated heads.
    """
    if not any(can_group(node) for node in _attentions(graph)):
        return graph
    grouped = fx.Graph()
    grouped.output(grouped.graph_copy(graph, {}))
    read = [node for node in grouped.nodes if node.op == "call_function" and node.users]
    for attention in _attentions(grouped):
        repeats = can_group(attention)
        if repeats is not None:
            _group(grouped, attention, repeats)
    for node in reversed(read):
        if not node.users:
            grouped.erase_node(node)
    return grouped


def _has_kernel(query: torch.Tensor) -> bool:
    """Whether reading grouped heads is no detour: on CUDA only half precision has kernels that do."""
    return query.device.type != "cuda" or query.dtype in (torch.float16, torch.bfloat16)


def _attentions(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is aten.scaled_dot_product_attention.default]


def _expanded(node: fx.Node, shape: tuple[int, ...], dim: int) -> Repeat | None:
    """`reshape(expand(unsqueeze(base)))`: reshapes keep elements in order, so shapes prove it for heads."""
    if node.target is not aten.expand.default:
        return None
    before, after = shape[:dim], shape[dim + 1 :]
    heads, factor = _shape(node)[dim : dim + 2]
    single = _behind_copies(node.all_input_nodes[0])
    if (_shape(node), _shape(single)) != ((*before, heads, factor, *after), (*before, heads, 1, *after)):
        return None
    if single.target not in (aten.unsqueeze.default, *_RESHAPES):
        return None
    base = single.all_input_nodes[0]
    return Repeat(base, factor) if _shape(base) == (*before, heads, *after) else None


def _group(graph: fx.Graph, attention: fx.Node, repeats: tuple[Repeat, Repeat]) -> None:
    """Feed attention from before the repeats."""
    args = _arguments(attention)
    with graph.inserting_before(attention):
        for name, repeat in zip(("key", "value"), repeats, strict=True):
            place = list(args).index(name)
            base = _transposed(graph, repeat, args[name])
            if place < len(attention.args):
                attention.update_arg(place, base)
            else:
                attention.update_kwarg(name, base)
    attention.update_kwarg("enable_gqa", True)


def _transposed(graph: fx.Graph, repeat: Repeat, source: fx.Node) -> fx.Node:
    """The base in the layout in which the repeated value was used."""
    node = repeat.base
    for a, b in repeat.transposes:
        turned = graph.call_function(aten.transpose.int, (node, a, b))
        turned.meta = source.meta | {"val": node.meta["val"].transpose(a, b)}
        node = turned
    return node


def _behind_copies(node: fx.Node) -> fx.Node:
    """The value of which a node is a copy: clones, and slices that take everything."""
    while node.target in _COPIES or (
        node.target is aten.slice.Tensor and _shape(node) == _shape(node.all_input_nodes[0])
    ):
        node = node.all_input_nodes[0]
    return node


def _arguments(node: fx.Node) -> dict[str, Any]:
    return bind(node, node.target, node.args, node.kwargs).args


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a value; empty for what is not one tensor."""
    return tuple(int(size) for size in getattr(node.meta.get("val"), "shape", ()))
