"""Cases of tests/ranks.py in which ranks do different things, or one of them fails."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from rank_models import (
    DEVICES,
    Failing,
    broken,
    count_replays,
    features,
    gradients,
    made,
    of_zoo,
    optimized,
    recording,
    refused,
)
from toys import Toy, Uneven, assert_same


def other_programs(rank: int, group: Any) -> Any:
    """Costs are measured on one rank only."""
    model = made(lambda: Uneven([8, 8, 4096]) if rank == 1 else Toy(3, d=16))
    return refused(lambda: optimized(model, group)(features(4, d=16)))


def other_weights(rank: int, group: Any) -> Any:
    model = made(lambda: Toy(4), seed=rank)
    return refused(lambda: optimized(model, group)(features(4)))


def other_lengths(rank: int, group: Any) -> Any:
    fast = optimized(made(lambda: Toy(4)), group)
    fast(features(4))
    return refused(lambda: fast(features(4 + rank)))


def recorded_elsewhere(rank: int, group: Any) -> Any:
    """One rank cannot record: all launch."""
    model = made(lambda: Toy(4))
    fast = optimized(copy.deepcopy(model), group)
    executor = recording(fast, features(5))
    if rank == 0:
        executor.replays.forget()
        executor.replays._obstacle = "out of order"
    seen = count_replays(executor)
    for segments in (5, 7):
        assert_same(model(features(segments)), fast(features(segments)))
    return [seen, executor.recorded]


def recorded_failing(rank: int, group: Any) -> Any:
    """A rank cannot go on with its recordings: all run again; a rank raises: all say so."""
    model = made(lambda: Toy(4))
    fast = optimized(copy.deepcopy(model), group)
    executor = recording(fast, features(5))
    band = executor.replays._bands[rank]
    play = band.play
    if rank == 1:
        band.play = lambda block, *rest: None if block.levels.start == 3 else play(block, *rest)
    assert_same(model(features(6)), fast(features(6)))
    if rank == 1:
        band.play = broken
    return refused(lambda: fast(features(6)))


def failing(rank: int, group: Any) -> Any:
    fast = optimized(made(Failing), group)
    ids = torch.zeros(1, 12, dtype=torch.long, device=DEVICES[-1])
    fast(ids)
    executor = fast._last[0].executor
    executor._use_graphs = False  # recordings do not call what is broken here
    if rank == 1:
        executor.members[1].functions["CELLS"]["layers"] = broken
    return refused(lambda: fast(ids))


@torch.enable_grad()
def backward_failing(rank: int, group: Any) -> Any:
    """The backward of one rank fails on a level: all say so, and go on together."""
    model = made(lambda: Toy(4))
    other = copy.deepcopy(model)
    fast = optimized(other, group)
    gradients(fast, other, features(5))
    cells = fast._last[0].executor.members[rank].functions["CELLS"]
    whole = cells["layers"]

    def hooked(*args: Any) -> Any:
        found = whole(*args)
        next(iter(found.values())).register_hook(broken)
        return found

    if rank == 1:
        cells["layers"] = hooked
    told = refused(lambda: gradients(fast, other, features(5)))
    cells["layers"] = whole
    x = features(6)
    assert_same(gradients(model, model, x), gradients(fast, other, x), 1e-9)
    return told


@torch.enable_grad()
def backward_and_call(rank: int, group: Any) -> Any:
    """One rank goes on with another call where the others run backward."""
    fast = optimized(made(lambda: Toy(4)), group)
    x = features(5)
    loss = fast(x).square().sum()
    return refused(loss.backward if rank else lambda: fast(x))


@torch.enable_grad()
def other_orders(rank: int, group: Any) -> Any:
    """Backward of two runs, in another order on one rank."""
    fast = optimized(made(lambda: Toy(4)), group)
    losses = [fast(features(5)).square().sum(), fast(features(5) + 1).square().sum()]
    return refused((losses[0] if rank else losses[1]).backward)


@torch.enable_grad()
def other_losses(rank: int, group: Any) -> Any:
    """One rank's loss is zero, or another one; then all go on together."""
    model = made(lambda: Toy(4))
    other = copy.deepcopy(model)
    fast = optimized(other, group)
    x = features(5)
    told = [
        refused((fast(x).square().sum() * factor).backward)
        for factor in (float(rank != 1), 1.0 + rank, float("nan") if rank == 1 else 1.0)
    ]
    assert_same(gradients(model, model, x), gradients(fast, other, x), 1e-9)
    return told


