"""A load climbs through the producers of its operand until it meets what was stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from rmtcompile.ir.segmentation import Cuts
from rmtcompile.passes.flat.functionalise import overload_name
from rmtcompile.passes.flat.store_forwarding.builder import Builder
from rmtcompile.passes.flat.store_forwarding.nodes import View, as_load, is_static_tensor, shape_of
from rmtcompile.passes.flat.store_forwarding.ranges import Range

aten = torch.ops.aten

HELD, LISTED = "held", "listed"
"""Forms of windows, see `forward_stores`."""

# What a load of range `r` of dimension `d` of a node gives, if it can be had without this node; else None.
Rule = Callable[["Loads", fx.Node, int, Range], fx.Node | None]


class Loads(Builder):
    """Loads, by rules of what they meet.

    Args:
        rules: by name of operation.
        windows, cuts: see `forward_stores`.
    """

    def __init__(
        self, gm: fx.GraphModule, rules: dict[str, Rule], windows: str = "", cuts: Cuts | None = None
    ) -> None:
        super().__init__(gm)
        inputs = {str(node.target): node for node in self.graph.nodes if node.op == "placeholder"}
        self._cuts = [(dim, shape_of(inputs[name])[dim], n) for name, (dim, n) in (cuts or {}).items()]
        self.rules = rules
        self.holds, self.lists = windows == HELD, windows == LISTED
        self.memo: dict[Any, fx.Node | None] = {}

    def load(self, x: fx.Node, d: int, r: Range) -> fx.Node:
        """The value of a load: what was stored, or the load itself."""
        found = self.try_load(x, d, r)
        return self.take(x, d, r) if found is None else found

    def try_load(self, x: fx.Node, d: int, r: Range) -> fx.Node | None:
        """The value of a load, if it can be had without this load of this operand; else None."""
        if not r.drop and r.n == shape_of(x)[d]:
            return x
        if not r.n or x in self.pinned or not is_static_tensor(x) or 0 in shape_of(x):
            return None
        key = (x, d, r, repr(self.here.meta.get("scope")), self.grad is False)
        if key not in self.memo:
            view = as_load(x)
            rule = self.rules.get(overload_name(x))
            found = None
            if view is not None:
                found = self._load_load(view, d, r)
            elif rule is not None and x.op == "call_function":
                found = rule(self, x, d, r)
            # What was computed without gradients has none; the stored value itself may have.
            if found is not None and (overload_name(x) == "detach" or not self.is_open(x)):
                found = self.emit(aten.detach.default, found)
            self.memo[key] = found
        return self.memo[key]

    def _is_segment(self, view: View) -> bool:
        """Whether a view shows one segment of an input, or of what is as long."""
        r, size = view.range, shape_of(view.source)[view.dim]
        for dim, whole, length in self._cuts:
            if (dim, whole) == (view.dim, size) and r.step == 1 and not r.drop and r.lo % length == 0:
                if r.n == length or (r.lo + r.n == size and r.n < length):
                    return True
        return False

    def _load_load(self, view: View, d: int, r: Range) -> fx.Node | None:
        inner, at = view.range, view.dim
        if inner.drop:
            below = d + (d >= at)
            found = self.try_load(view.source, below, r)
            return None if found is None else self.load(found, at - (r.drop and below < at), inner)
        if d == at:
            both = Range(inner.at(r.lo), r.n, inner.step * r.step, r.drop)
            found = self.try_load(view.source, d, both)
            if found is None and self._is_segment(view):
                return None  # a position in the segment: the same one in each
            return self.take(view.source, d, both) if found is None else found
        found = self.try_load(view.source, d, r)
        return None if found is None else self.load(found, at - (r.drop and d < at), inner)
