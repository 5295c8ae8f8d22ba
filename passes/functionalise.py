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
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_arg

from rmtcompile.errors import InternalError, UnsupportedError

aten = torch.ops.aten

# fmt: off
# Operations that may hand back their own argument, and then are no computation at all.
_IDENTITY = {
    "to", "contiguous", "type_as", "positive", "resolve_conj", "resolve_neg", "lift_fresh", "cpu", "cuda",
    "data",
}
# Composite operations whose schema does not say that the result may be a view of an argument.
_UNDECLARED = {
    "type_as", "einsum", "broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d",
    "sum_to_size", "data", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout",
    "conj_physical",
}
_RESHAPES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
    "reshape_as", "_reshape_alias", "ravel",
}
_PERMUTES = {"permute", "transpose", "t", "numpy_T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis"}
_STORAGE_OPS = {
    "set_", "resize_", "resize_as_", "set_data", "_resize_output_", "requires_grad_", "resize_as_sparse_",
}
# fmt: on
_PYTHON_WRITES = {operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul}


@dataclass(frozen=True)
class Functional:
    """A graph without writes, and what the original left in its inputs and attributes.

    Attributes:
        module: same placeholders; returns what the original returned if `writes` is empty, and otherwise the
            pair (what the original returned, the list of written values in the order of `writes`).
        writes: for each mutated placeholder or attribute, by name, the node of `module` that holds its final
            content.  Attributes that share a storage are written through the one that covers the others.
    """

    module: fx.GraphModule
    writes: dict[str, fx.Node]


# -- helpers, also for other passes --


def overload_name(node: fx.Node) -> str:
    """`aten.select.int` → "select"; "" for anything that is not an operator overload."""
    target = node.target
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else ""


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by schema name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def is_mutating(node: fx.Node) -> bool:
    """Whether a call writes into an argument."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    return node.target in _PYTHON_WRITES or (
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    )


def is_removable(node: fx.Node) -> bool:
    """Whether a node without users may be deleted: it only computes (no marker, no random number)."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") in (
            "_operator",
            "math",
            "torch.fx.experimental.symbolic_shapes",
        )
    schema = target._schema
    if (
        schema.is_mutable
        or not schema.returns
        or "assert" in schema.name
        or schema.name.startswith("aten::sym_con")
    ):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return True
    bound = bind(node)
    return bound.get("train") is False or bound.get("p") == 0


def remove_dead(graph: fx.Graph) -> int:
    """Deletes computation that nothing uses; gives the number of nodes deleted."""
    dead = [node for node in reversed(graph.nodes) if not node.users and is_removable(node)]
    count = 0
    while dead:
        node = dead.pop()
        sources = node.all_input_nodes
        graph.erase_node(node)
        count += 1
        dead += [source for source in sources if not source.users and is_removable(source)]
    return count


def alias_root(node: fx.Node) -> fx.Node:
    """The node whose memory a node is a view of, as far as schemas tell; itself if it is no view."""
    while node.op == "call_function" and node.all_input_nodes:
        target = node.target
        if target is not operator.getitem:
            if not isinstance(target, torch._ops.OpOverload):
                break
            views = any(
                r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns
            )
            if not views and overload_name(node) not in _UNDECLARED:
                break
        node = node.all_input_nodes[0]
    return node


def where(node: fx.Node) -> str:
    """A node as one line of evidence: its text, and the user's file:line if the capture recorded it."""
    trace = str(node.meta.get("stack_trace") or "").splitlines()
    files = [line.strip() for line in trace if line.strip().startswith("File")]
    return f"{node.format_node()}  {files[-1] if files else ''}".rstrip()


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape have one layout (strides of size-1 dimensions say nothing)."""
    return a.numel() == 0 or all(
        size == 1 or sa == sb for size, sa, sb in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def dense_order(value: torch.Tensor) -> list[int] | None:
    """The dimensions from outermost to innermost if the tensor fills its memory without gap, or None."""
    order = sorted(range(value.dim()), key=lambda d: (value.stride(d), value.size(d)), reverse=True)
    expected = 1
    for d in reversed(order):
        if value.size(d) != 1 and value.stride(d) != expected:
            return None
        expected *= value.size(d)
    return order


class Values:
    """The fake value of each node, all under one mode (captures give constants a mode of their own)."""

    def __init__(self, graph: fx.Graph) -> None:
        modes = [v.fake_mode for n in graph.nodes if isinstance(v := n.meta.get("val"), FakeTensor)]
        calls = [
            v.fake_mode
            for n in graph.nodes
            if n.op in ("placeholder", "call_function") and isinstance(v := n.meta.get("val"), FakeTensor)
        ]
        self.mode = (calls or modes or [FakeTensorMode()])[0]

    def local(self, value: Any) -> Any:
        """The value under our mode."""
        if not isinstance(value, torch.Tensor) or (
            isinstance(value, FakeTensor) and value.fake_mode is self.mode
        ):
            return value
        with self.mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    def run(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What a call on nodes gives, as a fake value."""
        get = lambda n: self.local(n.meta["val"])  # noqa: E731
        with self.mode, torch.no_grad():
            return target(*map_arg(args, get), **map_arg(kwargs, get))


