"""Gradients of embeddings: one for the whole input, in the place of one for each segment.

    forward     rows of the weight by index, before the rest of a segment's prologue
    backward    gradients of the rows are kept; when all segments have given theirs, one dense gradient

A dense gradient is as large as the vocabulary. One a segment, and adding them, takes 1.4 ms a segment for
128,256 words of width 2048 in bfloat16 (2026-11-28, H100).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

dense_gradient = aten.embedding_dense_backward
_EMBEDDINGS = (aten.embedding, aten.embedding.default)


@dataclass(frozen=True)
class Lookup:
    """One embedding of a function's arguments: the positions of weight and indices, and what else it says."""

    weight: int
    indices: int
    padding_idx: int


@dataclass(frozen=True)
class Divided:
    """A function in two parts.

    Attributes:
        lookups: the embeddings that come first.
        rest: takes the function's arguments, and behind them what these have given.
    """

    lookups: tuple[Lookup, ...]
    rest: Callable[..., Any]


def divided(function: Callable[..., Any]) -> Divided | None:
    """A function whose embeddings of arguments are taken out of it; None where it has none."""
    if "embedding" not in function.__code__.co_names:
        return None
    module = fx.symbolic_trace(function)
    graph = module.graph
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    found: dict[Lookup, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target in _EMBEDDINGS and (lookup := _lookup(node, arguments)) is not None:
            found.setdefault(lookup, []).append(node)
    if not found:
        return None
    for i, nodes in enumerate(found.values()):
        with graph.inserting_after(arguments[-1]):
            given = graph.placeholder(f"looked_up_{i}")
        arguments.append(given)
        for node in nodes:
            node.replace_all_uses_with(given)
            graph.erase_node(node)
    module.recompile()

    def rest(*args: torch.Tensor) -> Any:
        return module(*args)

    rest.__name__ = f"{function.__name__}_of_rows"
    return Divided(tuple(found), rest)


def _lookup(node: fx.Node, arguments: list[fx.Node]) -> Lookup | None:
    names = ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    weight, indices = given["weight"], given["indices"]
    if weight not in arguments or indices not in arguments:
        return None
    if given.get("scale_grad_by_freq") or given.get("sparse"):
        return None  # what they ask for is counted by segment, or is no dense gradient
    return Lookup(arguments.index(weight), arguments.index(indices), given.get("padding_idx", -1))


class Embedded:
    """A weight whose rows segments look up in one run, under gradients.

    Args:
        weight: [words, width].
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._kept: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        self._weight: torch.Tensor = _Whole.apply(weight, self._kept)

    def rows(self, indices: torch.Tensor, padding_idx: int) -> torch.Tensor:
        """Rows by index, [*indices, width]."""
        found: torch.Tensor = _Rows.apply(self._weight, self._kept, indices, padding_idx)
        return found


class _Whole(torch.autograd.Function):
    """The weight itself. Backward makes one gradient of all that lookups have kept."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, kept: list[Any]) -> torch.Tensor:
        ctx.kept, ctx.words = kept, weight.shape[0]
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        assert grad is None  # nothing but lookups reads it
        kept, ctx.kept[:] = list(ctx.kept), []
        total: torch.Tensor | None = None
        for padding in dict.fromkeys(padding for *_, padding in kept):
            of = [(g, indices) for g, indices, other in kept if other == padding]
            grads = torch.cat([g.reshape(-1, g.shape[-1]) for g, _ in of])
            indices = torch.cat([indices.reshape(-1) for _, indices in of])
            found = dense_gradient(grads, indices, ctx.words, padding, False)
            total = found if total is None else total + found
        return total, None


class _Rows(torch.autograd.Function):
    """Rows of the weight. Backward keeps what comes, and hands nothing on itself."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, kept: list[Any], indices: torch.Tensor, padding_idx: int
    ) -> torch.Tensor:
        ctx.kept, ctx.padding_idx = kept, padding_idx
        ctx.save_for_backward(indices)
        ctx.set_materialize_grads(False)
        return aten.embedding(weight, indices, padding_idx)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[None, None, None, None]:
        if grad is not None:
            ctx.kept.append((grad, *ctx.saved_tensors, ctx.padding_idx))
        return None, None, None, None


__all__ = ["Divided", "Embedded", "Lookup", "divided"]
