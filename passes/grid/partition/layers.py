"""Layers: sibling modules that the forward calls in turn, once a segment."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import fx

from rmtcompile.binding.captured import Call
from rmtcompile.errors import PartitionError
from rmtcompile.passes.grid.partition.regions import Layers, NoLayersError


def split_index(path: str) -> tuple[str, int] | None:
    """`blocks.3` -> ("blocks.", 3), `layer2` -> ("layer", 2); None where the path does not end in a
    number."""
    match = re.fullmatch(r"(.*?)(\d+)(\]?)", path)
    return (match[1], int(match[2])) if match else None


def find_layers(
    calls: Sequence[Call],
    size: dict[int, int],
    n_segments: int,
    layers: str | None = None,
    feeds: Callable[[int, int], bool] = lambda above, below: True,
) -> Layers:
    """Find the modules that are called in turn, once (or equally often) a segment, and hold most of the work.

    Lists beside them belong to the layers too, if they hold a good part of the work, or if the layers do not
    feed each other without them.

    Args:
        calls: module calls in the order of the forward.
        size: nodes traced inside each call, nested calls included.
        n_segments: segments in this capture.
        layers: override: the path of the container (`model.layers`) or a regular expression for the layers'
            paths.
        feeds: whether what is computed in the call of the first index is read, in the end, in that of the
            second.

    Raises:
        NoLayersError: no such family.
        PartitionError: its members are not called equally often in each segment.
    """
    families: dict[tuple[str | None, str], list[Call]] = defaultdict(list)
    for call in calls:
        parent = None if call.parent is None else calls[call.parent].path
        if layers is not None:
            if re.fullmatch(layers, call.path) or re.fullmatch(
                rf"{re.escape(layers)}\.?\[?\d+\]?", call.path
            ):
                families[(None, layers)].append(call)
            continue
        indexed = split_index(call.path)
        families[(parent, indexed[0] if indexed else call.path)].append(call)
    if layers is not None and not families:
        raise _no_such(layers, calls)
    total = max((size.get(call.index, 0) for call in calls if call.parent is None), default=0) or sum(
        size.values()
    )
    covers = {key: sum(size.get(c.index, 0) for c in found) for key, found in families.items()}
    positions = {key: len(found) / n_segments for key, found in families.items()}
    usable = {key for key in families if len(families[key]) % n_segments == 0 and covers[key] > 0}
    several = [key for key in usable if positions[key] >= 2]
    single = [
        key for key in usable if positions[key] == 1 and key[0] is not None and split_index(f"{key[1]}0")
    ]
    best = max(several, key=lambda key: covers[key], default=None)
    outer = max(
        (key for key in single if split_index(families[key][0].path)),
        key=lambda key: covers[key],
        default=None,
    )
    if outer is not None and (best is None or covers[best] < 0.6 * covers[outer]):
        best = outer
    if best is None:
        raise NoLayersError(
            "no repeated layers were found among the module calls",
            [
                f"{key[1]}: {len(found)} calls for {n_segments} segments"
                for key, found in list(families.items())[:8]
            ],
            "name the layers with layers='path.to.container', or check that the model walks segments and "
            "layers",
        )
    chosen = [best]
    if layers is None and split_index(families[best][0].path):
        beside = {
            k: families[k] for k in several + single
            if k != best and k[0] == best[0] and split_index(families[k][0].path)
        }  # fmt: skip
        small = {k for k in beside if covers[k] < 0.05 * max(1, total)}
        row = families[best][: len(families[best]) // n_segments]
        taken = _needed(row, families[best], {k: beside[k] for k in small}, feeds)
        chosen += [k for k in beside if k not in small or k in taken]
    members = sorted((c for key in chosen for c in families[key]), key=lambda call: call.index)
    return _grid(members, n_segments)


def _no_such(layers: str, calls: Sequence[Call]) -> NoLayersError:
    """What to say where nothing that is called has the path that the user names: which paths are near."""
    found: dict[str, None] = {}
    for call in calls:
        indexed = split_index(call.path)
        found[indexed[0].rstrip(".[") if indexed else call.path] = None
    found.pop("", None)
    near = difflib.get_close_matches(layers, found, n=3, cutoff=0.4)
    lines = [f"nearest: {', '.join(near)}"] if near else [f"there are: {', '.join(list(found)[:8])}"]
    remedy = f"layers={near[0]!r}" if near else "name the container that the forward walks"
    return NoLayersError(
        f"layers={layers!r}: no module that the forward calls has such a path",
        lines if found else [],
        f"{remedy}, or leave layers out: they are found from the graph",
    )


def _needed(
    row: list[Call],
    layers: list[Call],
    small: dict[tuple[str | None, str], list[Call]],
    feeds: Callable[[int, int], bool],
) -> set[tuple[str | None, str]]:
    """Small lists called in turn with the layers, which do not feed each other in `row`, a segment, without
    them."""
    in_turn = {key for key, calls in small.items() if _in_turn(layers, calls)}
    return set() if in_turn and all(feeds(a.index, b.index) for a, b in pairwise(row)) else in_turn


def _in_turn(a: list[Call], b: list[Call]) -> bool:
    """Whether two lists of modules are called in turn, index by index: `mix.0`, `write.0`, `mix.1`, ..."""
    calls = sorted((*a, *b), key=lambda call: call.index)
    pairs = list(zip(calls[::2], calls[1::2], strict=False))
    lists = {(split_index(x.path) or ("",))[0] for x in calls[::2]}
    indices = [(split_index(x.path), split_index(y.path)) for x, y in pairs]
    return (
        len(a) == len(b)
        and len(lists) == 1
        and all(x is not None and y is not None and x[1] == y[1] for x, y in indices)
    )


def _grid(members: list[Call], n_segments: int) -> Layers:
    """Give each layer call its (segment, layer): a module is called equally often in each segment."""
    counts: dict[int, int] = defaultdict(int)
    for call in members:
        counts[call.module] += 1
    uneven = [call for call in members if counts[call.module] % n_segments]
    if uneven:
        raise PartitionError(
            "layers are not called equally often in each segment",
            [f"{call.path}: {counts[call.module]} calls for {n_segments} segments" for call in uneven[:6]],
            "layers whose number of calls depends on the segment or on data cannot be scheduled; use "
            "fallback='sequential' to run the model as it is",
        )
    orders = [order(members, n_segments) for order in (_by_segment, _by_layer, _in_turns)]
    rows = next((found for found in orders if _are_alike(found)), None)
    if rows is None:
        raise PartitionError(
            "the order in which layers are called differs between segments",
            [f"segment {s}: " + ", ".join(c.path for c in row) for s, row in enumerate(orders[0][:3])],
            "call the layers in one order, or use fallback='sequential'",
        )
    layer_of = _merge_columns(rows[0])
    paths: dict[int, list[str]] = defaultdict(list)
    for call, layer in zip(rows[0], layer_of, strict=True):
        paths[layer].append(call.path)
    cells = {
        call.index: (s, layer)
        for s, row in enumerate(rows)
        for call, layer in zip(row, layer_of, strict=True)
    }
    return Layers(tuple(" + ".join(paths[layer]) for layer in sorted(paths)), cells)


def _by_segment(members: list[Call], n_segments: int) -> list[list[Call]]:
    """All layers of a segment, then those of the next."""
    each = len(members) // n_segments
    return [members[s * each : (s + 1) * each] for s in range(n_segments)]


def _by_layer(members: list[Call], n_segments: int) -> list[list[Call]]:
    """All segments of a layer, then those of the next."""
    return [members[s::n_segments] for s in range(n_segments)]


def _in_turns(members: list[Call], n_segments: int) -> list[list[Call]]:
    """Anything between: several modules of a layer in turn, segment by segment, then those of the next."""
    counts: dict[int, int] = defaultdict(int)
    for call in members:
        counts[call.module] += 1
    rows: list[list[Call]] = [[] for _ in range(n_segments)]
    met: dict[int, int] = defaultdict(int)
    for call in members:
        rows[met[call.module] * n_segments // counts[call.module]].append(call)
        met[call.module] += 1
    return rows


def _are_alike(rows: list[list[Call]]) -> bool:
    """Whether all segments call the same modules in the same order."""
    order = [call.module for call in rows[0]]
    return all([call.module for call in row] == order for row in rows)


def _merge_columns(row: list[Call]) -> list[int]:
    """Neighbouring calls with one index in several containers (`attn.3`, `ffn.3`, `writers.3`) are one
    layer, in which a module may be called twice running."""
    keys = [split_index(call.path) for call in row]
    layer_of: list[int] = []
    seen: set[str] = set()
    for i, key in enumerate(keys):
        before = keys[i - 1] if i else None
        joins = key is not None and before is not None and key[1] == before[1]
        joins = joins and (key[0] not in seen or (key == before and len(seen) > 1))  # type: ignore[index]
        if not joins:
            seen = set()
        seen.add(key[0] if key else "")
        layer_of.append(layer_of[-1] + (not joins) if layer_of else 0)
    return layer_of


def feeding(graph: fx.Graph) -> Callable[[int, int], bool]:
    """Tells whether a value made in one call, by its index, is read in the end in another one."""

    def feeds(above: int, below: int) -> bool:
        reached: set[fx.Node] = set()
        for node in graph.nodes:
            scope = node.meta.get("scope", ())
            if above in scope or not reached.isdisjoint(node.all_input_nodes):
                if below in scope:
                    return True
                reached.add(node)
        return False

    return feeds


def call_sizes(graph: fx.Graph, calls: Sequence[Call]) -> dict[int, int]:
    """Nodes traced inside each call, nested calls included."""
    size: dict[int, int] = defaultdict(int)
    for node in graph.nodes:
        if node.op == "call_function":
            for index in set(node.meta.get("scope", ())):
                size[index] += 1
    return size