# -- the alias analysis --


@dataclass(frozen=True)
class _Link:
    """One step from a tensor to a view of it; `kind` is an ATen view, in one normal form."""

    kind: str
    args: tuple[Any, ...] = ()
    # for the kind "generic": target, args and kwargs, with _PARENT for the viewed tensor
    call: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None
    grad: bool | None = None


class _Parent:
    """Stands for the viewed tensor in the arguments of a generic link."""


_PARENT = _Parent()


@dataclass(eq=False)
class _Base:
    """Memory: the content of one storage, through its versions."""

    name: str | None = None  # of the placeholder or attribute that it is
    version: int = 0
    tangled: tuple[str, ...] = ()  # other names of overlapping memory that are no view of this one


@dataclass(eq=False)
class _Alias:
    """A view of a base (or the whole of it, if it has no parent)."""

    base: _Base
    val: torch.Tensor
    parent: _Alias | None = None
    link: _Link | None = None
    node: fx.Node | None = None  # the content at `version`
    version: int = 0
    replays: dict[Any, fx.Node] = field(default_factory=dict)

    @property
    def root(self) -> _Alias:
        return self if self.parent is None else self.parent.root


@dataclass(eq=False)
class _Object:
    """One Python tensor: nodes that return their argument share it, `unsqueeze_` and the like change it."""

    alias: _Alias
    external: bool = False


@dataclass(eq=False)
class _Tuple:
    """A node that gives several tensors."""

    node: fx.Node
    items: list[Any]
    versions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.versions = self._now()

    def _now(self) -> list[int]:
        return [i.alias.base.version if isinstance(i, _Object) else 0 for i in self.items]

    @property
    def is_current(self) -> bool:
        return self.versions == self._now()


def _storage(value: Any) -> int | None:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    return value.untyped_storage()._cdata


