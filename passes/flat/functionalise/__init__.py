"""functionalise: give a captured graph value semantics, so that no node writes what another node reads.

    v = select(state, 0, 1)            v   = select(state, 0, 1)
    add_(v, x)                   =>    v1  = add(v, x)
    y = mul(state, 2)                  st1 = select_scatter(state, v1, 0, 1)
                                       y   = mul(st1, 2)                          writes = {"state": st1}

requires: a graph of ATen overloads with `meta["val"]` on its nodes, as `make_fx(..., tracing_mode="fake")`
          gives it.
ensures:  no node mutates; every node that stays computes the same bits, with the same shape, dtype and
          strides; what was written into placeholders and attributes is named by `Functional.writes` and
          returned as extra outputs.
refuses:  writes through views without an inverse, operations without a functional form, `set_`, `resize_`.

Which operations view and which write is read off their schemas.  Each tensor is a chain of views of a *base*;
a write goes back through the chain and gives the base a new version; later reads of any view replay its chain
on the newest version.  A replay belongs to its reader, not to the place where the view was first taken: it
carries the reader's metadata, so a view taken in one cell and read in another is no dependence on the first.

nodes.py     what schemas say about a node;  values.py  fake values and their layout
memory.py    bases, views of them, and what Python holds;  views.py  which view a node takes
roots.py     placeholders and attributes that are the same memory
builder.py   makes nodes;  contents.py  reads and writes memory
sources.py   whose memory a result is;  writes.py  in-place operations
rewrite.py   the walk
"""

from __future__ import annotations

from rmtcompile.ir.schema import bind
from rmtcompile.passes.flat.functionalise.nodes import (
    PERMUTES,
    RESHAPES,
    alias_root,
    grad_mode,
    is_mutating,
    is_pointwise,
    is_removable,
    overload_name,
    remove_dead,
    taken_over,
    where,
)
from rmtcompile.passes.flat.functionalise.rewrite import Functional, functionalise
from rmtcompile.passes.flat.functionalise.values import Values, dense_order, same_strides

__all__ = [
    "PERMUTES",
    "RESHAPES",
    "Functional",
    "Values",
    "alias_root",
    "bind",
    "dense_order",
    "functionalise",
    "grad_mode",
    "is_mutating",
    "is_pointwise",
    "is_removable",
    "overload_name",
    "remove_dead",
    "same_strides",
    "taken_over",
    "where",
]
