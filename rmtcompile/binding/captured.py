"""Captured: what a captured forward is: a flat graph, the tensors and the module calls behind it, what it
returns and what it leaves behind in its model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from rmtcompile.binding.kinds import is_plain
from rmtcompile.binding.objects import Path, get
from rmtcompile.binding.state import Change
from rmtcompile.binding.trees import Spec
from rmtcompile.binding.watch import ModuleGuard
from rmtcompile.ir.randomness import is_random


@dataclass(frozen=True)
class Call:
    """One call of a module during the forward.

    Attributes:
        index: position among all calls.
        path: module path, e.g. `memory_cell.model.layers.3`.
        module: identity of the module (two paths may name one module).
        parent: index of the call inside which this one was made, or None.
    """

    index: int
    path: str
    module: int
    parent: int | None


@dataclass(frozen=True)
class Leaf:
    """A tensor that the graph reads but does not compute: a parameter, a buffer, a state attribute, a
    constant.

    `holder`/`key` say where the model keeps it (`holder[key]` or `holder.key`), or `way` does from the module
    `holder` on; a constant has no holder and is kept here.

    Attributes:
        ties: other places where the model keeps the same tensor.
        kind: shape, dtype, device and layout at capture; `module.to` changes those of a parameter.
    """

    name: str
    tensor: torch.Tensor
    holder: Any = None
    key: Any = None
    way: Path = ()
    ties: tuple[Leaf, ...] = ()
    kind: tuple[Any, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        kind = self.tensor.shape, self.tensor.dtype, self.tensor.device, self.tensor.layout
        object.__setattr__(self, "kind", kind)

    @property
    def is_constant(self) -> bool:
        return self.holder is None

    def fetch(self) -> torch.Tensor:
        """The tensor that the model holds now (it may have been swapped since capture)."""
        if self.holder is None:
            return self.tensor
        if self.way:
            value = self.holder
            for step in self.way:
                value = get(value, step)
            return value
        fields = self.holder if isinstance(self.holder, (dict, list)) else self.holder.__dict__
        return fields[self.key]

    def fits(self) -> bool:
        """Whether the model still holds a tensor of this kind, in all places where it was the same one."""
        try:
            now = self.fetch()
            if any(tie.fetch() is not now for tie in self.ties):
                return False
            if (now.shape, now.dtype, now.device, now.layout) != self.kind:
                return False
        except (LookupError, AttributeError, TypeError, RuntimeError):  # nested: no shape
            return False
        return type(now) is type(self.tensor) or is_plain(now)


@dataclass(frozen=True)
class Effect:
    """One value that the forward leaves behind in the model.

    `spec` rebuilds the value from `leaves`; an integer leaf stands for that output of the graph, wrapped in
    `Out`. `in_place` is set where the forward writes into an existing tensor instead of replacing it.
    """

    change: Change | None
    name: str
    spec: Spec
    leaves: tuple[Any, ...]
    in_place: Leaf | None = None


@dataclass(frozen=True)
class Out:
    """Stands, among the leaves of a result, for output number `index` of the graph."""

    index: int


@dataclass
class Capture:
    """A captured forward.

    Attributes:
        module: functional FX graph; placeholders are the tensor leaves of (args, kwargs) in pytree order; the
            output is a flat tuple of tensors. Every node has meta `val` (fake tensor), `scope` (tuple of call
            indices), `source` ("file:line") and `context` (contexts to run it in). What autocast converts,
            the graph converts.
        leaves: by the name of the `get_attr` target.
        calls: module calls in the order of the forward.
        result: leaves and spec of the forward's result.
        effects: what the forward leaves behind.
        roots: the modules that the forward reaches, by name.
        guard: the Python state that the forward read.
        read: the tensors that decided numbers which the forward read.
        checkpoint: where the forward asks first that backward computes a part of it again, as "file:line".
        ignored: what the forward switches on and no program does, in words.
        by_layout: what the forward gives in another way for inputs that lie in memory in another way, as
            "file:line"; empty where nothing does.
    """

    module: fx.GraphModule
    leaves: dict[str, Leaf]
    calls: list[Call]
    result: tuple[tuple[Any, ...], pytree.TreeSpec]
    effects: list[Effect]
    roots: dict[str, nn.Module]
    guard: ModuleGuard
    read: list[Leaf]
    checkpoint: str = ""
    ignored: tuple[str, ...] = ()
    by_layout: str = ""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def outputs(self) -> list[fx.Node]:
        """What the graph returns."""
        found: list[fx.Node] = []
        fx.node.map_arg(self.graph.output_node().args, found.append)
        return found

    @property
    def extent(self) -> Extent:
        """What is kept of it without its graph."""
        values = [leaf for node in self.graph.nodes for leaf in pytree.tree_leaves(node.meta.get("val"))]
        types = frozenset(value.dtype for value in values if isinstance(value, torch.Tensor))
        draws = any(node.op == "call_function" and is_random(node) for node in self.graph.nodes)
        outputs = tuple(node.meta.get("val") for node in self.outputs)
        return Extent(len(self.graph.nodes), types, outputs, draws)


@dataclass(frozen=True)
class Extent:
    """What is known of a capture whose graph is not kept.

    Attributes:
        nodes: how many its graph had.
        types: of all its values.
        outputs: fake tensors of what it returned, in order.
        draws: whether it drew random numbers.
    """

    nodes: int
    types: frozenset[torch.dtype]
    outputs: tuple[Any, ...]
    draws: bool
