"""Operations without a batching rule: `torch.vmap` of that single operation at run time, or the operation
cell by cell where torch cannot do that either (custom operators, fused recurrent layers).

    lstm(x[n,B,T,D], [h[n], c[n]], [w[n], ...])   ->   stack([lstm(x[i], [h[i], c[i]], [w[i], ...]) ...])

All else of the cell stays one call for n cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rmtcompile.errors import LiftError
from rmtcompile.ir.modes import uncompiled
from rmtcompile.passes.cell.lift.builder import Builder, Call, values_in


def vmapped(op: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`op(*args, **kwargs)` for n cells at once.

    Args:
        op: an operation.
        in_dims: per tensor in `args` and `kwargs`: 0 if it has the axis in front, None if cells share it.

    Random numbers are drawn for each cell.
    """
    tensors, cell = _of_tensors(op, args, kwargs)
    shape: list[Any] = []  # of the results: where there is none

    def traced(*operands: torch.Tensor) -> Any:
        found, spec = pytree.tree_flatten(cell(*operands))
        shape[:] = [[x is None for x in found], spec]
        return tuple(x for x in found if x is not None)

    results = iter(torch.vmap(traced, in_dims=in_dims, randomness="different")(*tensors))
    nothing, spec = shape
    return pytree.tree_unflatten([None if is_none else next(results) for is_none in nothing], spec)


@uncompiled
def cell_by_cell(
    op: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`vmapped` by a loop: each cell's operands in, results stacked. Compiled cells run it between two
    parts."""
    tensors, cell = _of_tensors(op, args, kwargs)
    split = [x if dim is None else x.unbind(0) for x, dim in zip(tensors, in_dims, strict=True)]
    n = next(len(x) for x in split if isinstance(x, tuple))
    runs = [cell(*(x[i] if isinstance(x, tuple) else x for x in split)) for i in range(n)]
    flat = [pytree.tree_flatten(run) for run in runs]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    stacked = [torch.stack(x) if isinstance(x[0], torch.Tensor) else x[0] for x in columns]
    return pytree.tree_unflatten(stacked, flat[0][1])


@contextmanager
def _without_loops() -> Iterator[None]:
    """Within it, `torch.vmap` fails where it would run an operation in a loop of its own, silently."""
    functorch: Any = torch._C._functorch
    was = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(was)


def _of_tensors(op: Any, args: Any, kwargs: Any) -> tuple[list[torch.Tensor], Callable[..., Any]]:
    """The tensors among the arguments of a call, and the call as a function of them."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def call(*tensors: torch.Tensor) -> Any:
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        call_args, call_kwargs = pytree.tree_unflatten(filled, spec)
        return op(*call_args, **call_kwargs)

    return [leaves[i] for i in places], call


def fallback(b: Builder, call: Call) -> fx.Node:
    """Rule for everything else; tried on fake tensors here, so that what vmap cannot do is refused now."""
    args, kwargs = call.arguments({})
    in_dims = tuple(0 if value.batched else None for value in values_in((args, kwargs)))
    try:
        with _without_loops():
            return b.emit(vmapped, call.op, in_dims, tuple(args), kwargs)
    except Exception as error:
        failure = error
    try:
        return b.emit(cell_by_cell, call.op, in_dims, tuple(args), kwargs)
    except Exception:
        reason = str(failure).strip().splitlines()
        said = f"vmap: {type(failure).__name__}: {reason[0] if reason else ''}"
        raise refusal(call.node, said) from failure


def refusal(node: fx.Node, reason: str) -> LiftError:
    """The error that says which operation, in which module and at which line, cannot be lifted."""
    scope, source = node.meta.get("scope", "?"), node.meta.get("source", "?")
    return LiftError(
        f"{node.target} cannot be computed for several cells at once",
        [f"{node.format_node()}", f"module {scope}  {source}", reason],
        "move the operation out of the layer, or write it so that no shape depends on values",
    )
