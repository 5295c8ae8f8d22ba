"""Loads of scatters, and stores that amount to less."""

from __future__ import annotations

import torch
from torch import fx

from rmtcompile.passes.flat.functionalise import bind, overload_name
from rmtcompile.passes.flat.store_forwarding.constants import positions
from rmtcompile.passes.flat.store_forwarding.loads import Loads, Rule
from rmtcompile.passes.flat.store_forwarding.nodes import View, as_load, is_static_tensor, shape_of, val_of
from rmtcompile.passes.flat.store_forwarding.ranges import Range, covers, runs_of, slice_range

aten = torch.ops.aten


def store_of(x: fx.Node) -> tuple[fx.Node, fx.Node, int, Range] | None:
    """Base, stored value, dimension and range of a scatter that converts nothing."""
    bound = bind(x)
    base, src, dim = bound["self"], bound["src"], bound["dim"] % len(shape_of(x))
    if not is_static_tensor(src) or not is_static_tensor(base) or val_of(src).dtype != val_of(x).dtype:
        return None
    size = shape_of(x)[dim]
    if overload_name(x) == "slice_scatter":
        stored = slice_range(size, bound["start"], bound["end"], bound["step"])
        return None if stored is None else (base, src, dim, stored)
    if not isinstance(bound["index"], int):
        return None
    return base, src, dim, Range(bound["index"] % size, 1, 1, True)


def put(w: Loads, base: fx.Node, src: fx.Node, d: int, stored: Range) -> fx.Node:
    """The store itself, or what it amounts to."""
    found = try_put(w, base, src, d, stored)
    if found is not None:
        return found
    if stored.drop:
        return w.emit(aten.select_scatter.default, base, src, d, stored.lo)
    end = stored.at(stored.n - 1) + 1
    return w.emit(aten.slice_scatter.default, base, src, d, stored.lo, end, stored.step)


def try_put(w: Loads, base: fx.Node, src: fx.Node, d: int, stored: Range) -> fx.Node | None:
    """A store of everything is what is stored; what it overwrites need not be stored before."""
    if stored.n == shape_of(base)[d]:
        return w.reshape(src, shape_of(base))
    view = as_load(src)
    if view == View(base, d, stored) and w.is_open(src):
        return base
    below = base
    while overload_name(below) in ("select_scatter", "slice_scatter") and w.is_open(below):
        earlier = store_of(below)
        if earlier is None or earlier[2] != d or not covers(stored, earlier[3]):
            break
        below = earlier[0]
    return None if below is base else put(w, below, src, d, stored)


def _load_past_store(
    w: Loads, store: tuple[fx.Node, fx.Node, int, Range], d: int, r: Range
) -> fx.Node | None:
    """A load of another dimension than the one that the store cuts: store what is loaded of both."""
    base, src, at, stored = store
    below = d - (stored.drop and d > at)
    of_base, of_src = w.try_load(base, d, r), w.try_load(src, below, r)
    if of_base is None and of_src is None:
        return None
    of_base = w.take(base, d, r) if of_base is None else of_base
    of_src = w.take(src, below, r) if of_src is None else of_src
    return put(w, of_base, of_src, at - (r.drop and d < at), stored)


def load_select_scatter(w: Loads, x: fx.Node, d: int, r: Range) -> fx.Node | None:
    """Of a stored element: the element, or what lies beside it."""
    store = store_of(x)
    if store is None:
        return None
    base, src, at, stored = store
    if d != at:
        return _load_past_store(w, store, d, r)
    k, rest = divmod(stored.lo - r.lo, r.step)
    if rest or not 0 <= k < r.n:
        return w.load(base, d, r)
    if r.n == 1:
        return src if r.drop else w.reshape(src, (*shape_of(src)[:d], 1, *shape_of(src)[d:]))
    found = w.try_load(base, d, r)
    return None if found is None else put(w, found, src, d, Range(k, 1, 1, True))


def load_slice_scatter(w: Loads, x: fx.Node, d: int, r: Range) -> fx.Node | None:
    """Of a stored piece: pieces of it and of what lies beside it."""
    store = store_of(x)
    if store is None:
        return None
    if d != store[2]:
        return _load_past_store(w, store, d, r)
    return _load_pieces(w, store, d, r)


def load_indexed(w: Loads, x: fx.Node, d: int, r: Range) -> fx.Node | None:
    """Of what was stored by index: the same, where the positions are known and evenly spaced.

    The store itself stays as it is: as integers its positions would tell the segments from each other.
    """
    store = _indexed_store(w, x)
    return None if store is None or d != store[2] else _load_pieces(w, store, d, r)


def _indexed_store(w: Loads, x: fx.Node) -> tuple[fx.Node, fx.Node, int, Range] | None:
    """Base, stored value, dimension and range of `index_copy`, or of `index_put` along one dimension."""
    bound = bind(x)
    base = bound["self"]
    if overload_name(x) == "index_copy":
        src, at, index = bound["source"], bound["dim"] % max(len(shape_of(x)), 1), bound["index"]
    else:
        given = [(k, i) for k, i in enumerate(bound["indices"]) if i is not None]
        if len(given) != 1 or bound["accumulate"]:
            return None
        src, (at, index) = bound["values"], given[0]
    if not is_static_tensor(src) or not is_static_tensor(base) or val_of(src).dtype != val_of(x).dtype:
        return None
    stored = positions(w, index, shape_of(x)[at])
    if stored is None or shape_of(src) != (*shape_of(x)[:at], stored.n, *shape_of(x)[at + 1 :]):
        return None
    return base, src, at, stored


def _load_pieces(
    w: Loads, store: tuple[fx.Node, fx.Node, int, Range], d: int, r: Range
) -> fx.Node | None:
    """A load of the dimension that the store cuts."""
    base, src, _, stored = store
    runs = runs_of(r, stored)
    if runs is None or (w.holds and len(runs) > 1):
        return None
    pieces = [w.load(src if inside else base, d, piece) for inside, piece in runs]
    return w.join(aten.cat.default, pieces, d)


def stored(w: Loads, node: fx.Node) -> fx.Node | None:
    """What a scatter amounts to, if that is less than a scatter."""
    store = store_of(node)
    return None if store is None else try_put(w, *store)


RULES: dict[str, Rule] = {
    "select_scatter": load_select_scatter,
    "slice_scatter": load_slice_scatter,
    **dict.fromkeys(("index_copy", "index_put", "_unsafe_index_put"), load_indexed),
}
