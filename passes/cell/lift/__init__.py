"""Lift: rewrite the graph of one cell so that it computes n cells at once over a new leading axis.

    cell(h[B,T,D], w[E,D], mask[T,T])                     lifted(h[n,B,T,D], w[n,E,D], mask[T,T])
      y = linear(h, w)                                      x = reshape(h, [-1, B*T, D])
                                          ->                t = transpose(w, 1, 2)
                                                            b = bmm(x, t)
                                                            y = reshape(b, [-1, B, T, E])

Requires: a functional graph of aten operations, each tensor node with meta `val` of known sizes.
Ensures: for every n >= 1 the lifted graph gives what stacking the results of n cells would; values that
depend on no batched placeholder are computed once, without the axis.  n is nowhere in the graph: sizes use
-1, or `aten.sym_size.int` at run time.

`rules.RULES` is the table from operation to batching rule.  Rules by family: `algebra` (linear, matmul,
einsum, attention, convolution), `shapes` (views, dims, indexing, reductions), `elementwise` (pointwise,
norms, embedding).  Pointwise operations are recognised by their tag; everything else goes through `vmapped`,
or `cell_by_cell` where that cannot be. What has to do with values that grow with the segment is in `growing`.
"""

from __future__ import annotations

from rmtcompile.passes.cell.lift.fallback import cell_by_cell, vmapped
from rmtcompile.passes.cell.lift.growing import SEGMENTS, each_cell, grouped_attention, stack_cells
from rmtcompile.passes.cell.lift.walk import Lifted, lift

__all__ = [
    "SEGMENTS", "Lifted", "cell_by_cell", "each_cell", "grouped_attention", "lift", "stack_cells", "vmapped"
]  # fmt: skip
