"""Randomness: which operations draw random numbers.

Two of them with equal operands give two values, so they are never merged, and none is moved out of the place
where it lies. They may be left out where nobody reads what they give.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rmtcompile.ir.schema import bind


def draws(target: Any) -> bool:
    """Whether an operation may draw random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers: not dropout in evaluation mode, or of probability zero."""
    return draws(node.target) and not is_idle(node)


def is_idle(node: fx.Node) -> bool:
    """Whether an operation that may draw numbers does nothing of the kind with its arguments."""
    given = bind(node)
    if "dropout_p" in given:
        return not given["dropout_p"]
    if "num_layers" in given and "dropout" in given:  # recurrent layers: dropped out between two of them
        return not (given["dropout"] and given["train"] and given["num_layers"] > 1)
    if "train" in given:
        return given["train"] is False or not given.get("p")
    return given.get("training") is False


def drop_dead(graph: fx.Graph) -> None:
    """Erase what nobody reads, random numbers too."""
    graph.eliminate_dead_code(lambda node: node.is_impure() and not draws(node.target))
