"""Loosened cells: where what a cell reads grows from segment to segment, its sizes are integers to be fitted.

    cell (1, l)  k = cat([k0, new], 2)   [B, H, 16, D]
    cell (2, l)  k = cat([k1, new], 2)   [B, H, 24, D]     ->   class later:  k = cat([k, new], 2)   8 * s + 8
    cell (3, l)  k = cat([k2, new], 2)   [B, H, 32, D]

The bodies of such cells are equal up to their integers: those among the arguments of operations, and the
sizes of all values. Each has to be an affine function of the segment alone, and no size may shrink.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rmtcompile.errors import RerollError
from rmtcompile.ir.program import Body, Source
from rmtcompile.passes.flat.value_numbering import key_of
from rmtcompile.passes.grid.partition import CELL
from rmtcompile.passes.grid.reroll.rules import Classes, ClassRule
from rmtcompile.passes.grid.reroll.unrolled import Key, Unrolled, period_of, region_name


def loosened(unrolled: Unrolled, layers: Collection[int]) -> Unrolled:
    """The same capture with integers instead of sizes in the cells of these layers."""
    bodies = {
        region: _loose(body) if region.kind == CELL and region.layer in layers else body
        for region, body in unrolled.bodies.items()
    }
    return replace(unrolled, bodies=bodies)


def period_of_growing(unrolled: Unrolled, longest: int) -> int:
    """The same as `period_of` where cells grow."""
    written = {
        region: _loose(body) if region.kind == CELL else body for region, body in unrolled.written.items()
    }
    return period_of(replace(unrolled, written=written), longest)


def _loose(body: Body) -> Body:
    index = {node: i for i, node in enumerate(body.nodes)}
    places = {node: j for j, node in enumerate(_live_ins(body.nodes, index))}
    ints: list[int] = []

    def encode(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("n", index[value]) if value in index else ("x", places[value], _kind(value))
        if isinstance(value, (list, tuple)):
            return (type(value).__name__, *map(encode, value))
        if isinstance(value, dict):
            return ("dict", *((k, encode(v)) for k, v in value.items()))
        if type(value) is int:
            ints.append(value)
            return ("int",)
        return key_of(value)

    rows = [
        (node.target, encode(node.args), encode(node.kwargs), node.meta.get("context", ()), _kind(node))
        for node in body.nodes
    ]
    sizes = [n for node in (*body.nodes, *places) for n in _sizes(node.meta.get("val"))]
    lender = _loose(body.lender) if body.lender is not None else None
    return replace(body, key=("loose", *rows), ints=(*ints, *sizes), lender=lender)


def _live_ins(nodes: Sequence[fx.Node], index: dict[fx.Node, int]) -> list[fx.Node]:
    """What the operations read from outside, in order of first use."""
    return list(dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in index))


def _kind(node: fx.Node) -> Any:
    """Number of dims, type and place of a value, or of each in a tuple of them."""

    def visit(val: Any) -> Any:
        if isinstance(val, torch.Tensor):
            return (val.dim(), val.dtype, val.device)
        return tuple(map(visit, val)) if isinstance(val, (list, tuple)) else None

    return visit(node.meta.get("val"))


def _sizes(val: Any) -> Iterator[int]:
    if isinstance(val, torch.Tensor):
        yield from map(int, val.shape)
    elif isinstance(val, (list, tuple)):
        for one in val:
            yield from _sizes(one)


def check_growth(layer: int, rule: ClassRule) -> None:
    """Check that the integers of a loosened cell follow from the segment, and that nothing shrinks.

    Raises:
        RerollError: with the operation.
    """
    of_arguments = sum(len(ints) for ints in rule.integers().values())
    for j, affine in enumerate(rule.ints):
        if affine.by_count or (j >= of_arguments and affine.by_segment < 0):
            raise RerollError(
                f"sizes in layer {layer} do not grow evenly with the segment", [f"one of them is {affine}"]
            )


def check_readers(rules: Mapping[Key, Mapping[int, ClassRule]], classes: Mapping[Key, Classes]) -> None:
    """Check that what grows is read as something that grows, and nothing else is: a window that is full in
    both captures may look as if it went on, and one that a short first segment has filled less.

    Raises:
        RerollError: it is not.
    """
    for key, by_class in rules.items():
        for number, rule in by_class.items():
            for node, live_in in zip(rule.body.live_ins, rule.sources, strict=True):
                source = live_in.steady
                if not (isinstance(source, Source) and source.relative and isinstance(node, fx.Node)):
                    continue
                if source.kind != CELL:  # what a prologue cuts for the last segment is shorter, and grows not
                    continue
                made = (source.kind, source.layer)
                index = dict(source.nodes).get(classes[made].head)
                maker = rules[made].get(classes[made].head)
                if index is None or maker is None:
                    continue
                grown = maker.varying.get(maker.body.nodes[index], frozenset())
                read = rule.varying.get(node, frozenset())
                evidence = [f"{node.format_node()}   {node.meta.get('source')}"]
                if not grown <= read:
                    raise RerollError(
                        f"what grows in {region_name(made)} has one size where {region_name(key)} reads it",
                        evidence,
                    )
                if number == classes[key].head and not read <= grown:
                    raise RerollError(
                        f"what grows in {region_name(key)} has one size where {region_name(made)} makes it",
                        evidence,
                    )
