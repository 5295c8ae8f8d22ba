"""If-conversion: the variants of one layer's cells become one graph, predicated where they differ.

    first:  h = attend(x)                            h0 = x + read(mq(x), A)       computed for all cells
    later:  h = attend(x + read(mq(x), A))     ->    h1 = where(is_first, x, h0)   kept or dropped by cell
                                                     h  = attend(h1)               shared

On a wavefront of the ramp-up one cell belongs to the first segment and the others do not.  Running it by
itself would cost an extra small step a level; predication costs a few operations on one cell.  Selection is
exact: `where` keeps the bits of the operand it picks.  Where a live-in of the first variant is what a carry
holds before its first write (a zero matrix, say), no selection is needed: it becomes the lane's initial
value.

Requires: bodies of one kind of layer, by class.  Ensures: for each class, the merged graph with its mask set
computes what the class's body computes.  Classes whose values differ in shape stay apart (`Group`s of their
own).
Reference: if-conversion; sequence alignment by longest matching blocks.

rows.py       what a merged program consists of;  merging.py  one more class is folded in
matching.py   which operations and live-ins are one;  selection.py  where a selection is exact
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rmtcompile.passes.grid.if_conversion.matching import Rules, are_twins
from rmtcompile.passes.grid.if_conversion.merging import Merged, Merging, class_name
from rmtcompile.passes.grid.if_conversion.rows import CannotMergeError
from rmtcompile.passes.grid.reroll import ClassRule, shape_of

__all__ = ["Merged", "class_name", "if_convert", "ports_key"]


def if_convert(
    rules: Rules, steady: int, others: Sequence[Rules] = (), apart: Sequence[frozenset[int]] = ()
) -> list[Merged]:
    """Merge the classes of one kind, the steady class first; classes that cannot be merged come as graphs of
    their own.

    Args:
        rules: the body of each class, all of one layer.
        steady: the class that most segments belong to.
        others: the same of the other layers of the kind, whose values come from elsewhere.
        apart: pairs of classes that a mask has to tell apart though their bodies are one.
    """

    def are_one(a: int, b: int) -> bool:
        alike = all(are_twins(layer[a], layer[b]) for layer in (rules, *others))
        return alike and frozenset((a, b)) not in apart

    distinct: list[list[int]] = []
    for number in sorted(rules, key=lambda c: (c != steady, c)):
        rule = rules[number]
        same = (known for known in distinct if _body(rules[known[0]]) == _body(rule))
        mine = next((known for known in same if all(are_one(c, number) for c in known)), None)
        if mine is None:
            distinct.append([number])
        else:
            mine.append(number)
    merged: list[Merging] = []
    for numbers in distinct:
        for merging in merged if not rules[numbers[0]].grows else ():
            try:
                merging.fold(numbers)
                break
            except CannotMergeError:
                continue
        else:
            merged.append(Merging(numbers, rules, others))
    return [merging.finish() for merging in merged]


def _body(rule: ClassRule) -> Any:
    """What classes have in common that one function serves."""
    return (rule.body.key, rule.ints, ports_key(rule))


def ports_key(rule: ClassRule) -> Any:
    """Types of a body's live-ins."""
    live_ins: tuple[Any, ...] = rule.body.live_ins
    return tuple(shape_of(node.meta.get("val")) for node in live_ins)
