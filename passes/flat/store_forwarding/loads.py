"""A load climbs through the producers of its operand until it meets what was stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

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
        windows: see `forward_stores`.
    """

    def __init__(self, gm: fx.GraphModule, rules: dict[str, Rule], windows: str = "") -> None:
        super().__init__(gm)
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
        if x in self.pinned or not is_static_tensor(x) or 0 in shape_of(x):
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

    def _load_load(self, view: View, d: int, r: Range) -> fx.Node | None:
        inner, at = view.range, view.dim
        if inner.drop:
            below = d + (d >= at)
            found = self.try_load(view.source, below, r)
            return None if found is None else self.load(found, at - (r.drop and below < at), inner)
        if d == at:
            return self.load(view.source, d, Range(inner.at(r.lo), r.n, inner.step * r.step, r.drop))
        found = self.try_load(view.source, d, r)
        return None if found is None else self.load(found, at - (r.drop and d < at), inner)
