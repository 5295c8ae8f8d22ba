"""Unread: no gradients of what nobody reads: of memories, in runs so short that no segment reads them.

    one segment     W_write -> memory, for segment 1, which is not there     the model: .grad is None
    compiled cell   gradients of all it gives, zeros for the memory          .grad would be zeros

An optimizer passes over parameters without a gradient; with one of zeros it decays their weights and counts a
step. So in such runs each cell notes which of its results have got gradients, and passes on those of the
arguments alone that these depend on; and so do prologues and epilogues in all runs, where a loss may read one
result of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from rmtcompile.ir.program import Program
from rmtcompile.runtime.contexts import unseen

Cell = Callable[..., tuple[torch.Tensor, ...]]


Dependents = tuple[frozenset[int], ...]
"""Of each argument of a call, the results that it has gradients of."""


def farthest(program: Program) -> int:
    """How many segments later a value is read at most, by way of other lanes, too: longer runs read all that
    cells carry."""
    lanes = {lane.name: lane for lane in program.lanes}

    def back(name: str, seen: frozenset[str]) -> int:
        """Of what a lane holds, not counting what stays in it from segment to segment."""
        ways = (
            feed.offset[0] + (0 if feed.group else back(feed.source, seen | {name}))
            for feed in lanes[name].feeds
            if feed.group or feed.source not in seen | {name}
        )
        return max(ways, default=0)

    return max((back(name, frozenset()) for name in lanes), default=0) or 1


def dependents(function: Cell, args: Sequence[Any]) -> Dependents | None:
    """The dependents of a function; None where they cannot be told without values.

    Args:
        args: of one call; their values are not read.
    """
    found: list[set[int]] = [set() for _ in args]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), unseen():
            fakes = pytree.tree_map_only(torch.Tensor, _fake, list(args))
            places = [i for i, x in enumerate(fakes) if isinstance(x, torch.Tensor) and x.requires_grad]
            for index, result in enumerate(function(*fakes)):
                if isinstance(result, torch.Tensor) and result.requires_grad:
                    wanted, given = [fakes[i] for i in places], torch.empty_like(result)
                    grads = torch.autograd.grad(result, wanted, given, retain_graph=True, allow_unused=True)
                    for place, grad in zip(places, grads, strict=True):
                        if grad is not None:
                            found[place].add(index)
    except Exception:  # an operation that looks at values
        return None
    return tuple(map(frozenset, found))


def _fake(x: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return made.requires_grad_(x.is_floating_point() or x.is_complex())


def passing(
    call: Callable[[tuple[Any, ...]], tuple[torch.Tensor, ...]],
    args: tuple[Any, ...],
    results_of: Dependents,
) -> tuple[torch.Tensor, ...]:
    """The results of a call, in whose backward arguments get gradients of results that have got one.

    Args:
        results_of: see `dependents`.
    """
    asked: set[int] = set()
    gated = tuple(
        _Gate.apply(arg, asked, of) if isinstance(arg, torch.Tensor) and arg.requires_grad else arg
        for arg, of in zip(args, results_of, strict=True)
    )
    return tuple(
        _Noting.apply(result, asked, index)
        if isinstance(result, torch.Tensor) and result.requires_grad
        else result
        for index, result in enumerate(call(gated))
    )


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arg: torch.Tensor, asked: set[int], of: frozenset[int]) -> torch.Tensor:
        ctx.given = asked, of
        ctx.set_materialize_grads(False)
        return arg.view_as(arg)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        asked, of = ctx.given
        return grad if asked & of else None, None, None


class _Noting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, asked: set[int], index: int) -> torch.Tensor:
        ctx.given = asked, index
        ctx.set_materialize_grads(False)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> Any:
        asked, index = ctx.given
        if grad is not None:
            asked.add(index)
        return grad, None, None


__all__ = ["dependents", "farthest", "passing"]
