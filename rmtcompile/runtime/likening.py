"""Likening: a cell of the first segment, made to look like one of a later segment to the compiler.

    layer 0, segment 0     memory: zeros, without gradients     a form
    layer 1, segment 7     memory: of segment 6, with them      another one, and a backward of its own

A compiled form holds for arguments that require gradients or do not, as those did that it was made for. What
a first segment finds becomes a leaf of its own where later segments find something with gradients, so that
one form serves both. In windows of several cells it is stacked with others, and requires gradients anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rmtcompile.ir.program import Group, Program
from rmtcompile.runtime.contexts import unseen


def fed_with_gradients(
    program: Program, group: Group, function: Callable[..., Any], args: Sequence[torch.Tensor]
) -> frozenset[str]:
    """The lanes into which a group's cells put what has gradients, if their floating-point arguments do; none
    where that cannot be told without values.

    Args:
        function: of its cells.
        args: of one of its calls.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), unseen():
            fakes = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in args)
            results = function(*(x.requires_grad_(x.is_floating_point()) for x in fakes))
    except Exception:  # an operation that looks at values
        return frozenset()
    names = {name for name, x in zip(group.outputs, results, strict=True) if x.requires_grad}
    return frozenset(
        lane.name
        for lane in program.lanes
        if any(feed.group == group.name and feed.source in names for feed in lane.feeds)
    )


def likened(arg: torch.Tensor) -> torch.Tensor:
    """The same values, as a leaf with gradients of its own."""
    return arg if arg.requires_grad or not arg.is_floating_point() else arg.detach().requires_grad_()


__all__ = ["fed_with_gradients", "likened"]
