"""Fuse linears: linears that read the same value become one linear on concatenated weights.

    q = linear(x, wq)                       y = linear(x, wq_wk_wv)
    k = linear(x, wk)               ->      q, k, v = split_with_sizes(y, [Q, K, V], -1)
    v = linear(x, wv)

Requires: a functional graph of one cell; `weights` says which leaves make each weight placeholder.
Ensures: same outputs up to rounding (one product may round unlike three); a fused placeholder's `Weight` has,
per layer, the parts of the weights it replaces, in order.  Sound because the rows of a linear's weight are
independent: concatenating weights along dim 0 concatenates results along the last dim.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from rmtcompile.ir.weights import Weight
from rmtcompile.passes.cell.lift.builder import bind

aten = torch.ops.aten


def can_fuse(linear: fx.Node, weights: Mapping[str, Weight]) -> bool:
    """Whether a linear's weight (a matrix) and bias are parameters of this linear alone."""
    _, weight, bias = _operands(linear)
    own = [parameter for parameter in (weight, bias) if parameter is not None]
    if not all(node.op == "placeholder" and node.name in weights and len(node.users) == 1 for node in own):
        return False
    return weight.meta["val"].dim() == 2 and len({weights[node.name].n_layers for node in own}) == 1


def parallel_linears(graph: fx.Graph, weights: Mapping[str, Weight]) -> list[list[fx.Node]]:
    """Groups of two or more linears that may become one; both levels in graph order."""
    groups: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is aten.linear.default and can_fuse(node, weights):
            x, weight, bias = _operands(node)
            parameters = [p for p in (weight, bias) if p is not None]
            made_of = [
                (weights[p.name].n_layers, weights[p.name].dtype, p.meta["val"].dtype) for p in parameters
            ]
            key = (x, *made_of, node.meta.get("context", ()))
            groups.setdefault(key, []).append(node)
    return [group for group in groups.values() if len(group) > 1]


def fuse_linears(graph: fx.Graph, weights: Mapping[str, Weight]) -> tuple[fx.Graph, Mapping[str, Weight]]:
    """Fuse the parallel linears of one cell.

    Args:
        graph: the cell; not modified.
        weights: leaves of each weight placeholder, by the placeholder's name.

    Returns:
        The new graph and weights, or the same objects where nothing is parallel.  In the new graph `view` is
        `reshape`, because the parts of a fused result are not contiguous; meta `val` still shows shapes and
        types, but not the strides.
    """
    if not parallel_linears(graph, weights):
        return graph, weights
    fused = fx.Graph()
    fused.output(fused.graph_copy(graph, {}))
    fused_weights = dict(weights)
    for linears in parallel_linears(fused, weights):
        _fuse(fused, linears, fused_weights)
    for node in fused.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default
    return fused, fused_weights


def _operands(linear: fx.Node) -> tuple[fx.Node, Any, Any]:
    """Input, weight and bias (a node or None)."""
    args = bind(linear, linear.target, linear.args, linear.kwargs).args
    return args["input"], args["weight"], args["bias"]


def _fuse(graph: fx.Graph, linears: Sequence[fx.Node], weights: dict[str, Weight]) -> None:
    """Put one linear in the place of the first; the others become parts of its result."""
    first = linears[0]
    operands = [_operands(linear) for linear in linears]
    sizes = [int(weight.meta["val"].shape[0]) for _, weight, _ in operands]
    parameters = [_concatenated(graph, [weight for _, weight, _ in operands], weights)]
    if operands[0][2] is not None:
        parameters.append(
            _concatenated(graph, [bias for _, _, bias in operands if bias is not None], weights)
        )
    with graph.inserting_before(first):
        whole = _call(graph, first, aten.linear.default, operands[0][0], *parameters)
        split = _call(graph, first, aten.split_with_sizes.default, whole, sizes, -1)
        parts = [_call(graph, linear, operator.getitem, split, i) for i, linear in enumerate(linears)]
    for linear, part, (_, weight, bias) in zip(linears, parts, operands, strict=True):
        linear.replace_all_uses_with(part)
        graph.erase_node(linear)
        for parameter in (weight, bias):
            if parameter is not None:
                graph.erase_node(parameter)


def _concatenated(graph: fx.Graph, nodes: Sequence[fx.Node], weights: dict[str, Weight]) -> fx.Node:
    """A placeholder for several weights, concatenated along dim 0."""
    with graph.inserting_before(nodes[0]):
        placeholder = graph.placeholder(joined([node.name for node in nodes]))
    placeholder.target = placeholder.name  # made unique
    placeholder.meta = nodes[0].meta | {"val": torch.cat([node.meta["val"] for node in nodes])}
    old = [weights.pop(node.name) for node in nodes]
    weights[placeholder.name] = Weight(
        tuple(sum(layer, ()) for layer in zip(*(weight.leaves for weight in old))), old[0].dtype
    )
    return placeholder


def joined(names: Sequence[str]) -> str:
    """One name for several, what they share said once: `attn_q_w, attn_k_w` -> `attn_q_k_w`."""
    words = [name.split("_") for name in names]
    shared = min(map(len, words)) - 1
    start = _common(words, shared)
    end = _common([word[::-1] for word in words], shared - start)
    middles = [part for word in words for part in word[start : len(word) - end]]
    return "_".join([*words[0][:start], *middles, *words[0][len(words[0]) - end :]])


def _common(words: Sequence[Sequence[str]], limit: int) -> int:
    """How many leading parts all words share, `limit` at most."""
    columns = list(zip(*words))[:limit]
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), len(columns))


def _call(graph: fx.Graph, source: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A call that inherits the meta of the node it comes from, with an example value of its own."""
    node = graph.call_function(target, args)
    node.meta = dict(source.meta)
    node.meta["val"] = target(*fx.map_arg(args, lambda operand: operand.meta["val"]))
    return node
