"""What batching rules build with: values with or without the axis, and a builder that emits lifted nodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rmtcompile.ir.fakes import computed
from rmtcompile.ir.modes import contexts

aten = torch.ops.aten
_OF_VALUE = ("val", "tensor_meta", "example_value")
EXAMPLE_N = 2  # number of cells in meta `val` of lifted nodes; the graph itself runs for any number


@dataclass(frozen=True)
class Value:
    """A value of the cell inside the lifted graph.

    Attributes:
        node: the lifted node (or nodes, or a plain number).
        batched: whether the value has the axis in front.
        cell: fake value of one cell, without the axis; its shape is what rules reason with.
        grows: whether it is a tuple of one value a cell (`growing.py`) instead.
    """

    node: Any
    batched: bool
    cell: Any
    grows: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in one cell."""
        return tuple(int(size) for size in self.cell.shape)

    @property
    def rank(self) -> int:
        """Number of dims in one cell."""
        return int(self.cell.dim())

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        dtype: torch.dtype = self.cell.dtype
        return dtype


@dataclass(frozen=True)
class Call:
    """One operation of the cell whose operands are lifted.

    Attributes:
        node: the node of the cell.
        op: its operation.
        args: every argument of the operation's schema by name, defaults included; tensors as `Value`.
        given: names of the arguments that the node passes itself.
    """

    node: fx.Node
    op: Any
    args: dict[str, Any]
    given: frozenset[str]

    @property
    def out(self) -> Any:
        """Fake result of one cell."""
        return self.node.meta["val"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result of one cell."""
        return tuple(int(size) for size in self.out.shape)

    @property
    def values(self) -> list[Value]:
        """All tensor operands in schema order, those inside lists included."""
        return list(values_in(list(self.args.values())))

    def arguments(self, changes: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of the same call with some of them replaced."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for i, argument in enumerate(self.op._schema.arguments):
            name = argument.name
            if name not in changes and name not in self.given:
                continue
            value = changes[name] if name in changes else self.args[name]
            if argument.kwarg_only or len(args) < i:
                kwargs[name] = value
            else:
                args.append(value)
        return args, kwargs


Rule = Callable[["Builder", Call], Any]  # gives a lifted node, or a tuple of them; all have the axis


def values_in(argument: Any) -> Iterator[Value]:
    """The `Value`s inside nested lists, tuples and dicts, in order."""
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from values_in(item)
    elif isinstance(argument, dict):
        yield from values_in(list(argument.values()))


def replaced(argument: Any, swap: Callable[[Any], Any]) -> Any:
    """The same nesting of lists, tuples and dicts with `swap` applied to everything else."""
    if isinstance(argument, list | tuple):
        return type(argument)([replaced(item, swap) for item in argument])
    if isinstance(argument, dict):
        return {key: replaced(item, swap) for key, item in argument.items()}
    if isinstance(argument, slice):
        return slice(*(swap(item) for item in (argument.start, argument.stop, argument.step)))
    return swap(argument)


def bind(node: fx.Node, op: Any, args: Any, kwargs: Any) -> Call:
    """The arguments of an operation by schema name; `node` is what it stands for in the cell."""
    bound: dict[str, Any] = {}
    given = set()
    for i, argument in enumerate(op._schema.arguments):
        if not argument.kwarg_only and i < len(args):
            bound[argument.name] = args[i]
            given.add(argument.name)
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
            given.add(argument.name)
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return Call(node, op, bound, frozenset(given))


class Builder:
    """Emits nodes of the lifted graph, each with the meta of the node it comes from and an example `val`."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.graph = fx.Graph()
        self.mode = mode
        self.source: fx.Node | None = None
        self.reference: fx.Node | None = None
        self._n: fx.Node | None = None

    def emit(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """Add one call; operands may be nodes or `Value`s."""
        args, kwargs = replaced((args, kwargs), lambda a: a.node if isinstance(a, Value) else a)
        ops = [x for x in (*args[:1], target) if isinstance(x, torch._ops.OpOverload)]  # vmapped(op, ...)
        name = ops[0]._opname if ops else getattr(args[0], "name", _last_word(target))
        assert self.source is not None
        examples = replaced((args, kwargs), lambda a: a.meta["val"] if isinstance(a, fx.Node) else a)
        with contexts(self.source):
            val = computed(self.mode, target, *examples)  # what fails here leaves no node
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta = inherited(self.source) | {"val": val}
        return node

    def again(self, call: Call, /, **changes: Any) -> fx.Node:
        """The same call on the lifted operands, with some arguments replaced."""
        args, kwargs = call.arguments(changes)
        return self.emit(call.op, *args, **kwargs)

    def refake(self, value: Any) -> Any:
        """The fake value inside this builder's mode."""
        if not isinstance(value, torch.Tensor):
            return replaced(value, self.refake) if isinstance(value, list | tuple) else value
        if isinstance(value, FakeTensor) and value.fake_mode is self.mode:
            return value
        with self.mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    def n(self) -> fx.Node:
        """The number of cells, read at run time."""
        if self._n is None:
            self._n = self.emit(aten.sym_size.int, self.reference, 0)
        return self._n

    def reshape(self, node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
        """Reshape to [n, *shape]; the leading size is -1 unless an empty dim makes that ambiguous."""
        if tuple(node.meta["val"].shape) == (EXAMPLE_N, *shape):
            return node
        return self.emit(aten.reshape.default, node, [-1 if math.prod(shape) else self.n(), *shape])

    def folded(self, node: fx.Node) -> fx.Node:
        """Fold the axis into the cell's first dim: [n, B, ...] to [n * B, ...]."""
        return self.emit(aten.flatten.using_ints, node, 0, 1)

    def spread(self, value: Value) -> fx.Node:
        """The value with the axis: a value that all cells share is expanded, without a copy."""
        if value.batched:
            node: fx.Node = value.node
            return node
        return self.emit(aten.expand.default, value, [self.n(), *value.shape])

    def spread_as_value(self, value: Value) -> Value:
        """`spread`, as a value."""
        return Value(self.spread(value), True, value.cell)

    def aligned(self, value: Value, rank: int) -> fx.Node:
        """The value ready to broadcast in cells of `rank` dims: singleton dims go right behind the axis."""
        node: fx.Node = value.node
        if value.batched:
            for _ in range(rank - value.rank):
                node = self.emit(aten.unsqueeze.default, node, 1)
        return node


def _last_word(function: Callable[..., Any]) -> str:
    """A name for what a function gives: `attention` of `grouped_attention`."""
    return function.__name__.rpartition("_")[2]


def inherited(node: fx.Node) -> dict[str, Any]:
    """Meta for the lifted nodes of a cell's node: all of it but what describes the value."""
    return {key: item for key, item in node.meta.items() if key not in _OF_VALUE}
