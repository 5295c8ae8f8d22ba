"""Tiles: equal parts of a concatenation, one behind the other, become one part that is repeated.

    cat([p, p, p, p, q], 0)              ->   cat([repeat(p, [4]), q], 0)
    cat([p, q, p, q, p, q], 0)           ->   repeat(cat([p, q], 0), [3])
    stack([p, p, p], 0)                  ->   repeat(unsqueeze(p, 0), [3, 1])

A list that holds one part a segment, where all segments have the same (a mask, positions within a segment),
grows with their number; how often it is repeated is an integer, which follows a rule.

Requires: a value-numbered graph with meta `val`. Ensures: the same values. Two equal parts stay as they are
(rotary tables are made so), and so does what layers compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import fx

from rmtcompile.passes.flat.functionalise import Values, bind, overload_name
from rmtcompile.passes.flat.store_forwarding.nodes import is_static_tensor, shape_of, val_of

aten = torch.ops.aten
_FEWEST = 3


def tiles(module: fx.GraphModule, inside: Callable[[fx.Node], bool]) -> fx.GraphModule:
    """Rewrite every such list; the same object where there is none.

    Args:
        inside: whether a node belongs to a layer's call.
    """
    values, changed = Values(module.graph), False
    for node in list(module.graph.nodes):
        if overload_name(node) not in ("cat", "stack") or inside(node) or not is_static_tensor(node):
            continue
        parts = list(bind(node)["tensors"])
        found = list(repetitions(parts))
        if all(times == 1 for _, times in found):
            continue
        if any(not is_static_tensor(p) or val_of(p).dtype != val_of(node).dtype for p in parts):
            continue
        changed = True
        _Rewriter(values, node).run(found)
    if changed:
        module.recompile()
    return module


def repetitions(parts: Sequence[fx.Node]) -> Iterator[tuple[Sequence[fx.Node], int]]:
    """The parts in order, cut into the shortest pieces that come at least `_FEWEST` times in a row, each with
    how often it comes; what is between them comes once."""
    single: list[fx.Node] = []
    start = 0
    while start < len(parts):
        period, times = _repeated(parts, start)
        if times == 1:
            single.append(parts[start])
            start += 1
            continue
        if single:
            yield single, 1
            single = []
        yield parts[start : start + period], times
        start += period * times
    if single:
        yield single, 1


def _repeated(parts: Sequence[fx.Node], start: int) -> tuple[int, int]:
    """The length of the shortest piece from `start` on that is repeated, and how often it comes."""
    for period in range(1, (len(parts) - start) // _FEWEST + 1):
        end = start + period
        while end < len(parts) and parts[end] is parts[end - period]:
            end += 1
        times = (end - start) // period
        if times >= _FEWEST:
            return period, times
    return 1, 1


class _Rewriter:
    """Writes one list anew, in front of it."""

    def __init__(self, values: Values, node: fx.Node) -> None:
        self.values = values
        self.node = node
        self.is_stack = overload_name(node) == "stack"
        self.dim = bind(node)["dim"] % len(shape_of(node))

    def run(self, found: Sequence[tuple[Sequence[fx.Node], int]]) -> None:
        pieces: list[fx.Node] = []
        for parts, times in found:
            if self.is_stack:
                parts = [self._emit(aten.unsqueeze.default, part, self.dim) for part in parts]
            if times == 1:
                pieces += parts
                continue
            piece = parts[0] if len(parts) == 1 else self._emit(aten.cat.default, list(parts), self.dim)
            often = [times if d == self.dim else 1 for d in range(len(shape_of(self.node)))]
            pieces.append(self._emit(aten.repeat.default, piece, often))
        whole = pieces[0] if len(pieces) == 1 else self._emit(aten.cat.default, pieces, self.dim)
        self.node.replace_all_uses_with(whole)
        self.node.graph.erase_node(self.node)

    def _emit(self, target: torch._ops.OpOverload, *args: object) -> fx.Node:
        with self.node.graph.inserting_before(self.node):
            made = self.node.graph.create_node("call_function", target, args)  # type: ignore[arg-type]
        made.meta = {k: v for k, v in self.node.meta.items() if k != "val"}
        made.meta["val"] = self.values.run(target, args, {})
        return made
