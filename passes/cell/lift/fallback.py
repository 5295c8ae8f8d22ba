"""Operations without a batching rule: `torch.vmap` of that single operation at run time."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rmtcompile.errors import LiftError
from rmtcompile.passes.cell.lift.builder import Builder, Call, values_in


def vmapped(op: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`op(*args, **kwargs)` for n cells at once.

    Args:
        op: an operation.
        in_dims: per tensor in `args` and `kwargs`: 0 if it has the axis in front, None if cells share it.

    Random numbers are drawn for each cell.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def cell(*tensors: torch.Tensor) -> Any:
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        cell_args, cell_kwargs = pytree.tree_unflatten(filled, spec)
        return op(*cell_args, **cell_kwargs)

    return torch.vmap(cell, in_dims=in_dims, randomness="different")(*(leaves[i] for i in places))


def fallback(b: Builder, call: Call) -> fx.Node:
    """Rule for everything else; tried on fake tensors here, so that what vmap cannot do is refused now."""
    args, kwargs = call.arguments({})
    in_dims = tuple(0 if value.batched else None for value in values_in((args, kwargs)))
    try:
        return b.emit(vmapped, call.op, in_dims, tuple(args), kwargs)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise refusal(call.node, f"vmap: {type(error).__name__}: {reason[0] if reason else ''}") from error


def refusal(node: fx.Node, reason: str) -> LiftError:
    """The error that says which operation, in which module and at which line, cannot be lifted."""
    scope, source = node.meta.get("scope", "?"), node.meta.get("source", "?")
    return LiftError(
        f"{node.target} cannot be computed for several cells at once",
        [f"{node.format_node()}", f"module {scope}  {source}", reason],
        "move the operation out of the layer, or write it so that no shape depends on values",
    )
