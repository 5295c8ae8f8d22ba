"""Bands: a program cut by its layers, so that each part may run on a device of its own.

    layers 0 1 2 3    ->    layers 0 1  |  2 3        level t of band 1 reads what band 0 has made on
                            band 0      |  band 1     level t - 1 at the latest

Nothing is computed anew: each band has the groups, lanes, entries and feeds of its layers. A feed or a tap
whose reader is in another band becomes something that is sent.

Requires: a program with a skew above 0, and who reads its taps (`passes/emit/readers.py`).  Ensures: the
bands together do on each level what the program does, if what is sent on a level is received by the next
one.  Legality: each dependence goes to a later level, so that any program can be cut; where no two cells run
together bands would wait for each other, and the cut is refused by the dependence in the way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from torch import fx

from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.bands import Band, Cut, Division, Sent
from rmtcompile.ir.program import Feed, Group, Lane, Program, Tap
from rmtcompile.ir.randomness import is_random
from rmtcompile.passes.emit.readers import CALLER, Reader
from rmtcompile.passes.grid.dependence import Dependence
from rmtcompile.passes.grid.partition import EPILOGUE, INIT, PROLOGUE
from rmtcompile.schedule import blocking


def even(n_layers: int, count: int) -> tuple[range, ...]:
    """The layers in `count` bands: band p has layers p * L // P up to (p + 1) * L // P."""
    return _between([p * n_layers // count for p in range(count + 1)])


def balanced(
    costs: Sequence[float], count: int, prologue: float = 0.0, epilogue: float = 0.0, slack: float = 0.0
) -> tuple[range, ...]:
    """The layers in `count` bands whose largest cost is as small as it can be.

    Of several such divisions the one that is closest to `even`, which it is where all layers cost the same.

    Args:
        costs: of each layer.
        prologue, epilogue: what the first and the last band have to do besides.
        slack: by which share largest costs may differ that count as the same.

    Reference: the linear partition problem, by dynamic programming over the borders.
    """
    n_layers = len(costs)
    sums = [0.0, *accumulate(costs)]
    aim = [band.stop for band in even(n_layers, count)]

    def cost(p: int, start: int, stop: int) -> float:
        ends = (prologue if p == 0 else 0.0) + (epilogue if p == count - 1 else 0.0)
        return sums[stop] - sums[start] + ends

    def distance(p: int, start: int, stop: int) -> float:
        return abs(stop - aim[p]) if cost(p, start, stop) <= limit else float("inf")

    limit = _cheapest(n_layers, count, cost, max)[0] * (1 + max(slack, _ROUNDING))
    return _between(_cheapest(n_layers, count, distance, operator.add)[1])


_ROUNDING = 1e-9


def _cheapest(
    n_layers: int,
    count: int,
    price: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    """The division into `count` bands of at least one layer that has the lowest price, and its borders.

    Args:
        price: of band p from one layer up to another.
        join: the price of some bands and that of the next one.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}  # by the layers that bands so far have
    for p in range(count):
        best = {
            stop: min(
                (join(paid, price(p, start, stop)), (*borders, stop))
                for start, (paid, borders) in best.items()
                if start < stop
            )
            for stop in range(p + 1, n_layers - (count - p - 1) + 1)
        }
    return best[n_layers]


def _between(borders: Sequence[int]) -> tuple[range, ...]:
    return tuple(range(a, b) for a, b in pairwise(borders))


def check_cut(
    program: Program, count: int, dependences: Mapping[tuple[int, int], Dependence], paths: Sequence[str]
) -> None:
    """Whether a program can be cut into so many bands that work at the same time.

    Args:
        dependences: the offsets with their witnesses.
        paths: module paths of the layers.

    Raises:
        UnsupportedError: there are fewer layers than bands; a dependence leaves one cell a level; or what is
            the same for all bands is drawn at random.
    """
    n_layers = program.n_layers
    if count > n_layers:
        raise UnsupportedError(
            f"{n_layers} layers cannot be cut into {count} bands", remedy=f"use at most {n_layers} devices"
        )
    if count == 1:
        return
    if blocked := blocking(program.offsets, n_layers):
        raise UnsupportedError(
            "the layers cannot be cut into bands that work at the same time: each level is one cell wide",
            [dependences[offset].described(tuple(paths)) for offset in blocked],
            "run it on one device",
        )
    for node in _random_in_init(program):
        raise UnsupportedError(
            "what all segments read is drawn at random, and each band would draw its own",
            [f"{node.name} = {node.target}   {node.meta.get('source', '')}"],
            "run it on one device",
        )


def _random_in_init(program: Program) -> Iterator[fx.Node]:
    for rule in program.rolled.rules[(INIT, -1)].values():
        yield from (n for n in rule.body.nodes if n.op == "call_function" and is_random(n))


def cut(program: Program, readers: Mapping[str, frozenset[Reader]], division: Division) -> Cut:
    """Cut a program into bands; see the module docstring.

    Args:
        readers: of each tap.
        division: the layers of each band, ascending, all of them.
    """
    assert program.alpha, "a program with alpha = 0 runs layer by layer"
    home = {layer: p for p, own in enumerate(division.layers) for layer in own}
    bands = (_band(program, readers, p, own, home) for p, own in enumerate(division.layers))
    return Cut(program, tuple(bands), division)


def _band(
    program: Program,
    readers: Mapping[str, frozenset[Reader]],
    index: int,
    own: range,
    home: Mapping[int, int],
) -> Band:
    groups = tuple(g for group in program.groups if (g := _group(group, own)).layers)
    lanes = tuple(lane for one in program.lanes if (lane := _lane(one, own)).layers or lane.feeds)
    sends = [sent for lane in program.lanes for sent in _sent_into(lane, own, home)]
    makes, reads = set(), set()
    for tap in program.taps:
        wanted = {_band_of(reader, home) for reader in readers.get(tap.name, ()) if reader != CALLER}
        if index in wanted:
            reads.add(tap.name)
        if _made_in(tap, home) == index:
            makes.add(tap.name)
            sends += [Sent(target, tap.name, tap.value.layer) for target in sorted(wanted - {index})]
    part = replace(program, groups=groups, lanes=lanes, band=own)
    return Band(index, own, part, tuple(dict.fromkeys(sends)), frozenset(makes), frozenset(reads))


def _band_of(reader: Reader, home: Mapping[int, int]) -> int:
    if reader == PROLOGUE:
        return home[0]
    return home[max(home)] if reader == EPILOGUE else home[int(reader)]


def _made_in(tap: Tap, home: Mapping[int, int]) -> int:
    return _band_of(tap.value.layer if tap.value.layer >= 0 else tap.value.kind, home)


def _group(group: Group, own: range) -> Group:
    return replace(group, layers=tuple(layer for layer in group.layers if layer in own))


def _lane(lane: Lane, own: range) -> Lane:
    """The part of a lane for some layers. What its cells send on has a spare place, so that the results of a
    window still are one slice."""
    known, beyond = set(lane.places), set()
    feeds = []
    for feed in lane.feeds:
        kept = [layer for layer in feed.layers if layer in own]
        places = {layer: layer + feed.offset[1] for layer in kept}
        beyond |= {place for place in places.values() if feed.group and place in known and place not in own}
        inside = tuple(layer for layer in kept if places[layer] in own)
        feeds.append(Feed(feed.group, feed.source, feed.offset, inside))
    layers = tuple(layer for layer in lane.layers if layer in own)
    spare = {layer for layer in lane.spare if layer in own}
    return replace(
        lane,
        layers=layers,
        entries=tuple(entry for entry in lane.entries if entry.layer in own),
        feeds=tuple(feed for feed in feeds if feed.layers),
        spare=tuple(sorted(spare | beyond)),
    )


def _sent_into(lane: Lane, own: range, home: Mapping[int, int]) -> Iterator[Sent]:
    """What the cells of a band put in places of a lane that are another band's."""
    for feed in lane.feeds:
        for layer in feed.layers:
            place = layer + feed.offset[1]
            if layer in own and place in lane.layers and place not in own:
                yield Sent(home[place], lane.name, layer, feed.group, feed.source, place)


__all__ = ["balanced", "check_cut", "cut", "even"]