def _tensors(args: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(args, found.append)
    return found


def _static(shape: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in shape)


def _links(
    node: fx.Node, parent: torch.Tensor, val: torch.Tensor, item: int | None, vals: Sequence[Any]
) -> _Link:
    """The link for a view node, or for one of the views that it gives."""
    target, name, bound = node.target, overload_name(node), bind(node)
    generic = _Link("generic", (item,), (target, node.args, dict(node.kwargs)))
    if not _static(parent.shape) or not _static(val.shape) or parent.dtype != val.dtype:
        return _Link("dtype", (val.dtype,)) if target is aten.view.dtype else generic
    dim = bound.get("dim", 0)
    dim = dim % parent.dim() if isinstance(dim, int) and parent.dim() else dim
    if item is not None:
        if name == "unbind":
            return _Link("select", (dim, item))
        if name in ("split", "split_with_sizes", "chunk", "tensor_split"):
            start = sum(v.shape[dim] for v in vals[:item])
            return _Link("slice", (dim, start, start + val.shape[dim], 1))
        return generic
    if target is aten.select.int:
        return _Link("select", (dim, bound["index"]))
    if target is aten.slice.Tensor:
        return _Link("slice", (dim, bound["start"], bound["end"], bound["step"]))
    if target is aten.narrow.default and isinstance(bound["start"], int):
        start = bound["start"] % max(parent.shape[dim], 1)
        return _Link("slice", (dim, start, start + bound["length"], 1))
    if name in _RESHAPES:
        return _Link("reshape", (tuple(val.shape),))
    if name in _PERMUTES:
        # Distinct sizes show which dimension went where, whatever the spelling of the operation.
        probe = torch.empty_strided(tuple(range(2, 2 + parent.dim())), (0,) * parent.dim(), device="meta")
        shape = target(probe, *node.args[1:], **node.kwargs).shape  # type: ignore[operator]
        return _Link("permute", (tuple(size - 2 for size in shape),))
    if name in ("expand", "expand_as", "broadcast_to"):
        return _Link("expand", (tuple(val.shape),))
    if name == "detach":
        return _Link("detach")
    if name == "diagonal":
        return _Link("diagonal", (bound["offset"], bound["dim1"], bound["dim2"]))
    if (
        parent.shape == val.shape
        and (name in _IDENTITY | _UNDECLARED | {"alias"})
        and same_strides(parent, val)
    ):
        return _Link("identity")
    return generic


def _geometry(value: torch.Tensor) -> tuple[Any, ...]:
    return (tuple(value.shape), value.stride(), value.storage_offset(), value.dtype)


def _addresses(value: torch.Tensor) -> set[int]:
    """The places in its storage that a tensor covers, in elements."""
    grid = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(value.shape, value.stride(), strict=True):
        grid = grid.unsqueeze(-1) + torch.arange(size) * stride
    return {int(place) + int(value.storage_offset()) for place in grid.flatten().tolist()}


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    def interval(t: torch.Tensor) -> tuple[int, int]:
        span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
        start = int(t.storage_offset())
        return start * t.itemsize, (start + span) * t.itemsize

    (a0, a1), (b0, b1) = interval(a), interval(b)
    if a.numel() == 0 or b.numel() == 0 or a1 <= b0 or b1 <= a0:
        return False
    return (
        a.dtype != b.dtype
        or max(a.numel(), b.numel()) > 1 << 22
        or not _addresses(a).isdisjoint(_addresses(b))
    )


def _path(cover: torch.Tensor, part: torch.Tensor) -> list[tuple[_Link, torch.Tensor]] | None:
    """The views that lead from one tensor to another of the same storage, or None if none is known."""
    if cover.dtype != part.dtype or cover.numel() < part.numel() or dense_order(cover) is None:
        return None
    rest = int(part.storage_offset()) - int(cover.storage_offset())
    if rest < 0:
        return None
    path: list[tuple[_Link, torch.Tensor]] = []
    current = cover

    def step(kind: str, args: tuple[Any, ...], value: torch.Tensor) -> None:
        nonlocal current
        current = value
        path.append((_Link(kind, args), value))

    if cover.is_contiguous() and part.is_contiguous() and cover.numel() == part.numel() and not rest:
        step("reshape", (tuple(part.shape),), cover.reshape(part.shape))
        return path
    starts = {}
    for d in sorted(range(cover.dim()), key=cover.stride, reverse=True):
        starts[d], rest = divmod(rest, max(cover.stride(d), 1)) if cover.size(d) > 1 else (0, rest)
    wanted = {stride: size for size, stride in zip(part.shape, part.stride(), strict=True) if size > 1}
    if len(wanted) != sum(size > 1 for size in part.shape):
        return None
    kept: list[int] = []
    for d in reversed(range(cover.dim())):
        size = wanted.pop(cover.stride(d), None) if cover.size(d) > 1 else None
        if starts[d] + (size or 1) > cover.size(d):
            return None
        if size is None:
            step("select", (d, starts[d]), current.select(d, starts[d]))
            continue
        kept.insert(0, cover.stride(d))
        if size != cover.size(d):
            step("slice", (d, starts[d], starts[d] + size, 1), current.narrow(d, starts[d], size))
    if wanted or rest:
        return None
    order = tuple(
        kept.index(stride) for size, stride in zip(part.shape, part.stride(), strict=True) if size > 1
    )
    if order != tuple(range(len(order))):
        step("permute", (order,), current.permute(order))
    if current.shape != part.shape:
        step("reshape", (tuple(part.shape),), current.reshape(part.shape))
    same = current.storage_offset() == part.storage_offset() and same_strides(current, part)
    return path if same else None


# -- the rewrite --


class _Rewriter:
    """Copies a graph node by node, with values in place of memory."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = fx.Graph()
        self.values = Values(gm.graph)
        self.env: dict[fx.Node, Any] = {}
        self.copied: dict[fx.Node, tuple[fx.Node, _Alias, int]] = {}
        self.roots: dict[str, _Object] = {}
        self.reader: fx.Node = next(iter(gm.graph.nodes))
        self.grad: bool | None = None
        self.autocast: list[bool] = []
        self.changed = False
        self._attributes: dict[str, torch.Tensor] = {}

    def run(self) -> Functional:
        self._find_roots()
        for node in self.gm.graph.nodes:
            self.reader = node
            if node.op == "output":
                return self._output(node)
            self._visit(node)
        raise InternalError("functionalise: the graph has no output")

    # reading

    def read(self, node: fx.Node) -> Any:
        """The present content of an original node, as a node (or list of nodes) of the new graph."""
        value = self.env[node]
        if isinstance(value, _Object):
            new, alias, version = self.copied.get(node, (None, None, -1))
            if new is not None and alias is value.alias and version == alias.base.version:
                return new
            return self.current(value.alias)
        if isinstance(value, _Tuple):
            return (
                value.node
                if value.is_current
                else [self._read_item(value, i) for i in range(len(value.items))]
            )
        return value

    def _read_item(self, several: _Tuple, i: int) -> Any:
        item = several.items[i]
        if isinstance(item, _Object) and (item.alias.parent is not None or item.alias.node is not None):
            return self.current(item.alias)
        return self.call(operator.getitem, several.node, i)

    def current(self, alias: _Alias) -> fx.Node:
        """The present content of a view, replayed on the newest version of its base if need be."""
        if alias.node is not None and alias.version == alias.base.version:
            return alias.node
        if alias.parent is None or alias.link is None:
            if alias.base.version or alias.base.name is None:
                raise InternalError(f"functionalise: no content for a base read by {where(self.reader)}")
            alias.node = self.emit("get_attr", alias.base.name, val=alias.val)
            return alias.node
        key = (alias.base.version, repr(self.reader.meta.get("scope")), self.grad is False)
        if key not in alias.replays:
            node = self._replay(alias.link, self.current(alias.parent), alias.val)
            if alias.link.grad is False and self.grad is not False:
                node = self.call(aten.detach.default, node, val=alias.val)
            alias.replays[key] = node
        return alias.replays[key]

    def _replay(self, link: _Link, parent: fx.Node, val: torch.Tensor | None) -> fx.Node:
        match link.kind:
            case "identity":
                return parent
            case "select":
                return self.call(aten.select.int, parent, *link.args, val=val)
            case "slice":
                return self.call(aten.slice.Tensor, parent, *link.args, val=val)
            case "reshape":
                return self.call(aten.reshape.default, parent, list(link.args[0]), val=val)
            case "permute":
                return self.call(aten.permute.default, parent, list(link.args[0]), val=val)
            case "expand":
                return self.call(aten.expand.default, parent, list(link.args[0]), val=val)
            case "detach":
                return self.call(aten.detach.default, parent, val=val)
            case "diagonal":
                return self.call(aten.diagonal.default, parent, *link.args, val=val)
            case "dtype":
                return self.call(aten.view.dtype, parent, *link.args, val=val)
            case "as_strided":
                return self.call(aten.as_strided.default, self._own(parent), *link.args, val=val)
        assert link.call is not None
        target, args, kwargs = link.call
        fill = lambda x: parent if isinstance(x, _Parent) else x  # noqa: E731
        args, kwargs = fx.node.map_aggregate(args, fill), fx.node.map_aggregate(kwargs, fill)
        if link.args[0] is None:
            return self.call(target, *args, val=val, **kwargs)
        several = self.call(target, *args, **kwargs)
        return self.call(operator.getitem, several, link.args[0], val=val)

    # writing

    def write(self, alias: _Alias, value: fx.Node) -> None:
        """Makes `value` the content of a view, and so of its base."""
        if alias.base.tangled:
            raise UnsupportedError(
                "a write into memory that another attribute sees in a way that is no plain view",
                [where(self.reader), *alias.base.tangled],
                "keep one tensor attribute for this memory and take views of it in forward",
            )
        contents: list[tuple[_Alias, fx.Node]] = []
        step: _Alias | None = alias
        while step is not None:
            if step.parent is None:
                value = self._restride(value, step.val)
            contents.append((step, value))
            if step.parent is not None:
                value = self._inverse(step, value)
            step = step.parent
        root = contents[-1][0]
        root.base.version += 1
        self.changed = True
        for view, content in contents:
            view.replays.clear()
            if view is root or same_strides(content.meta["val"], view.val):
                view.node, view.version = content, root.base.version

    def _inverse(self, alias: _Alias, value: fx.Node) -> fx.Node:
        """The new content of the viewed tensor, given the new content of the view."""
        link, parent = alias.link, alias.parent
        assert link is not None and parent is not None
        shape = tuple(parent.val.shape)
        kind, args = link.kind, link.args
        if kind == "slice" and args[3] == 1 and tuple(alias.val.shape) == shape:
            return value
        scatters = {"select": aten.select_scatter.default, "slice": aten.slice_scatter.default,
                    "diagonal": aten.diagonal_scatter.default}  # fmt: skip
        if kind in scatters:
            return self.call(scatters[kind], self.current(parent), value, *args, val=parent.val)
        if kind in ("identity", "detach"):
            return value
        if kind == "reshape" or (kind == "expand" and alias.val.numel() == parent.val.numel()):
            return self.call(aten.reshape.default, value, list(shape))
        if kind == "permute":
            back = sorted(range(len(args[0])), key=lambda d: args[0][d])
            return self.call(aten.permute.default, value, back)
        if kind == "dtype":
            return self.call(aten.view.dtype, value, parent.val.dtype)
        if kind == "as_strided":
            own = self._own(self.current(parent))
            return self.call(aten.as_strided_scatter.default, own, value, *args, val=parent.val)
        inverses = {aten._conj.default: aten._conj.default, aten._neg_view.default: aten._neg_view.default,
                    aten.view_as_real.default: aten.view_as_complex.default,
                    aten.view_as_complex.default: aten.view_as_real.default}  # fmt: skip
        target = link.call[0] if link.call else None
        if target in inverses:
            return self.call(inverses[target], value)
        raise UnsupportedError(
            f"a write through a view that cannot be undone: {target or kind}",
            [where(self.reader)],
            "write into the tensor itself, or into a slice, selection or reshape of it",
        )

    def _own(self, node: fx.Node) -> fx.Node:
        """The value in memory of its own, from offset 0: what absolute strides and offsets are about."""
        if dense_order(node.meta["val"]) is None:
            raise UnsupportedError(
                "as_strided on a tensor with gaps that was written before", [where(self.reader)]
            )
        return self.call(aten.clone.default, node)

    def _restride(self, value: fx.Node, like: torch.Tensor) -> fx.Node:
        """The value with the strides of the tensor it overwrites: a later `view` may rely on them."""
        val = value.meta["val"]
        if same_strides(val, like):
            return value
        order = dense_order(like)
        if order is None:
            empty = self.call(aten.new_empty_strided.default, value, list(like.shape), list(like.stride()))
            return self.call(aten.copy.default, empty, value)
        plain = order == sorted(order)
        if not plain:
            value = self.call(aten.permute.default, value, order)
        value = self.call(aten.clone.default, value, memory_format=torch.contiguous_format)
        if not plain:
            value = self.call(aten.permute.default, value, sorted(range(len(order)), key=lambda d: order[d]))
        return value

    def _fit(self, value: fx.Node, like: torch.Tensor) -> fx.Node:
        """The value cast and broadcast as an in-place operation does with its result."""
        val = value.meta["val"]
        if val.device != like.device:
            value = self.call(aten.to.device, value, like.device, like.dtype)
        elif val.dtype != like.dtype or any(self.autocast):
            value = self.call(aten.to.dtype, value, like.dtype)
        if value.meta["val"].shape != like.shape:
            value = self.call(aten.expand.default, value, list(like.shape))
        return value

    # nodes

    def emit(self, op: str, target: Any, args: Any = (), kwargs: Any = None, *, val: Any = None) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs or {})
        node.meta = {k: v for k, v in self.reader.meta.items() if k not in ("val", "tensor_meta")}
        node.meta["val"] = (
            self.values.run(target, args, kwargs or {}) if val is None else self.values.local(val)
        )
        return node

    def call(self, target: Any, *args: Any, val: Any = None, **kwargs: Any) -> fx.Node:
        return self.emit("call_function", target, args, kwargs, val=val)

    def _copy(self, node: fx.Node) -> fx.Node:
        """The node as it is, on present contents."""
        args, kwargs = map_arg(node.args, self.read), map_arg(node.kwargs, self.read)
        new = self.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        new.meta = dict(node.meta)
        return new

    def _visit(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            self._visit_input(node)
        elif is_mutating(node):
            self._visit_write(node)
        elif node.target is operator.getitem and isinstance(self._first(node), _Tuple):
            self._visit_item(node, self._first(node))
        else:
            self._check_hidden_writes(node)
            self._track_markers(node)
            self._visit_pure(node)

    def _first(self, node: fx.Node) -> Any:
        first = node.args[0]
        return self.env[first] if isinstance(first, fx.Node) else None

    def _visit_input(self, node: fx.Node) -> None:
        known = self.roots.get(str(node.target))
        if known is None:
            self.env[node] = self._copy(node)
            return
        self.env[node] = known
        if known.alias.base.version == 0:
            new = self._copy(node)
            self.copied[node] = (new, known.alias, 0)
            if known.alias.node is None:
                known.alias.node = new

    def _visit_item(self, node: fx.Node, source: _Tuple) -> None:
        assert isinstance(node.args[1], int)
        item = source.items[node.args[1]]
        if not isinstance(item, _Object):
            self.env[node] = self._copy(node)
            return
        self.env[node] = item
        alias = item.alias
        if alias.version == alias.base.version and alias.node is None:
            alias.node = self._copy(node)
            self.copied[node] = (alias.node, alias, alias.version)

    def _visit_pure(self, node: fx.Node) -> None:
        vals = node.meta.get("val")
        if node.op != "call_function" or vals is None:
            self.env[node] = self._copy(node)
            return
        if isinstance(vals, (list, tuple)):
            sources = [self._source(node, val, i) for i, val in enumerate(vals)]
            new = self._copy(node)
            items = [
                self._object(node, s, v, i, vals, None)
                for i, (s, v) in enumerate(zip(sources, vals, strict=True))
            ]
            self.env[node] = _Tuple(new, items)
            return
        if not isinstance(vals, torch.Tensor):
            self.env[node] = self._copy(node)
            return
        source = self._source(node, vals, None)
        if (
            source is not None
            and overload_name(node) in _IDENTITY
            and self._is_identity(node, source.alias, vals)
        ):
            self.env[node] = source
            self.changed = True
            return
        new = self._copy(node)
        self.env[node] = made = self._object(node, source, vals, None, (), new)
        self.copied[node] = (new, made.alias, made.alias.version)

    def _object(
        self,
        node: fx.Node,
        source: _Object | None,
        val: Any,
        item: int | None,
        vals: Sequence[Any],
        new: fx.Node | None,
    ) -> Any:
        """The tensor that a node gives: a view of `source`, or memory of its own."""
        if not isinstance(val, torch.Tensor):
            return new
        if source is None:
            return _Object(_Alias(_Base(), val, node=new))
        parent = source.alias
        link = _links(node, parent.val, val, item, vals)
        if node.target is aten.as_strided.default:
            parent, link = self._strided(node, parent, link)
        if link.kind == "generic":
            target, args, kwargs = link.call or (None, (), {})
            fill = lambda n: _PARENT if self.env[n] is source else self.read(n)  # noqa: E731
            link = _Link("generic", link.args, (target, _fill(args, fill), _fill(kwargs, fill)))
        link = _Link(link.kind, link.args, link.call, self.grad)
        return _Object(_Alias(parent.base, val, parent, link, new, parent.base.version))

    def _strided(self, node: fx.Node, parent: _Alias, link: _Link) -> tuple[_Alias, _Link]:
        """`as_strided` counts from the start of the storage, so it is a view of the base."""
        bound, root = bind(node), parent.root
        offset = bound["storage_offset"]
        if offset is None and parent is not root:
            return parent, link
        start = self._offset(root)
        offset = 0 if offset is None else offset - start
        return root, (_Link("as_strided", (bound["size"], bound["stride"], offset)) if offset >= 0 else link)

    def _offset(self, root: _Alias) -> int:
        if root.base.name is not None and root.base.name in self._attributes:
            return int(self._attributes[root.base.name].storage_offset())
        return int(root.val.storage_offset())

    def _is_identity(self, node: fx.Node, alias: _Alias, val: torch.Tensor) -> bool:
        return alias.val.shape == val.shape and alias.val.dtype == val.dtype and same_strides(alias.val, val)

    def _source(self, node: fx.Node, val: Any, item: int | None) -> _Object | None:
        """The argument whose memory a result shares, or None if the result has memory of its own."""
        if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(val, torch.Tensor):
            return None
        schema, name = node.target._schema, overload_name(node)
        declared = any(r.alias_info is not None for r in schema.returns)
        doubtful = declared or name in _UNDECLARED or _has_tag(node.target, "maybe_aliasing_or_mutating")
        arguments = [n for n in _tensors((node.args, node.kwargs)) if isinstance(self.env[n], _Object)]
        storage = _storage(val)
        objects: dict[fx.Node, _Object] = {n: self.env[n] for n in arguments}
        for n in arguments:
            if storage is not None and _storage(n.meta.get("val")) == storage:
                return objects[n]
        if not doubtful:
            return None
        # What the capture recorded for constants, and for what in-place operations returned, does not share
        # storage with the original; so ask the operation itself.
        fakes = {n: self.values.local(objects[n].alias.val) for n in arguments}
        get = lambda n: fakes.get(n, n.meta.get("val"))  # noqa: E731
        with self.values.mode, torch.no_grad():
            result = node.target(*map_arg(node.args, get), **map_arg(node.kwargs, get))
        storage = _storage(result if item is None else result[item])
        return next((objects[n] for n in arguments if _storage(fakes[n]) == storage), None)

    # writes

    def _visit_write(self, node: fx.Node) -> None:
        target, name = node.target, overload_name(node)
        if not isinstance(target, torch._ops.OpOverload) or name in _STORAGE_OPS:
            self._refuse(node, "an operation that changes what a tensor is, not only what it holds")
        assert isinstance(target, torch._ops.OpOverload)
        schema, bound = target._schema, bind(node)
        written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if any(str(a.type) not in ("Tensor", "Optional[Tensor]") for a in written):
            self._refuse(node, "a write into a list of tensors")
        objects = [self.env[bound[a.name]] for a in written if isinstance(bound.get(a.name), fx.Node)]
        if not objects or not all(isinstance(o, _Object) for o in objects):
            self._refuse(node, "a write into something that is not a tensor of the graph")
        if _has_tag(target, "inplace_view"):
            self._view_in_place(node, objects[0])
        else:
            for item, value in zip(objects, self._written_values(node, written, objects), strict=True):
                self.write(item.alias, value)
        if not schema.returns or all(r.alias_info is not None for r in schema.returns):
            self.env[node] = _Tuple(node, list(objects), []) if len(schema.returns) > 1 else objects[0]

    def _view_in_place(self, node: fx.Node, item: _Object) -> None:
        if overload_name(node) != "detach_" and item.external:
            self._refuse(node, "a change of an input's or attribute's shape in place")
        functional = _functional_overload(node)
        if functional is None:
            self._refuse(node, "a change of a tensor's shape in place")
        parent = item.alias
        old = self.current(parent)
        new = self.call(functional, old, *map_arg(node.args[1:], self.read))
        probe = fx.Graph().create_node("call_function", functional, node.args, node.kwargs)
        made = self._object(probe, item, new.meta["val"], None, (), new)
        probe.args, probe.kwargs = (), {}  # the original's nodes must not count it as a user
        item.alias = made.alias
        self.changed = True

    def _written_values(
        self, node: fx.Node, written: Sequence[Any], objects: Sequence[_Object]
    ) -> Iterator[fx.Node]:
        """What the written arguments hold afterwards, cast and broadcast to them."""
        name, bound, like = overload_name(node), bind(node), objects[0].alias.val
        if name == "copy_" and isinstance(bound["src"], fx.Node):
            source = self._fit(self.read(bound["src"]), like)
            # What is copied while gradients are off has none, but `source` is the value it was copied from.
            yield self.call(aten.detach.default, source) if self.grad is False else source
            return
        if name == "zero_" or (name == "fill_" and not isinstance(bound["value"], fx.Node)):
            value = 0 if name == "zero_" else bound["value"]
            yield self.call(aten.full.default, list(like.shape), value, dtype=like.dtype, device=like.device)
            return
        if name == "fill_":
            yield self._fit(self.read(bound["value"]), like)
            return
        functional = _functional_overload(node)
        if functional is None:
            self._refuse(node, "an in-place operation that has no functional form")
        outs = {a.name for a in written if a.kwarg_only}
        args = map_arg(node.args, self.read)
        kwargs = map_arg({k: v for k, v in node.kwargs.items() if k not in outs}, self.read)
        result = self.call(functional, *args, **kwargs)
        vals = result.meta["val"]
        several = isinstance(vals, (tuple, list))
        if (len(vals) if several else 1) < len(objects):
            self._refuse(node, "an in-place operation whose functional form gives fewer results")
        skip = len(vals) - len(objects) if several else 0
        if skip != sum(r.alias_info is None for r in node.target._schema.returns):  # type: ignore[union-attr]
            self._refuse(node, "an in-place operation whose functional form gives other results")
        values = [
            self.call(operator.getitem, result, skip + i, val=vals[skip + i]) if several else result
            for i in range(len(objects))
        ]
        if outs and any(
            v.meta["val"].shape != o.alias.val.shape for v, o in zip(values, objects, strict=True)
        ):
            self._refuse(node, "an out= argument of another shape than the result")
        if several and skip:
            self.env[node] = _Tuple(result, [
                _Object(_Alias(_Base(), v, node=self.call(operator.getitem, result, i, val=v)))
                for i, v in enumerate(vals[:skip])
            ])  # fmt: skip
        for value, item in zip(values, objects, strict=True):
            yield self._fit(value, item.alias.val)

    def _refuse(self, node: fx.Node, what: str) -> None:
        raise UnsupportedError(
            f"{what}: {node.target}",
            [where(node)],
            "write it out of place in the model's forward (x = x.op(...)), or assign a new tensor",
        )

    def _check_hidden_writes(self, node: fx.Node) -> None:
        """Refuses writes that no schema shows: statistics of norms, bodies of higher-order calls."""
        name = overload_name(node)
        if name in (
            "batch_norm",
            "native_batch_norm",
            "instance_norm",
            "cudnn_batch_norm",
            "miopen_batch_norm",
        ):
            bound = bind(node)
            training = bound.get("training", bound.get("use_input_stats"))
            if training and isinstance(bound.get("running_mean"), fx.Node):
                self._refuse(node, "running statistics that are updated in training mode")
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            for n in node.all_input_nodes:
                body = _attribute(self.gm, str(n.target)) if n.op == "get_attr" else None
                if isinstance(body, fx.GraphModule) and any(is_mutating(inner) for inner in body.graph.nodes):
                    self._refuse(node, "a higher-order operation whose body writes in place")

    def _track_markers(self, node: fx.Node) -> None:
        if node.target is torch._C._set_grad_enabled:
            self.grad = bool(node.args[0])
        elif node.target is torch.amp.autocast_mode._enter_autocast:
            self.autocast.append(len(node.args) < 3 or node.args[2] is not False)
        elif node.target is torch.amp.autocast_mode._exit_autocast and self.autocast:
            self.autocast.pop()

    # inputs and outputs

    def _find_roots(self) -> None:
        """One base for the placeholders and attributes that are the same memory."""
        for node in self.gm.graph.nodes:
            value = node.meta.get("val") if node.op == "placeholder" else None
            if node.op == "get_attr":
                value = _attribute(self.gm, str(node.target))
            if isinstance(value, torch.Tensor):
                self._attributes.setdefault(str(node.target), value)
        groups: dict[Any, list[str]] = {}
        for name, value in self._attributes.items():
            groups.setdefault(_storage(value) or name, []).append(name)
        for names in groups.values():
            names.sort(key=lambda n: -self._attributes[n].numel())
            for i, name in enumerate(names):
                self._add_root(name, names[:i])

    def _add_root(self, name: str, others: list[str]) -> None:
        value = self._attributes[name]
        fake = self.values.local(value)
        for other in others:
            cover, known = self._attributes[other], self.roots[other]
            if _geometry(cover) == _geometry(value):
                self.roots[name] = known
                return
            path = _path(cover, value)
            if path is not None:
                alias = known.alias
                for link, val in path:
                    alias = _Alias(alias.base, self.values.local(val), alias, link)
                self.roots[name] = _Object(alias, external=True)
                return
        root = self.roots[name] = _Object(_Alias(_Base(name), fake), external=True)
        for other in others:
            if _overlap(self._attributes[other], value):
                base = self.roots[other].alias.base
                base.tangled += (f"{other} and {name} overlap",)
                root.alias.base.tangled += (f"{name} and {other} overlap",)

    def _read_output(self, node: fx.Node) -> Any:
        value, now = self.env[node], self.read(node)
        name = value.alias.base.name if isinstance(value, _Object) else None
        return self._owned(now, name) if isinstance(now, fx.Node) else now

    def _owned(self, node: fx.Node, name: str | None) -> fx.Node:
        """A result that was memory of its own stays so, though it is now an input or attribute itself."""
        root = alias_root(node)
        external = root.op in ("placeholder", "get_attr") and isinstance(root.meta.get("val"), torch.Tensor)
        if not external or str(root.target) == name or not self.changed:
            return node
        known = self.roots.get(str(root.target))
        if known is not None and known.alias.base.name == name and name is not None:
            return node
        return self.call(aten.clone.default, node)

    def _output(self, node: fx.Node) -> Functional:
        if not self.changed:
            return Functional(self.gm, {})
        result = map_arg(node.args[0], self._read_output)
        writes = {}
        for item in self.roots.values():
            root = item.alias.root
            if root.base.version and root.base.name is not None and root.base.name not in writes:
                writes[root.base.name] = self._owned(self.current(root), None)
        output = self.graph.output((result, list(writes.values())) if writes else result)
        output.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}
        remove_dead(self.graph)
        module = fx.GraphModule(self.gm, self.graph, self.gm.__class__.__name__)
        module.meta = dict(self.gm.meta)
        return Functional(module, writes)


def _fill(args: Any, function: Callable[[fx.Node], Any]) -> Any:
    """`map_arg` for results that are no FX arguments."""
    if isinstance(args, fx.Node):
        return function(args)
    if isinstance(args, (list, tuple)):
        items = [_fill(a, function) for a in args]
        return tuple(items) if isinstance(args, tuple) else items
    if isinstance(args, dict):
        return {k: _fill(v, function) for k, v in args.items()}
    return args


def _has_tag(target: Any, name: str) -> bool:
    tag = getattr(torch.Tag, name, None)
    return tag is not None and tag in target.tags


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    return reduce(getattr, path.split("."), gm)


def _functional_overload(node: fx.Node) -> Any:
    """The operation that computes what a mutating one writes, by the naming rules of ATen, or None."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    space, name = target._schema.name.split("::")
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments if not (a.kwarg_only and _writes(a))]
    plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    if name.startswith("__i") and name.endswith("__"):
        plain = "__" + name[3:]
    library = getattr(torch.ops, space)
    for candidate in (plain, plain + "_functional", name + "_functional"):
        packet = getattr(library, candidate, None)
        for overload in packet.overloads() if packet is not None else ():
            functional = getattr(packet, overload)
            schema = functional._schema
            if schema.is_mutable or [(a.name, str(a.type)) for a in schema.arguments] != wanted:
                continue
            return functional
    return None


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def functionalise(gm: fx.GraphModule) -> Functional:
    """Rewrites a captured graph so that no node mutates; the same module object if there is nothing to do."""
    return _Rewriter(gm).run()