def state_on_one(rank: int, group: Any) -> Any:
    """One rank begins a text, the others go on with one: all are told, whatever they were about to try."""
    model = made(lambda: Uneven([8, 8, 512, 8]))
    fast = optimized(copy.deepcopy(model), group)
    x = features(6, d=16)
    _, state = fast.run(x[:, :6])
    told = refused(lambda: fast.run(x[:, 6:13], state=state if rank else None), Exception)
    assert_same(model(x), fast(x))
    return told


def failing_with_caches(rank: int, group: Any) -> Any:
    """What others wait for has no known size, and the one message says what has happened."""
    model, x = of_zoo("growing_cache", 5)
    fast = optimized(model, group)
    fast(x)
    cells = fast._last[0].executor.members[rank].functions["CELLS"]
    if rank == 0:
        cells.update(dict.fromkeys(cells, broken))
    return refused(lambda: fast(x))


def without_gradients_on_one(rank: int, group: Any) -> Any:
    fast = optimized(made(lambda: Toy(4)), group)
    with torch.set_grad_enabled(rank == 0):
        return refused(lambda: fast(features(4)))


@torch.enable_grad()
def undoable(rank: int, group: Any) -> Any:
    """Gradients of a weight that is computed; a transform; gradients of gradients."""
    model = made(lambda: Toy(4))
    fast = optimized(model, group)
    fast(features(4))
    layer = next(iter(model.layers))
    weight = layer.mix.weight
    del layer.mix._parameters["weight"]
    layer.mix.weight = weight * 2
    other, x = optimized(made(lambda: Toy(4)), group), features(4).requires_grad_()
    return [
        refused(lambda: fast(features(4))),
        refused(lambda: torch.func.jvp(fast, (features(4),), (features(4),))),
        refused(lambda: torch.autograd.grad(other(x).sum(), x, create_graph=True)),
    ]


def leaving(rank: int, group: Any) -> Any:
    fast = optimized(made(lambda: Toy(4)), group)
    fast(features(4))
    if rank == 0:
        os._exit(0)  # without a word to anybody
    return refused(lambda: fast(features(5)))


def late(rank: int, group: Any) -> Any:
    """One rank fails before its first level; then all go on together."""
    model = made(lambda: Toy(4))
    fast = optimized(copy.deepcopy(model), group)
    x = features(4)
    told = refused(lambda: fast(x if rank != 1 else "no tensor"), Exception)
    assert_same(model(x), fast(x))
    return told


def persisting(rank: int, group: Any) -> Any:
    """After a call that was another one on one rank, and whose error was caught, all go on together."""
    model = made(lambda: Uneven([8, 8, 512, 8]))
    fast = optimized(copy.deepcopy(model), group)
    x = features(4, d=16)
    told = refused(lambda: fast(x if rank != 1 else x.float()), Exception)
    for segments in (4, 4, 6):
        x = features(segments, d=16)
        assert_same(model(x), fast(x))
    return told


def setup(rank: int, group: Any) -> Any:
    """One rank fails before its first level, when all have agreed to run."""
    fast = optimized(made(lambda: Toy(4)), group)
    fast(features(4))
    executor = fast._last[0].executor
    executor._use_graphs = False
    if rank == 1:
        executor.members[1].functions["setup"] = broken
    return refused(lambda: fast(features(4)))


def profile_and_call(rank: int, group: Any) -> Any:
    fast = optimized(made(lambda: Toy(4)), group)
    x = features(4)
    fast(x)
    return refused(lambda: fast.profile(x) if rank == 1 else fast(x))


class Buffered(Toy):
    """Reads a buffer in each segment."""

    def __init__(self, scale: float) -> None:
        super().__init__(4)
        self.register_buffer("scale", torch.full((), scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.scale)


def other_buffers(rank: int, group: Any) -> Any:
    return refused(lambda: optimized(made(lambda: Buffered(1.0 + rank)), group)(features(4)))


ALL = (
    other_programs, other_weights, other_lengths, recorded_elsewhere, recorded_failing, failing,
    backward_failing, backward_and_call, other_orders, other_losses, state_on_one,
    failing_with_caches,
    without_gradients_on_one, undoable, late, persisting, setup, profile_and_call, other_buffers, leaving,
)  # fmt: skip
