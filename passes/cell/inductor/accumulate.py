"""Accumulate: a product that is added to a value which nobody reads any more is added by the product itself.

    y = bmm(h, w); z = x + y; lane.copy_(z)     ->     store(lane, x); accumulate(lane, h, w)

A matrix product can begin with what it is added to. A kernel that sums what the product has stored reads x
and y once more and writes z.  `baddbmm` alone copies x first, which costs what is gained; here x is made in
the same graph and ends with the sum, so the product writes over it.  A sum that goes to a lane lies there
from the start.

Requires: an Inductor graph after its own passes: functional but for `copy_` into inputs at the end.
Ensures: same outputs up to rounding; products are no longer rounded before they are added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._inductor.lowering import mutate_to, register_lowering

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim)
_PRODUCTS = (aten.bmm.default, aten.mm.default)

_library = torch.library.Library("rmtcompile", "FRAGMENT")
_library.define("accumulate(Tensor(a!) total, Tensor a, Tensor b) -> ()")
_library.define("store(Tensor(a!) place, Tensor value) -> ()")


@torch.library.impl(_library, "accumulate", "CompositeExplicitAutograd")
def _accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b

    Args:
        total: contiguous, of as many elements as the product.
        a: [n, N, K], or [N, K].
        b: [n, K, M], or [K, M].
    """
    shaped = total.view(*a.shape[:-1], b.shape[-1])
    add = torch.baddbmm if a.dim() == 3 else torch.addmm
    add(shaped, a, b, out=shaped)


@torch.library.impl(_library, "store", "CompositeExplicitAutograd")
def _store(place: torch.Tensor, value: torch.Tensor) -> None:
    place.copy_(value)


@register_lowering(torch.ops.rmtcompile.store.default, type_promotion_kind=None)
def _store_lowered(place: Any, value: Any) -> None:
    """Compute `value`, which nobody else reads, into `place`; `copy_` would store it elsewhere first."""
    mutate_to(place, value, unsafe_alias=True)


def accumulate(graph: fx.Graph) -> None:
    """The pass; changes the graph."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    firsts: dict[fx.Node, fx.Node] = {}  # total -> the first product that is added to it
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        for total, product in _pairs(node):
            if _may_be_written(total, node, product, order):
                added = _add_in_place(graph, node, total, product)
                order[added] = order[node]
                firsts.setdefault(total, added)
                break
    for total, added in firsts.items():
        if total.target not in _PRODUCTS:
            _set_apart(graph, total, added, order)
    graph.eliminate_dead_code()


def _pairs(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(total, product) where one operand of a sum is a matrix product that nobody else reads."""
    operands = node.all_input_nodes
    for total, other in (operands, reversed(operands)) if len(operands) == 2 else ():
        if other.meta["val"].shape != node.meta["val"].shape:
            continue
        while other.target in _VIEWS and len(other.users) == 1:
            other = other.all_input_nodes[0]
        if other.target in _PRODUCTS and len(other.users) == 1 and total is not other:
            yield total, other


def _may_be_written(total: fx.Node, node: fx.Node, product: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether `total` was made in this graph, is stored like the sum `node`, and is read last by it."""
    mine, summed, made = (x.meta["val"] for x in (total, node, product))
    if not _is_new(total) or made.dtype != mine.dtype:
        return False
    if (mine.shape, mine.dtype, mine.device) != (summed.shape, summed.dtype, summed.device):
        return False
    if not mine.is_contiguous() or not mine.dtype.is_floating_point:
        return False
    return all(
        reader is node or (order[reader] < order[node] and reader is not product)
        for reader in _readers(total)
    )


def _is_new(value: fx.Node) -> bool:
    """Whether a value certainly has memory of its own, and is the same if it is computed again."""
    if value.op != "call_function" or _is_view(value):
        return False
    tags = value.target.tags  # type: ignore[union-attr]
    is_pointwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    return is_pointwise or value.target in _PRODUCTS


def _readers(value: fx.Node) -> Iterator[fx.Node]:
    """Who reads a value or a view of it."""
    for user in value.users:
        yield user
        if _is_view(user):
            yield from _readers(user)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # `getitem` of what a view gives, say
        return True
    return node.target in _VIEWS or any(result.alias_info is not None for result in schema.returns)


def _add_in_place(graph: fx.Graph, node: fx.Node, total: fx.Node, product: fx.Node) -> fx.Node:
    with graph.inserting_before(node):
        added = graph.call_function(torch.ops.rmtcompile.accumulate.default, (total, *product.args))
    node.replace_all_uses_with(total)
    graph.erase_node(node)
    return added


def _set_apart(graph: fx.Graph, total: fx.Node, first: fx.Node, order: dict[fx.Node, int]) -> None:
    """Compute what products are added to a second time, to lie where the sum goes.

    Who reads `total` before the first sum reads it as before. Then one kernel computes it, uses it and stores
    it, where a value with several readers would be stored by one kernel and read by others.
    """
    with graph.inserting_before(total.next):
        apart = graph.node_copy(total)
    order[apart] = order[total]
    total.replace_all_uses_with(apart, delete_user_cb=lambda user: order[user] >= order[first])
    for copy in [user for user in apart.users if user.target is aten.copy_.default]:
        place = copy.all_input_nodes[0]
        if place.op == "placeholder" and len(place.users) == 1 and _are_alike(place, apart):
            graph.erase_node(copy)
            with graph.inserting_before(apart.next):
                stored = graph.call_function(torch.ops.rmtcompile.store.default, (place, apart))
            apart.replace_all_uses_with(place)
            stored.args = (place, apart)
            return


def _are_alike(a: fx.Node, b: fx.Node) -> bool:
    one, other = a.meta["val"], b.meta["val"]
    return (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


__all__ = ["accumulate"]
