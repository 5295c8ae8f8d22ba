"""What a random model returns: `f(model, out: the segments' parts f[B, T, D])`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def hidden_states(model: Any, out: list[Tensor]) -> Any:
    """As transformers return them: a tuple of one tensor a layer."""
    states = zip(*model.hidden)
    return {"out": torch.cat(out, 1), "hidden": tuple(torch.cat(layer, 1) for layer in states)}


def loss(model: Any, out: list[Tensor]) -> Any:
    """The mean of a loss a segment, added up in the loop."""
    total: Any = 0.0
    for part in out:
        total = total + part.square().mean()
    return {"loss": total / len(out), "out": torch.cat(out, 1)}


def cells(model: Any, out: list[Tensor]) -> Any:
    """A number of each cell, stacked."""
    return torch.stack([h.mean() for row in model.hidden for h in row]), out[-1]


def last_means(model: Any, out: list[Tensor]) -> Any:
    """What the layers of the last segment leave."""
    layers = range(model.spec.layers)
    return out[-1], [model.means[len(out) - 1, l] for l in layers]


RESULTS: dict[str, Callable[[Any, list[Tensor]], Any]] = {
    "cat": lambda model, out: torch.cat(out, 1),
    "last": lambda model, out: out[-1][:, -1],
    "list": lambda model, out: out,
    "dict": lambda model, out: {"all": torch.cat(out, 1), "last": out[-1]},
    "by segment": lambda model, out: {f"out_{s}": part for s, part in enumerate(out)},
    "hidden": hidden_states,
    "loss": loss,
    "cells": cells,
    "means": last_means,
    "stack of means": lambda model, out: torch.stack([part.mean(1) for part in out], 1),
    "sum": lambda model, out: sum(part.sum(1) for part in out),
    "first and last": lambda model, out: (out[0], out[-1]),
    "reversed": lambda model, out: torch.cat(out[::-1], 1),
}
