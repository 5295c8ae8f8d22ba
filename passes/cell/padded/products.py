"""Products and attention in padded cells: what would add up what comes after the segment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from rmtcompile.ir.size import Size
from rmtcompile.passes.cell import open_attention as _open_attention  # torch.ops.rmtcompile.attention
from rmtcompile.passes.cell.padded.builder import Builder, argument, aten

assert _open_attention

Rule = Callable[[Builder, fx.Node], fx.Node]

WHOLE = aten.scaled_dot_product_attention.default


def product(left: int, right: int) -> Rule:
    """A product of two matrices, or more of them; nothing is added up behind what the segment has.

    Args:
        left, right: which arguments they are.
    """

    def rule(b: Builder, node: fx.Node) -> fx.Node:
        x, y = node.args[left], node.args[right]
        assert isinstance(x, fx.Node) and isinstance(y, fx.Node)
        rows = len(b.sizes(y)) - (1 if len(b.sizes(y)) == 1 or node.target is aten.linear.default else 2)
        args = list(b.mapped(node.args))
        args[left] = b.filled(node, x, [len(b.sizes(x)) - 1], 0)
        args[right] = b.filled(node, y, [rows], 0)
        if x in b.apart and y not in b.apart:
            return _product_apart(b, node, args, left, right)
        return b.call(node, node.target, *args, **b.mapped(dict(node.kwargs)))

    return rule


def _product_apart(b: Builder, node: fx.Node, args: list[Any], left: int, right: int) -> fx.Node:
    """A product whose rows are not joined."""
    x, y = node.args[left], node.args[right]
    assert isinstance(x, fx.Node) and isinstance(y, fx.Node)
    shape, width = b.apart[x], b.sizes(node)[-1]
    if node.target not in (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default):
        raise b.refused(node, "a dim that depends on the rest is joined with another one")
    if node.kwargs or len(shape) - 1 in b.open_dims(x):
        raise b.refused(node, "a dim that depends on the rest is joined with another one")
    more = len(shape) - len(b.sizes(x))

    def spread(value: Any, rank: int) -> Any:
        """What belongs to each cell, with dims for those that are not joined."""
        for _ in range(more if rank == 3 else 0):
            value = b.call(node, aten.unsqueeze.default, value, 1)
        return value

    made = b.call(node, aten.matmul.default, args[left], spread(args[right], len(b.sizes(y))))
    if left:
        made = b.call(node, aten.add.Tensor, made, spread(args[0], len(b.sizes(node.args[0]))))
    b.apart[node] = (*shape[:-1], width)
    return made


def einsum(b: Builder, node: fx.Node) -> fx.Node:
    """Sums over letters that the result lacks."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str) and isinstance(operands, (list, tuple))
    given, _, result = equation.replace(" ", "").partition("->")
    if "." in equation or "->" not in equation:
        raise b.refused(node, "its equation leaves letters out")
    filled = [
        b.filled(node, x, [i for i, letter in enumerate(letters) if letter not in result], 0)
        for x, letters in zip(operands, given.split(","), strict=True)
        if isinstance(x, fx.Node)
    ]
    return b.call(node, node.target, equation, filled, **b.mapped(dict(node.kwargs)))


def convolution(b: Builder, node: fx.Node) -> fx.Node:
    """What follows the segment is as empty as what surrounds it."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    rank = len(b.sizes(x))
    stride = argument(node, "stride", [1])
    if argument(node, "transposed", False) or any(step != 1 for step in stride):
        raise b.refused(node, "it skips positions of a dim that depends on the rest")
    if 1 in b.open_dims(x) or (0 in b.open_dims(x) and rank < 3):
        raise b.refused(node, "its channels depend on the rest")
    filled = b.filled(node, x, range(2, rank), 0)
    return b.call(node, node.target, filled, *b.mapped(node.args[1:]), **b.mapped(dict(node.kwargs)))


def attention(b: Builder, node: fx.Node) -> fx.Node:
    """Nobody sees what comes behind the segment; keys and values there are 0, since 0 times nan is nan."""
    query, key, value = node.args[:3]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    shape = b.sizes(key)
    dim = len(shape) - 2
    if len(shape) - 1 in b.open_dims(key) or len(b.sizes(value)) - 1 in b.open_dims(value):
        raise b.refused(node, "the size of its heads depends on the rest")
    mask, is_causal = argument(node, "attn_mask"), argument(node, "is_causal", False)
    if dim not in b.open_dims(key) and node.target is WHOLE:
        return b.keep(node)
    keys, values = (b.filled(node, x, [dim], 0) for x in (key, value))
    options = {"scale": argument(node, "scale"), "enable_gqa": bool(argument(node, "enable_gqa", False))}
    dropout = argument(node, "dropout_p", 0.0)
    given = b.mapped(query), keys, values
    if is_causal:
        if _terms(b.sizes(query)[-2]) != _terms(shape[dim]):
            raise b.refused(node, "it is causal, with keys that its queries do not have")
        return b.call(node, WHOLE, *given, None, dropout, True, **options)
    if dim not in b.open_dims(key):
        return b.call(node, WHOLE, *given, b.mapped(mask), dropout, False, **options)
    seen = b.valid(node, shape[dim], b.device(key))
    if mask is None:
        rows = [*([1] * (len(shape) - 2)), b.sizes(query)[-2], shape[dim]]
        mask = b.call(node, aten.expand.default, seen, rows)
    elif mask.meta["val"].dtype is torch.bool:
        mask = b.call(node, aten.logical_and.default, b.mapped(mask), seen)
    else:
        mask = b.call(node, aten.where.ScalarOther, seen, b.mapped(mask), -float("inf"))
    return b.call(node, WHOLE, *given, mask, dropout, False, **options)


def _terms(size: int) -> Any:
    return size.terms if isinstance(size, Size) else int(size)


__all__ = ["WHOLE", "Rule", "attention", "convolution", "einsum", "product"]
