"""Parts: layers that are written as several modules in turn, taken together where a state goes from a later
one to an earlier one.

    for attention, mlp in self.layers:          cell (s, 0)  layers.0.0 + layers.0.1
        x = x + x @ memory[l]                   cell (s, 1)  layers.1.0 + layers.1.1
        x = x + attention(x)                ->
        x = x + mlp(x)                          memory[0] goes from cell (s, 0) to cell (s + 1, 0)
        memory[l] = memory[l] + f(x)

With each module as a layer, memory would go from layer 1 to layer 0: level 2s + l, on which modules of
different code lie. Modules of one code, however many in a row, are layers by themselves.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import fx

from rmtcompile.passes.grid.partition.place import cells_of, cells_read
from rmtcompile.passes.grid.partition.regions import CELL, Layers, Region


def period_of_parts(region: dict[fx.Node, Region], scoped: Layers) -> int:
    """After how many layers what they do repeats; 1 where all are alike, or where nothing repeats.

    What lies before the first layer or behind the last one may be its own in the others: of these two, calls
    alone are compared.
    """
    calls: dict[int, list[Any]] = defaultdict(list)
    all_of: dict[int, list[Any]] = defaultdict(list)
    segment = min(1, max(at.segment for at in region.values()))
    for node, at in region.items():
        if at.kind == CELL and at.segment == segment:
            all_of[at.layer].append(node.target)
            if cells_of(node, scoped):
                calls[at.layer].append(node.target)
    n = len(scoped.paths)

    def alike(a: int, b: int) -> bool:
        return calls[a] == calls[b] and (a == 0 or b == n - 1 or all_of[a] == all_of[b])

    fit = (p for p in range(1, n // 2 + 1) if n % p == 0 and all(alike(l - p, l) for l in range(p, n)))
    return next(fit, 1)


def skew_of(region: dict[fx.Node, Region]) -> int:
    """How many levels later a segment starts than the one before it."""
    reads, skew = cells_read(region, region), 1
    for node, at in region.items():
        if at.kind == CELL:
            earlier = [(at.segment - s, layer) for s, layer in reads[node] if s < at.segment]
            skew = max([skew, *(-(-(1 + layer - at.layer) // back) for back, layer in earlier)])
    return skew


def joined(layers: Layers, period: int) -> Layers:
    """Layers of `period` parts each."""
    names = [" + ".join(layers.paths[i : i + period]) for i in range(0, len(layers.paths), period)]
    calls = {call: (s, l // period) for call, (s, l) in layers.cell_of_call.items()}
    nodes = {node: (s, l // period) for node, (s, l) in layers.cell_of_node.items()}
    return Layers(tuple(names), calls, nodes)


__all__ = ["joined", "period_of_parts", "skew_of"]
