"""Padded cells: cells of an incomplete last segment at the size of a whole one.

    softmax(scores[n, R + 4, R + 4], -1)   R = 17     ->   R = 32 in every shape, and a tensor `rest` of 17:
                                                           valid = arange(R + 4) < rest + 4
                                                           softmax(where(valid, scores, -inf), -1)

A dim that depends on the rest is as long as for a whole segment, and what the segment has comes first in
it: position i stands where it stood, so that nearly all operations stay as they are. What adds up, compares
or contracts along such a dim does so without what comes after; what is cut or joined behind it moves with
`rest`. So one function of fixed shapes serves all rests: it is compiled once for fixed sizes, and recorded.

Requires: a lifted cell of a program of free sizes (`passes/sizes.py`).  Ensures: the first positions of every
result are those of the cell at that rest, up to rounding; what comes after them is of no use.
Reference: the masks of batches of padded sequences, found operation by operation.
"""

from __future__ import annotations

from torch import fx

from rmtcompile.ir.randomness import is_random
from rmtcompile.passes.cell.padded.builder import REST, Builder, CannotPad
from rmtcompile.passes.cell.padded.rules import padded_node


def padded(graph: fx.Graph, rest: str) -> tuple[fx.Graph, int]:
    """The cell with a first argument `rest` more, an int64 tensor of no dims, and the smallest one that it is
    for.

    Args:
        rest: name of the size that is left over by whole segments.

    Raises:
        CannotPad: an operation has no form of fixed shapes; the message says which.
    """
    builder = Builder(rest, REST)
    for node in graph.nodes:
        if is_random(node):
            raise builder.refused(node, "it draws as many numbers as the segment has")
        if node.op == "placeholder":
            builder.keep(node)
        elif node.op == "output":
            builder.check_results(node)
            builder.graph.output(builder.mapped(node.args[0]))
        elif builder.concerns(node):
            builder.done(node, padded_node(builder, node))
        else:
            builder.keep(node)
        for size in builder.sizes(node):
            builder.needs(size, 0)
    return builder.graph, builder.least


__all__ = ["REST", "CannotPad", "padded"]
