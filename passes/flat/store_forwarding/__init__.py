"""Store forwarding: let every load read the value that was stored, past the glue that keeps values together.

    st1 = select_scatter(st0, a, 0, 0)       st1 = select_scatter(st0, a, 0, 0)
    st2 = select_scatter(st1, b, 0, 1)  =>   st2 = select_scatter(st1, b, 0, 1)
    y   = select(st2, 0, 0)                  y   = a

requires: a functional graph (see `functionalise`) with `meta["val"]` on its nodes.
ensures:  every value is the same value, element by element; a dependence that ran through a stack, a
          concatenation, a roll or a state tensor runs from the stored value to its load.  Layouts may change:
          strides in `meta["val"]` are kept true, and a `view` that is no longer valid becomes a `reshape`.

A *load* keeps some indices of one dimension (`select`, `slice`, `unbind`, `split`...).  It moves up through
the producers of its operand, dimension by dimension, until it meets what was stored; if it meets nothing, it
stays where it is.  Graph order is topological, so one walk reaches the fixed point.

A window of the last few segments is joined, cut and joined again. Where its parts are read, a segment reads
what several segments back have stored, and the first ones, while it fills up, differ from each other. Two
other forms of windows are for what that gives no rules for, or a longer schedule:

    m1 = slice(cat([m0, a]), 1, -2)     held     m2 = slice(cat([m1, b]), 1, -2)     a carry, as it is written
    y  = cat([m1, b])                   listed   y = cat([slice(m0), a, b])          nothing reads m1

ranges.py    what a load keeps of a dimension;  nodes.py  loads in normal form, reshapes, permutations
builder.py   makes nodes;  loads.py  a load climbs, by the rule of what it meets
shapes.py    copies, views, permutations, reshapes;  joins.py  stacks, rolls, gathers;  stores.py  scatters
constants.py integers that are known
layouts.py   strides after the rewrite;  rewrite.py  the walk
"""

from __future__ import annotations

from rmtcompile.passes.flat.store_forwarding.loads import HELD, LISTED
from rmtcompile.passes.flat.store_forwarding.ranges import blocks as _blocks
from rmtcompile.passes.flat.store_forwarding.rewrite import forward_stores

__all__ = ["HELD", "LISTED", "_blocks", "forward_stores"]
