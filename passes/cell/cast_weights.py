"""Cast weights: what cells convert of a weight alone is converted once a run, for all layers at once.

    cell(x, w)                               cell(x, c)      c: w of all layers, as bfloat16
      c = to(w, bfloat16)             ->       y = linear(x, c)
      y = linear(x, c)

A cell runs once a segment; its conversions would read the weights, write them and read them again on each
level. Under autocast the model itself remembers a converted weight until the region ends.

Requires: a functional graph of one cell; `weights` says which leaves make each weight placeholder.
Ensures: same bits; gradients are summed over segments in the dtype that is converted to, as the model sums
them. Reference: loop-invariant code motion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from rmtcompile.ir.weights import Weight

aten = torch.ops.aten


def conversions(graph: fx.Graph, weights: Mapping[str, Weight]) -> list[fx.Node]:
    """The nodes that convert a weight to another dtype, and do nothing else."""
    return [
        node
        for node in graph.nodes
        if node.target is aten.to.dtype
        and len(node.args) == 2
        and not node.kwargs
        and not node.meta.get("context")
        and _converted(node)[0].op == "placeholder"
        and _converted(node)[0].name in weights
    ]


def _converted(cast: fx.Node) -> tuple[fx.Node, torch.dtype]:
    weight, dtype = cast.args
    assert isinstance(weight, fx.Node) and isinstance(dtype, torch.dtype)
    return weight, dtype


def cast_weights(graph: fx.Graph, weights: Mapping[str, Weight]) -> tuple[fx.Graph, Mapping[str, Weight]]:
    """The graph and the weights with placeholders for converted weights; the same objects where none is."""
    if not conversions(graph, weights):
        return graph, weights
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    found = dict(weights)
    made: dict[tuple[str, torch.dtype], fx.Node] = {}
    for node in conversions(new, weights):
        weight, dtype = _converted(node)
        key = (weight.name, dtype)
        if key not in made:
            made[key] = _placeholder(new, weight, node, dtype)
            found[made[key].name] = replace(weights[weight.name], dtype=dtype)
        node.replace_all_uses_with(made[key])
        new.erase_node(node)
    for node in [node for node in new.nodes if node.op == "placeholder" and node.name in weights]:
        if not node.users:
            new.erase_node(node)
            del found[node.name]
    return new, found


def _placeholder(graph: fx.Graph, weight: fx.Node, cast: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A placeholder beside that of the weight itself."""
    with graph.inserting_before(weight):
        node = graph.placeholder(f"{weight.name}_{str(dtype).removeprefix('torch.')}")
    node.target = node.name  # made unique
    node.meta = weight.meta | {"val": cast.meta["val"]}
    return node
