"""spread: apply row-wise operations to the parts of a concatenation, where less is left of each than came in.

    y = linear(cat([h0, h1], 1), W)          t0 = argmax(linear(h0, W), -1)
    t = argmax(y, -1)                   =>   t1 = argmax(linear(h1, W), -1)
                                             t  = cat([t0, t1], 1)

So a head over all segments runs segment by segment as they leave, and their hidden states and logits need not
be held until the last one is there.  Where the result is as large as what it is made of, nothing is gained
and the graph stays as it is.

requires: what `stream` gives.
ensures:  the same values up to the rounding of kernels that run on other sizes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from rmtcompile.passes.flat.functionalise import overload_name
from rmtcompile.passes.flat.store_forwarding.joins import parts_of
from rmtcompile.passes.flat.store_forwarding.nodes import shape_of, val_of
from rmtcompile.passes.flat.store_forwarding.ranges import Range
from rmtcompile.passes.flat.store_forwarding.rewrite import deep_recursion
from rmtcompile.passes.flat.stream import Dims, Streamer, aten, passed_on


def spread(gm: fx.GraphModule, inside: Callable[[fx.Node], bool]) -> fx.GraphModule:
    """Move concatenations down past row-wise operations; see the module docstring.

    Args:
        inside: whether a node belongs to a layer's call.

    Returns:
        A new module, or the same object if there is nothing to do.
    """
    with deep_recursion():
        return _Spreader(gm, inside).run()


class _Spreader(Streamer):
    """What comes out of a region of row-wise operations becomes a concatenation of loads of itself."""

    def _visit(self, node: fx.Node) -> None:
        known = parts_of(node) if overload_name(node) == "cat" and not self.inside(node) else None
        if known is None:
            return
        parts, at = known
        region = self._region(node, at)
        exits = [n for n in region if any(user not in region for user in n.users)]
        if not is_worth(region, exits):
            return
        self.partial.update(dict.fromkeys(region.items(), True))
        for out in exits:
            self.here = out
            pieces, lo = [], 0
            for size in (shape_of(part)[at] for part in parts):
                pieces.append(self.load(out, region[out], Range(lo, size)))
                lo += size
            self._replace(out, self.join(aten.cat.default, pieces, region[out]))

    def _region(self, cat: fx.Node, at: int) -> Dims:
        """The row-wise operations on a concatenation, each with the dimension that is concatenated.

        An operation that reads anything else of the concatenation (its norm, itself transposed) needs all
        parts before it can run on one.
        """
        region, reached = {cat: at}, {cat}
        if not any(self._row(user, [cat], region) is not None for user in cat.users):
            return region
        node = cat.next
        while node.op != "root":
            if operands := [operand for operand in node.all_input_nodes if operand in reached]:
                reached.add(node)
                if (row := self._row(node, operands, region)) is not None:
                    region[node] = row
            node = node.next
        return region

    def _row(self, node: fx.Node, operands: list[fx.Node], region: Dims) -> int | None:
        """The dimension of a node that is, index by index, the one of the region in all of these operands: so
        no further join along it, nor a reshape that cuts it."""
        if self.inside(node) or node in self.pinned or not all(operand in region for operand in operands):
            return None
        length = shape_of(operands[0])[region[operands[0]]]
        found = [set(passed_on(node, operand, region[operand])) for operand in operands]
        return next((d for d in sorted(set.intersection(*found)) if shape_of(node)[d] == length), None)


def is_worth(region: Dims, exits: list[fx.Node]) -> bool:
    """Whether what comes out is at most half as large as something on the way."""
    size = {node: val_of(node).numel() * val_of(node).element_size() for node in region}
    return next(iter(region)) not in exits and 2 * sum(size[out] for out in exits) <= max(size.values())
