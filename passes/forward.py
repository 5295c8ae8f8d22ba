"""forward: let every load read the value that was stored, past the glue that keeps values together.

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
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from rmtcompile.errors import UnsupportedError
from rmtcompile.passes.functionalise import (
    Values,
    alias_root,
    bind,
    dense_order,
    is_mutating,
    overload_name,
    remove_dead,
    same_strides,
    where,
)

aten = torch.ops.aten

# fmt: off
_RESHAPES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
    "reshape_as", "_reshape_alias", "ravel",
}
_PERMUTES = {"permute", "transpose", "t", "numpy_T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis"}
_COPIES = {"clone", "contiguous", "alias", "to", "_to_copy", "lift_fresh", "positive", "dropout"}
_SPLITS = {"split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"}
# fmt: on
_LONGEST_GATHER = 64


@dataclass(frozen=True)
class _Range:
    """What a load keeps of a dimension: `n` indices from `lo` on; `drop` removes the dimension."""

    lo: int
    n: int
    step: int = 1
    drop: bool = False

    def at(self, k: int) -> int:
        return self.lo + k * self.step

    def part(self, first: int, count: int, lo: int, step: int) -> _Range:
        return _Range(lo, count, step if count > 1 else 1, self.drop)


@dataclass(frozen=True)
class _View:
    """A load in normal form: `range` of dimension `dim` of `source`."""

    source: fx.Node
    dim: int
    range: _Range


def _val(node: Any) -> torch.Tensor:
    return node.meta["val"]


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(_val(node).shape)


def _is_static_tensor(node: Any) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    return all(isinstance(size, int) for size in node.meta["val"].shape)


def _is_reshape(node: fx.Node) -> bool:
    """Whether a node only counts the elements of its operand in other dimensions (no `view` of a dtype)."""
    operand = node.args[0] if overload_name(node) in _RESHAPES else None
    return _is_static_tensor(node) and _is_static_tensor(operand) and _val(node).dtype == _val(operand).dtype


def _slice_range(size: int, start: Any, end: Any, step: Any) -> _Range | None:
    """A Python slice of a dimension, clamped; None if it is empty or not constant."""
    if not all(x is None or isinstance(x, int) for x in (start, end)) or not isinstance(step, int):
        return None
    indices = range(*slice(start, end, step).indices(size))
    return _Range(indices[0], len(indices), step if len(indices) > 1 else 1) if len(indices) else None


def as_load(node: fx.Node) -> _View | None:
    """The load that a node is, or None."""
    if not _is_static_tensor(node):
        return None
    if node.target is operator.getitem:
        return _item_load(node)
    name = overload_name(node)
    if name not in ("select", "slice", "narrow") or not _is_static_tensor(node.args[0]):
        return None
    bound = bind(node)
    source = bound["self"]
    shape = _shape(source)
    if not shape or not isinstance(bound["dim"], int):
        return None
    dim = bound["dim"] % len(shape)
    found: _Range | None = None
    if node.target is aten.select.int and isinstance(bound["index"], int):
        found = _Range(bound["index"] % shape[dim], 1, 1, True)
    elif node.target is aten.slice.Tensor:
        found = _slice_range(shape[dim], bound["start"], bound["end"], bound["step"])
    elif node.target is aten.narrow.default and isinstance(bound["start"], int) and _shape(node)[dim]:
        found = _Range(bound["start"] % shape[dim], _shape(node)[dim])
    return None if found is None else _View(source, dim, found)


def _item_load(node: fx.Node) -> _View | None:
    several, item = node.args
    if not isinstance(several, fx.Node) or not isinstance(item, int):
        return None
    name = overload_name(several)
    if name not in _SPLITS | {"unbind"} or not _is_static_tensor(several.args[0]):
        return None
    bound = bind(several)
    source, vals = bound["self"], several.meta["val"]
    dim, item = bound["dim"] % len(_shape(source)), item % len(vals)
    if name == "unbind":
        return _View(source, dim, _Range(item, 1, 1, True))
    size = vals[item].shape[dim]
    return _View(source, dim, _Range(sum(v.shape[dim] for v in vals[:item]), size)) if size else None


def _blocks(inner: Sequence[int], outer: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of dimensions that a reshape maps onto each other."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(inner) or j < len(outer):
        if i < len(inner) and inner[i] == 1 and not (j < len(outer) and outer[j] == 1):
            groups.append(([i], []))
            i += 1
            continue
        if j < len(outer) and outer[j] == 1 and not (i < len(inner) and inner[i] == 1):
            groups.append(([], [j]))
            j += 1
            continue
        a, b = [i], [j]
        i, j = i + 1, j + 1
        while (left := prod(inner[k] for k in a)) != (right := prod(outer[k] for k in b)):
            if left < right:
                a.append(i)
                i += 1
            else:
                b.append(j)
                j += 1
        groups.append((a, b))
    return groups


def _permutation(node: fx.Node) -> tuple[int, ...]:
    """Which dimension of its operand each dimension of a permutation is."""
    probe = torch.empty_strided(
        tuple(range(2, 2 + len(_shape(node)))), (0,) * len(_shape(node)), device="meta"
    )
    assert callable(node.target)
    return tuple(size - 2 for size in node.target(probe, *node.args[1:], **node.kwargs).shape)


@contextmanager
def _deep_recursion() -> Iterator[None]:
    """Loads climb chains of stores by recursion, one store at a time; Python's default depth is too small."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 100_000))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


