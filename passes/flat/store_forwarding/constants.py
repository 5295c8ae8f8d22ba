"""Integers that are known before anything runs: lists written out in the model's code, `arange`, and what is
computed from them."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from rmtcompile.passes.flat.functionalise import is_mutating, overload_name
from rmtcompile.passes.flat.store_forwarding.builder import Builder
from rmtcompile.passes.flat.store_forwarding.nodes import is_static_tensor, operand_of, val_of
from rmtcompile.passes.flat.store_forwarding.ranges import Range

_INTEGERS = (torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_MOST = 1 << 16


def literal(w: Builder, node: Any) -> torch.Tensor | None:
    """The value of a tensor literal: what passed `lift_fresh` was written out in the model's code."""
    lifted = False
    while isinstance(node, fx.Node) and node.op == "call_function":
        if overload_name(node) not in ("lift_fresh", "lift_fresh_copy", "detach", "clone", "alias"):
            return None
        lifted = lifted or overload_name(node).startswith("lift_fresh")
        node = operand_of(node)
    if not lifted or not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = reduce(getattr, str(node.target).split("."), w.gm)
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or value.is_meta:
        return None
    return value


def integers(w: Builder, node: Any) -> torch.Tensor | None:
    """The integers that a node gives at each call, if they depend on no input and no parameter; on the
    CPU."""
    known: dict[fx.Node, torch.Tensor | None] = {}

    def value(x: fx.Node) -> torch.Tensor | None:
        if x not in known:
            known[x] = computed(x)
        return known[x]

    def computed(x: fx.Node) -> torch.Tensor | None:
        if not is_static_tensor(x) or val_of(x).dtype not in _INTEGERS or val_of(x).numel() > _MOST:
            return None
        if x.op != "call_function" or overload_name(x).startswith("lift_fresh"):
            written = literal(w, x)
            return None if written is None else written.cpu()
        tags = getattr(x.target, "tags", ())
        if not overload_name(x) or is_mutating(x) or torch.Tag.nondeterministic_seeded in tags:
            return None
        operands = {operand: value(operand) for operand in x.all_input_nodes}
        if any(operand is None for operand in operands.values()):
            return None
        args, given = map_arg((x.args, x.kwargs), operands.__getitem__)
        kwargs = dict(given)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        assert callable(x.target)
        found = x.target(*args, **kwargs)
        return found if isinstance(found, torch.Tensor) else None

    return value(node) if isinstance(node, fx.Node) else None


def positions(w: Builder, node: Any, size: int) -> Range | None:
    """The evenly spaced positions, in order, that an index names in a dimension of `size`, if they are
    known."""
    found = integers(w, node)
    if found is None or found.dtype == torch.bool or found.dim() != 1 or not found.numel():
        return None
    places = [int(i) % size if -size <= i < size else -1 for i in found.tolist()]
    step = places[1] - places[0] if len(places) > 1 else 1
    if step < 1 or places[0] < 0 or places != list(range(places[0], places[0] + len(places) * step, step)):
        return None
    return Range(places[0], len(places), step)
