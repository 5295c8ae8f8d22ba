"""Optimise: the passes that pay, on the graphs of the cells and on where their results are stored.

None drops or reorders a value; `cast_weights` and `in_place` are exact, the others may pick kernels that
round differently.
"""

from __future__ import annotations

from dataclasses import replace

from rmtcompile.ir.program import Group, Port, Program
from rmtcompile.passes.cell.cast_weights import cast_weights
from rmtcompile.passes.cell.causal import causal
from rmtcompile.passes.cell.fuse_linears import fuse_linears
from rmtcompile.passes.cell.grouped_query import grouped_query
from rmtcompile.passes.cell.in_place import in_place
from rmtcompile.passes.cell.thin_products import thin_products

PASSES = ("causal", "cast_weights", "grouped_query", "fuse_linears", "thin_products", "in_place")

FOR_COMPILED_CELLS = frozenset({"thin_products", "open_attention"})
"""Passes that pay only where cells are compiled; `open_attention` is one on cells of free sizes."""


def optimise(program: Program, switched_off: frozenset[str] = frozenset()) -> Program:
    """Apply the passes that are not switched off."""
    if "causal" not in switched_off:
        program = causal(program)
    groups = tuple(_optimised(group, switched_off) for group in program.groups)
    if not all(new is old for new, old in zip(groups, program.groups, strict=True)):
        program = replace(program, groups=groups)
    return program if "in_place" in switched_off else in_place(program)


def _optimised(group: Group, switched_off: frozenset[str]) -> Group:
    graph = group.graph
    weights = {port.name: port.source for port in group.ports if port.role == "weight"}
    fused = weights
    if "cast_weights" not in switched_off:
        graph, fused = cast_weights(graph, weights)  # type: ignore[assignment]
    if "grouped_query" not in switched_off:
        graph = grouped_query(graph)
    if "fuse_linears" not in switched_off:
        graph, fused = fuse_linears(graph, fused)  # type: ignore[assignment]
    if "thin_products" not in switched_off:
        graph = thin_products(graph)
    if graph is group.graph:
        return group
    names = [node.name for node in graph.nodes if node.op == "placeholder"]
    others = {port.name: port for port in group.ports if port.role != "weight"}
    ports = tuple(others[name] if name in others else Port(name, "weight", fused[name]) for name in names)
    return replace(group, graph=graph, ports=ports)