class _Forwarder:
    """Rewrites a copy of a graph, node by node in order."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in gm.graph.nodes:
            mapping[node] = self.graph.node_copy(node, lambda n: mapping[n])
            mapping[node].meta = dict(node.meta)
        self.values = Values(self.graph)
        self.no_grad: set[fx.Node] = set()
        self.grad: bool | None = None
        self.here: fx.Node = next(iter(self.graph.nodes))
        self.memo: dict[Any, fx.Node | None] = {}
        self.dirty: set[fx.Node] = set()
        self.original = set(self.graph.nodes)
        self.pinned = self._pinned()
        self.count = 0
        self.rules: dict[str, Callable[[fx.Node, int, _Range], fx.Node | None]] = {
            "stack": self._load_stack,
            "cat": self._load_cat,
            "select_scatter": self._load_select_scatter,
            "slice_scatter": self._load_slice_scatter,
            "expand": self._load_expand,
            "roll": self._load_roll,
            "flip": self._load_flip,
            "detach": self._load_copy,
            "index_select": self._load_gather,
            "index": self._load_gather,
            **dict.fromkeys(_COPIES, self._load_copy),
            **dict.fromkeys(_RESHAPES, self._load_reshape),
            **dict.fromkeys(_PERMUTES, self._load_permute),
        }

    def run(self) -> fx.GraphModule:
        output = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        roots: list[fx.Node] = []
        map_arg(output.args, lambda n: roots.append(alias_root(n)))
        for node in list(self.graph.nodes):
            self.here = node
            if node.target is torch._C._set_grad_enabled:
                self.grad = bool(node.args[0])
            if self.grad is False:
                self.no_grad.add(node)
            if is_mutating(node):
                raise UnsupportedError(
                    "forward needs a functional graph", [where(node)], "functionalise first"
                )
            if node in self.dirty:
                self._refresh(node)
            if node.op == "call_function" and node not in self.pinned and _is_static_tensor(node):
                self._visit(node)
        self._protect(output, roots)
        remove_dead(self.graph)
        if not self.count and self.original <= set(self.graph.nodes):
            return self.gm
        module = fx.GraphModule(self.gm, self.graph, self.gm.__class__.__name__)
        module.meta = dict(self.gm.meta)
        return module

    def _pinned(self) -> set[fx.Node]:
        """What `as_strided` reads by address: its operand, the views that lead there, the memory below."""
        pinned: set[fx.Node] = set()
        for node in self.graph.nodes:
            if overload_name(node) in ("as_strided", "as_strided_scatter", "as_strided_copy"):
                at = node.args[0]
                root = alias_root(at)
                while at is not root:
                    pinned.add(at)
                    at = at.all_input_nodes[0]
                pinned.add(root)
        return pinned

    def _protect(self, output: fx.Node, roots: list[fx.Node]) -> None:
        """An output that was memory of its own must not become a view of an input or attribute."""
        self.here = output
        before = iter(roots)

        def own(node: fx.Node) -> fx.Node:
            root, was = alias_root(node), next(before)
            external = root.op in ("placeholder", "get_attr") and isinstance(
                node.meta.get("val"), torch.Tensor
            )
            if not external or (root.op, root.target) == (was.op, was.target):
                return node
            return self.emit(aten.clone.default, node)

        output.args = map_arg(output.args, own)

    # building

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.here):
            node = self.graph.create_node("call_function", target, args, kwargs)
        node.meta = {k: v for k, v in self.here.meta.items() if k not in ("val", "tensor_meta")}
        node.meta["val"] = self.values.run(target, args, kwargs)
        if self.grad is False:
            self.no_grad.add(node)
        return node

    def reshape(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        while _shape(x) != tuple(shape) and _is_reshape(x) and self._is_open(x):
            x = self._operand(x)
        return x if _shape(x) == tuple(shape) else self.emit(aten.reshape.default, x, list(shape))

    def permute(self, x: fx.Node, order: Sequence[int]) -> fx.Node:
        if overload_name(x) in _PERMUTES and self._is_open(x):
            inner = _permutation(x)
            return self.permute(self._operand(x), [inner[d] for d in order])
        return x if list(order) == sorted(order) else self.emit(aten.permute.default, x, list(order))

    def join(self, target: Any, parts: Sequence[fx.Node], at: int) -> fx.Node:
        """A stack or concatenation; of one part, that part."""
        if len(parts) > 1:
            return self.emit(target, list(parts), at)
        shape = list(_shape(parts[0]))
        return self.reshape(parts[0], shape[:at] + [1] * (target is aten.stack.default) + shape[at:])

    def take(self, x: fx.Node, d: int, r: _Range) -> fx.Node:
        """The load itself, where it is not known what was stored."""
        if r.drop:
            return self.emit(aten.select.int, x, d, r.lo)
        if r.n == _shape(x)[d]:
            return x
        return self.emit(aten.slice.Tensor, x, d, r.lo, r.at(r.n - 1) + 1, r.step)

    def load(self, x: fx.Node, d: int, r: _Range) -> fx.Node:
        found = self.try_load(x, d, r)
        return self.take(x, d, r) if found is None else found

    def _operand(self, x: fx.Node) -> fx.Node:
        operand = x.args[0]
        assert isinstance(operand, fx.Node)
        return operand

    def _is_open(self, x: fx.Node) -> bool:
        """Whether looking past a node changes nothing for gradients."""
        return x not in self.pinned and (x not in self.no_grad or self.grad is False)

    # loads

    def try_load(self, x: fx.Node, d: int, r: _Range) -> fx.Node | None:
        """The value of a load, if it can be had without this load of this operand; else None."""
        if not r.drop and r.n == _shape(x)[d]:
            return x
        if x in self.pinned or not _is_static_tensor(x) or 0 in _shape(x):
            return None
        key = (x, d, r, repr(self.here.meta.get("scope")), self.grad is False)
        if key not in self.memo:
            view = as_load(x)
            rule = self.rules.get(overload_name(x))
            found = None
            if view is not None:
                found = self._load_load(view, d, r)
            elif rule is not None and x.op == "call_function":
                found = rule(x, d, r)
            # What was computed without gradients has none; the stored value itself may have.
            if found is not None and (overload_name(x) == "detach" or not self._is_open(x)):
                found = self.emit(aten.detach.default, found)
            self.memo[key] = found
        return self.memo[key]

    def _load_load(self, view: _View, d: int, r: _Range) -> fx.Node | None:
        inner, at = view.range, view.dim
        if inner.drop:
            below = d + (d >= at)
            found = self.try_load(view.source, below, r)
            return None if found is None else self.load(found, at - (r.drop and below < at), inner)
        if d == at:
            return self.load(view.source, d, _Range(inner.at(r.lo), r.n, inner.step * r.step, r.drop))
        found = self.try_load(view.source, d, r)
        return None if found is None else self.load(found, at - (r.drop and d < at), inner)

    def _load_copy(self, x: fx.Node, d: int, r: _Range) -> fx.Node | None:
        source = x.args[0]
        if not _is_static_tensor(source) or not self._is_copy(x):
            return None
        assert isinstance(source, fx.Node)
        return self.try_load(source, d, r)

    def _is_copy(self, x: fx.Node) -> bool:
        """Whether a node of a copying kind hands on the very values."""
        source = self._operand(x)
        if overload_name(x) == "dropout":
            bound = bind(x)
            return bound["train"] is False or bound["p"] == 0
        return (
            _val(source).dtype == _val(x).dtype
            and _val(source).device == _val(x).device
            and _shape(source) == _shape(x)
        )

    def _parts(self, x: fx.Node) -> tuple[list[fx.Node], int] | None:
        """Operands and dimension of a stack or concatenation that converts nothing."""
        bound = bind(x)
        parts, dim = list(bound["tensors"]), bound["dim"] % len(_shape(x))
        rank = len(_shape(x)) - (overload_name(x) == "stack")
        plain = all(_is_static_tensor(p) and _val(p).dtype == _val(x).dtype for p in parts)
        plain = plain and all(len(_shape(p)) == rank for p in parts)
        return (parts, dim) if plain else None

    def _load_each(self, target: Any, parts: list[fx.Node], at: int, d: int, r: _Range) -> fx.Node | None:
        """A load of another dimension than the one along which parts were put together."""
        below = d - (target is aten.stack.default and d > at)
        found = [self.try_load(part, below, r) for part in parts]
        if not [f for f in found if f is not None]:
            return None
        loaded = [self.take(p, below, r) if f is None else f for p, f in zip(parts, found, strict=True)]
        return self.join(target, loaded, at - (r.drop and d < at))

    def _load_stack(self, x: fx.Node, d: int, r: _Range) -> fx.Node | None:
        known = self._parts(x)
        if known is None:
            return None
        parts, at = known
        if d != at:
            return self._load_each(aten.stack.default, parts, at, d, r)
        if r.drop:
            return parts[r.lo]
        return self.join(aten.stack.default, [parts[r.at(k)] for k in range(r.n)], at)

    def _load_cat(self, x: fx.Node, d: int, r: _Range) -> fx.Node | None:
        known = self._parts(x)
        if known is None:
            return None
        parts, at = known
        if d != at:
            return self._load_each(aten.cat.default, parts, at, d, r)
        pieces: list[tuple[fx.Node, _Range]] = []
        offset = 0
        for part in parts:
            size = _shape(part)[at]
            first = max(0, -((r.lo - offset) // r.step))
            last = min(r.n, -((r.lo - offset - size) // r.step))
            if first < last:
                pieces.append((part, r.part(first, last - first, r.at(first) - offset, r.step)))
            offset += size
        found = [self.try_load(p, d, piece) for p, piece in pieces]
        moved = [
            f for f, (p, piece) in zip(found, pieces, strict=True) if f is not None and piece.n < _shape(p)[d]
        ]
        if len(pieces) == len(parts) and not moved and not r.drop:
            return None
        loaded = [self.take(p, d, i) if f is None else f for f, (p, i) in zip(found, pieces, strict=True)]
        return self.join(aten.cat.default, loaded, d)

    def _store(self, x: fx.Node) -> tuple[fx.Node, fx.Node, int, _Range] | None:
        """Base, stored value, dimension and range of a scatter that converts nothing."""
        bound = bind(x)
        base, src, dim = bound["self"], bound["src"], bound["dim"] % len(_shape(x))
        if not _is_static_tensor(src) or not _is_static_tensor(base) or _val(src).dtype != _val(x).dtype:
            return None
        size = _shape(x)[dim]
        if overload_name(x) == "slice_scatter":
            stored = _slice_range(size, bound["start"], bound["end"], bound["step"])
            return None if stored is None else (base, src, dim, stored)
        if not isinstance(bound["index"], int):
            return None
        return base, src, dim, _Range(bound["index"] % size, 1, 1, True)

    def store(self, base: fx.Node, src: fx.Node, d: int, stored: _Range) -> fx.Node:
        """The store itself, or what it amounts to."""
        found = self.try_store(base, src, d, stored)
        if found is not None:
            return found
        if stored.drop:
            return self.emit(aten.select_scatter.default, base, src, d, stored.lo)
        end = stored.at(stored.n - 1) + 1
        return self.emit(aten.slice_scatter.default, base, src, d, stored.lo, end, stored.step)

    def try_store(self, base: fx.Node, src: fx.Node, d: int, stored: _Range) -> fx.Node | None:
        """A store of everything is what is stored; what it overwrites need not be stored before."""
        if stored.n == _shape(base)[d]:
            return self.reshape(src, _shape(base))
        view = as_load(src)
        if view == _View(base, d, stored) and self._is_open(src):
            return base
        below = base
        while overload_name(below) in ("select_scatter", "slice_scatter") and self._is_open(below):
            earlier = self._store(below)
            if earlier is None or earlier[2] != d or not _covers(stored, earlier[3]):
                break
            below = earlier[0]
        return None if below is base else self.store(below, src, d, stored)

    def _load_past_store(
        self, store: tuple[fx.Node, fx.Node, int, _Range], d: int, r: _Range
    ) -> fx.Node | None:
        """A load of another dimension than the one that the store cuts: store what is loaded of both."""
        base, src, at, stored = store
        below = d - (stored.drop and d > at)
        of_base, of_src = self.try_load(base, d, r), self.try_load(src, below, r)
        if of_base is None and of_src is None:
            return None
        of_base = self.take(base, d, r) if of_base is None else of_base
        of_src = self.take(src, below, r) if of_src is None else of_src
        return self.store(of_base, of_src, at - (r.drop and d < at), stored)

    def _load_select_scatter(self, x: fx.Node, d: int, r: _Range) -> fx.Node | None:
        store = self._store(x)
        if store is None:
            return None
        base, src, at, stored = store
        if d != at:
            return self._load_past_store(store, d, r)
        k, rest = divmod(stored.lo - r.lo, r.step)
        if rest or not 0 <= k < r.n:
            return self.load(base, d, r)
        if r.n == 1:
            return src if r.drop else self.reshape(src, (*_shape(src)[:d], 1, *_shape(src)[d:]))
        found = self.try_load(base, d, r)
        return None if found is None else self.store(found, src, d, _Range(k, 1, 1, True))

    def _load_slice_scatter(self, x: fx.Node, d: int, r: _Range) -> fx.Node | None:
        store = self._store(x)
        if store is None:
            return None
        base, src, at, stored = store
        if d != at:
            return self._load_past_store(store, d, r)
        runs = self._runs(r, stored)
        if runs is None:
            return None
        pieces = [self.load(src if inside else base, d, piece) for inside, piece in runs]
        return self.join(aten.cat.default, pieces, d)

    def _runs(self, r: _Range, stored: _Range) -> list[tuple[bool, _Range]] | None:
        """A load, cut where it enters and leaves what was stored: (inside?, range there)."""
        end = stored.at(stored.n - 1) + 1
        first = min(r.n, max(0, -((r.lo - stored.lo) // r.step)))
        last = max(first, min(r.n, -((r.lo - end) // r.step)))
        runs: list[tuple[bool, _Range]] = []
        if first:
            runs.append((False, r.part(0, first, r.lo, r.step)))
        if first < last:
            place, offset = divmod(r.at(first) - stored.lo, stored.step)
            step, between = divmod(r.step, stored.step)
            if last - first > 1 and between:
                return None  # every now and then inside
            if last - first == 1 or not between:
                piece = r.part(first, last - first, place, step)
                around = r.part(first, last - first, r.at(first), r.step)
                runs.append((False, around) if offset else (True, piece))
        if last < r.n:
            runs.append((False, r.part(last, r.n - last, r.at(last), r.step)))
        return runs if any(inside for inside, _ in runs) else [(False, r)]

    def _load_expand(self, x: fx.Node, d: int, r: _Range) -> fx.Node | None:
        source = self._operand(x)
        shape = list(_shape(x))
        shape[d : d + 1] = [] if r.drop else [r.n]
        below = d - (len(_shape(x)) - len(_shape(source)))
        if below < 0:
            inner: fx.Node | None = source
        elif _shape(source)[below] == 1:
            inner = self.load(source, below, _Range(0, 1, 1, True)) if r.drop else source
        else:
            inner = self.try_load(source, below, r)
        if inner is None or _shape(inner) == tuple(shape):
            return inner
        return self.emit(aten.expand.default, inner, shape)

    def _load_permute(self, x: fx.Node, d: int, r: _Range) -> fx.Node | None:
        order = _permutation(x)
        found = self.try_load(self._operand(x), order[d], r)
        if found is None:
            return None
        if r.drop:
            return self.permute(found, [o - (o > order[d]) for o in order if o != order[d]])
        return self.permute(found, order)

    def _load_roll(self, x: fx.Node, d: int, r: _Range) -> fx.Node | None:
        source, size = self._operand(x), _shape(x)[d]
        turns = self._turns(x)
        if turns is None:
            return None
        shift = turns.pop(d, 0)
        if not shift:
            found = self.try_load(source, d, r)
        else:
            start = (r.lo - shift) % size
            first = min(r.n, -((start - size) // r.step))
            pieces = [self.load(source, d, r.part(0, first, start, r.step))]
            if first < r.n:
                again = start + first * r.step - size
                pieces.append(self.load(source, d, r.part(first, r.n - first, again, r.step)))
            found = self.join(aten.cat.default, pieces, d)
        if found is None or not turns:
            return found
        dims = [k - (r.drop and d < k) for k in turns]
        return self.emit(aten.roll.default, found, list(turns.values()), dims)

    def _turns(self, x: fx.Node) -> dict[int, int] | None:
        """How far each dimension is rolled."""
        bound = bind(x)
        shifts, dims = bound["shifts"], bound["dims"]
        shifts = [shifts] if isinstance(shifts, int) else list(shifts)
        dims = [dims] if isinstance(dims, int) else list(dims)
        if len(shifts) != len(dims) or not all(isinstance(s, int) for s in shifts):
            return None
        turns: dict[int, int] = {}
        for shift, dim in zip(shifts, dims, strict=True):
            k = dim % len(_shape(x))
            turns[k] = (turns.get(k, 0) + shift) % _shape(x)[k]
        return turns

    def _load_flip(self, x: fx.Node, d: int, r: _Range) -> fx.Node | None:
        rank = len(_shape(x))
        dims = [k % rank for k in bind(x)["dims"]]
        if d in dims:
            found = self.try_load(
                self._operand(x), d, _Range(_shape(x)[d] - 1 - r.at(r.n - 1), r.n, r.step, r.drop)
            )
        else:
            found = self.try_load(self._operand(x), d, r)
        dims = [k - (r.drop and d < k) for k in dims if not (r.drop and k == d)]
        return found if found is None or not dims else self.emit(aten.flip.default, found, dims)

    def _load_reshape(self, x: fx.Node, d: int, r: _Range) -> fx.Node | None:
        source = self._operand(x)
        if not _is_reshape(x):
            return None
        inner, outer = _shape(source), _shape(x)
        shape = [*outer[:d], *([] if r.drop else [r.n]), *outer[d + 1 :]]
        a, b = next(block for block in _blocks(inner, outer) if d in block[1])
        if not a:
            return self.reshape(source, shape)
        found: fx.Node | None
        if len(a) == len(b) == 1:
            found = self.try_load(source, a[0], r)
        else:
            ahead = prod(outer[k] for k in b if k < d)
            behind = prod(outer[k] for k in b if k > d)
            if ahead == 1 and r.step == 1:
                found = self._load_flat(source, a, r.lo * behind, r.n * behind)
            elif behind == 1 and len(a) == 1 and r.drop:
                found = self.try_load(source, a[0], _Range(r.lo, ahead, outer[d]))
            else:
                found = None
        return None if found is None else self.reshape(found, shape)

    def _load_flat(self, x: fx.Node, dims: list[int], start: int, count: int) -> fx.Node | None:
        """`count` elements from `start` on of some adjacent dimensions, counted as one."""
        fired = False
        dims = list(dims)
        while dims:
            behind = prod(_shape(x)[k] for k in dims[1:])
            first, last = start // behind, (start + count - 1) // behind
            whole = start % behind == 0 and count % behind == 0
            if not whole and first != last:
                return None
            r = _Range(first, count // behind) if whole else _Range(first, 1, 1, True)
            found = self.try_load(x, dims[0], r)
            fired = fired or (found is not None and found is not x)
            x = self.take(x, dims[0], r) if found is None else found
            if whole:
                return x if fired else None
            start -= first * behind
            dims = [k - 1 for k in dims[1:]]
        return None

    def _load_gather(self, x: fx.Node, d: int, r: _Range) -> fx.Node | None:
        gather = self._gather(x)
        if gather is None or not r.drop or d != gather[1]:
            return None
        return self.load(gather[0], d, _Range(gather[2][r.lo], 1, 1, True))

    # gathers with literal indices

    def _gather(self, x: fx.Node) -> tuple[fx.Node, int, list[int]] | None:
        """Operand, dimension and indices of `index_select` or `index` by one literal list of integers."""
        bound = bind(x)
        source = bound["self"]
        if not _is_static_tensor(source):
            return None
        if overload_name(x) == "index_select":
            dim, index = bound["dim"], bound["index"]
        else:
            given = [(k, i) for k, i in enumerate(bound["indices"]) if i is not None]
            if len(given) != 1:
                return None
            dim, index = given[0]
        literal = self._literal(index)
        if literal is None or literal.dim() != 1 or literal.dtype not in (torch.int32, torch.int64):
            return None
        dim %= len(_shape(source))
        return source, dim, [i % _shape(source)[dim] for i in literal.tolist()]

    def _literal(self, node: Any) -> torch.Tensor | None:
        """The value of a tensor literal: what passed `lift_fresh` was written out in the model's code."""
        lifted = False
        while isinstance(node, fx.Node) and node.op == "call_function":
            if overload_name(node) not in ("lift_fresh", "lift_fresh_copy", "detach", "clone", "alias"):
                return None
            lifted = lifted or overload_name(node).startswith("lift_fresh")
            node = self._operand(node)
        if not lifted or not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        value = reduce(getattr, str(node.target).split("."), self.gm)
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or value.is_meta:
            return None
        return value

    # nodes

    def _visit(self, node: fx.Node) -> None:
        view, name = as_load(node), overload_name(node)
        found: fx.Node | None = None
        if view is not None:
            found = self.try_load(view.source, view.dim, view.range)
        elif _is_reshape(node):
            found = self._undone(node)
        elif name in _PERMUTES:
            found = self._permuted(node)
        elif name == "expand" and _is_static_tensor(node.args[0]):
            found = self._operand(node) if _shape(self._operand(node)) == _shape(node) else None
        elif name in ("stack", "cat"):
            found = self._single(node)
        elif name in ("select_scatter", "slice_scatter"):
            found = self._stored(node)
        elif name in ("roll", "flip"):
            found = self._reordered(node)
        elif name in ("index_select", "index"):
            found = self._gathered(node)
        if found is not None and found is not node:
            self._replace(node, found)

    def _replace(self, node: fx.Node, found: fx.Node) -> None:
        self.count += 1
        if not same_strides(_val(node), _val(found)):
            self.dirty.update(node.users)
        node.replace_all_uses_with(found)

    def _undone(self, node: fx.Node) -> fx.Node | None:
        """The operand, or what is behind it, that has the node's shape already."""
        x = self._operand(node)
        while _shape(x) != _shape(node):
            if not _is_reshape(x) or not self._is_open(x):
                return None
            x = self._operand(x)
        return x

    def _permuted(self, node: fx.Node) -> fx.Node | None:
        order, x = list(_permutation(node)), self._operand(node)
        while order != sorted(order):
            if overload_name(x) not in _PERMUTES or not self._is_open(x):
                return None
            inner = _permutation(x)
            order, x = [inner[d] for d in order], self._operand(x)
        return x

    def _single(self, node: fx.Node) -> fx.Node | None:
        known = self._parts(node)
        if known is None or len(known[0]) != 1:
            return None
        return self.reshape(known[0][0], _shape(node))

    def _stored(self, node: fx.Node) -> fx.Node | None:
        store = self._store(node)
        return None if store is None else self.try_store(*store)

    def _reordered(self, node: fx.Node) -> fx.Node | None:
        """A roll or flip of a stack along its own dimension is a stack."""
        x = self._operand(node)
        known = self._parts(x) if overload_name(x) == "stack" and self._is_open(x) else None
        if known is None:
            return None
        parts, at = known
        if overload_name(node) == "flip":
            if [k % len(_shape(node)) for k in bind(node)["dims"]] != [at]:
                return None
            return self.emit(aten.stack.default, parts[::-1], at)
        turns = self._turns(node)
        if turns is None or set(turns) != {at}:
            return None
        rolled = [parts[(k - turns[at]) % len(parts)] for k in range(len(parts))]
        return self.emit(aten.stack.default, rolled, at)

    def _gathered(self, node: fx.Node) -> fx.Node | None:
        gather = self._gather(node)
        if gather is None or not 0 < len(gather[2]) <= _LONGEST_GATHER:
            return None
        source, d, indices = gather
        found = [self.try_load(source, d, _Range(i, 1, 1, True)) for i in indices]
        if not [f for f in found if f is not None]:
            return None
        ranges = [_Range(i, 1, 1, True) for i in indices]
        parts = [self.take(source, d, r) if f is None else f for f, r in zip(found, ranges, strict=True)]
        return self.join(aten.stack.default, parts, d)

    # layouts

    def _refresh(self, node: fx.Node) -> None:
        """Brings the metadata of a node up to date whose operands have other strides than at capture."""
        before = node.meta.get("val")
        if node.op != "call_function" or not isinstance(before, (torch.Tensor, list, tuple)):
            return
        try:
            val = self.values.run(node.target, node.args, node.kwargs)
        except (RuntimeError, ValueError):
            # A view of memory that is laid out differently now.
            if _is_reshape(node):
                node.target, node.args, node.kwargs = (
                    aten.reshape.default,
                    (node.args[0], list(_shape(node))),
                    {},
                )
            else:
                self.here = node
                for operand in node.all_input_nodes:
                    if isinstance(operand.meta.get("val"), torch.Tensor):
                        plain = self.emit(aten.clone.default, operand, memory_format=torch.contiguous_format)
                        node.replace_input_with(operand, plain)
            val = self.values.run(node.target, node.args, node.kwargs)
        node.meta["val"] = val
        if self._same_layout(before, val):
            return
        if node in self.pinned and isinstance(before, torch.Tensor):
            self._restore(node, before)
        else:
            self.dirty.update(node.users)

    @staticmethod
    def _same_layout(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.shape == b.shape and same_strides(a, b)
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return all(_Forwarder._same_layout(x, y) for x, y in zip(a, b, strict=True))
        return True

    def _restore(self, node: fx.Node, before: torch.Tensor) -> None:
        """Gives a node that is read by address its layout at capture back."""
        order = dense_order(before)
        if order is None:
            raise UnsupportedError("as_strided on a tensor whose layout was rewritten", [where(node)])
        users = list(node.users)
        self.here = node.next
        moved = self.emit(aten.permute.default, node, order)
        moved = self.emit(aten.clone.default, moved, memory_format=torch.contiguous_format)
        back = self.emit(aten.permute.default, moved, sorted(range(len(order)), key=lambda d: order[d]))
        for user in users:
            user.replace_input_with(node, back)
        self.here = node


def _covers(outer: _Range, inner: _Range) -> bool:
    indices = range(outer.lo, outer.at(outer.n - 1) + 1, outer.step)
    if outer.step == 1:
        return inner.lo in indices and inner.at(inner.n - 1) in indices
    return all(inner.at(k) in indices for k in range(inner.n))


def forward(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrites loads of stored values into the values; the same module object if there is nothing to do."""
    with _deep_recursion():
        return _Forwarder(gm).run()
