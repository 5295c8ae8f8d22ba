"""The zoo is what it says: models run, repeat themselves, and have the offsets that their entries state."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .others import ZOO, ZooEntry

Cell = tuple[int, int]

GRIDS: dict[str, Callable[[Any], list[nn.Module]]] = {
    "parallel_rmt": lambda m: list(m.layers),
    "infini_attention": lambda m: list(m.blocks),
    "transformer_xl": lambda m: list(m.layers),
    "gru_time_major": lambda m: list(m.cells),
    "lstm_layer_major": lambda m: list(m.cells),
    "classic_rmt": lambda m: list(m.layers),
    "skewed": lambda m: list(m.layers),
    "sliced_state": lambda m: list(m.layers),
    "stacked_memories": lambda m: list(m.layers),
    "rolled_memories": lambda m: list(m.layers),
    "rolled_serial": lambda m: list(m.layers),
    "universal": lambda m: [m.block] * m.depth,
    "alias_trap": lambda m: list(m.layers),
    "shared_scratch": lambda m: list(m.layers),
    "compressed_older": lambda m: list(m.layers),
    "named_outputs": lambda m: list(m.layers),
    "skip_connections": lambda m: list(m.layers),
    "no_carry": lambda m: list(m.layers),
}
"""Where the cells are the calls of modules, and nothing is carried past them in glue."""


def clone(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def differ(left: Any, right: Any) -> bool:
    pairs = zip(tree_leaves(left), tree_leaves(right), strict=True)
    return any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in pairs)


class Probe:
    """Which cells see the output of which others, by intervention and not by reading code.

    A first run records what enters and leaves each cell.  Then, for each cell, a run in which every cell
    gives what was recorded except that one, whose output is perturbed: a cell whose input differs from the
    record depends on it directly.
    """

    def __init__(self, run: Callable[[], Any], layers: list[nn.Module]) -> None:
        self.run, self.layers = run, layers
        self.entered: dict[Cell, Any] = {}
        self.left: dict[Cell, Any] = {}
        self.perturbed: Cell | None = None
        self.changed: set[Cell] = set()
        self.calls: Counter[int] = Counter()

    def cell(self, module: nn.Module) -> Cell:
        owners = [i for i, layer in enumerate(self.layers) if layer is module]
        s, among = divmod(self.calls[id(module)], len(owners))
        return s, owners[among]

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        cell = self.cell(module)
        if cell not in self.entered:
            self.entered[cell] = clone((args, kwargs))
        elif differ((args, kwargs), self.entered[cell]):
            self.changed.add(cell)

    def leave(self, module: nn.Module, args: Any, out: Any) -> Any:
        cell = self.cell(module)
        self.calls[id(module)] += 1
        if cell not in self.left:
            self.left[cell] = clone(out)
            return out
        if cell == self.perturbed:
            return tree_map(lambda leaf: leaf + torch.rand_like(leaf), self.left[cell])
        return clone(self.left[cell])

    def edges(self) -> set[tuple[Cell, Cell]]:
        """Pairs (producer, consumer)."""
        unique = {id(layer): layer for layer in self.layers}.values()
        handles = [layer.register_forward_pre_hook(self.enter, with_kwargs=True) for layer in unique]
        handles += [layer.register_forward_hook(self.leave) for layer in unique]
        found = set()
        self.run()
        for producer in list(self.left):
            self.perturbed, self.changed = producer, set()
            self.calls.clear()
            self.run()
            found |= {(producer, consumer) for consumer in self.changed}
        for handle in handles:
            handle.remove()
        return found


@pytest.mark.parametrize("name", ZOO)
def test_runs_and_repeats(name: str) -> None:
    entry = ZOO[name]
    model, inputs = entry.build(), entry.inputs(2, 3)
    with torch.no_grad():
        first, second = model(*inputs), model(*inputs)
        one = entry.build()(*entry.inputs(1, 1))
    assert not differ(first, second)
    assert all(leaf.dtype == torch.float64 and leaf.isfinite().all() for leaf in tree_leaves((first, one)))
    if isinstance(first, Tensor):
        assert first.shape[:2] == (2, 3 * entry.segment) and one.shape[:2] == (1, entry.segment)


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.ragged])
@torch.no_grad()
def test_last_segment_may_be_shorter(name: str) -> None:
    entry = ZOO[name]
    (x,) = entry.inputs(2, 3)
    whole, part = (next(iter(tree_leaves(entry.build()(v)))) for v in (x, x[:, :-1]))
    before = (slice(None), slice(2 * entry.segment))
    torch.testing.assert_close(part[before], whole[before])


@pytest.mark.parametrize("name", ZOO)
def test_trains_if_it_says_so(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    model(*entry.inputs(1, 1))  # a second forward has to work in training too
    loss = sum(leaf.square().sum() for leaf in tree_leaves(model(*entry.inputs(2, 3))))
    if entry.trains:
        loss.backward()
    else:
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|does not require grad"):
            loss.backward()


@pytest.mark.parametrize("name", [name for name in ZOO if name != "no_carry"])
def test_early_segments_reach_the_last(name: str) -> None:
    entry = ZOO[name]
    model, (x,) = entry.build(), entry.inputs(2, 4)
    other = x.clone()
    other[:, : entry.segment] = entry.inputs(2, 1, seed=1)[0]
    with torch.no_grad():
        last, changed = (list(tree_leaves(model(v)))[-1][:, -1] for v in (x, other))
    assert (last - changed).abs().max() > 1e-5


@pytest.mark.parametrize("name", GRIDS)
def test_offsets_are_those_stated(name: str) -> None:
    entry = ZOO[name]
    model, inputs = entry.build(), entry.inputs(1, 4)
    layers = GRIDS[name](model)
    assert len(layers) == entry.n_layers
    with torch.no_grad():
        edges = Probe(lambda: model(*inputs), layers).edges()
    offsets = {(to[0] - of[0], to[1] - of[1]) for of, to in edges}
    assert offsets == entry.offsets


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if not entry.refused])
def test_skew_and_parallelism_follow_from_offsets(name: str) -> None:
    entry: ZooEntry = ZOO[name]
    skew = max((math.ceil((1 - dl) / ds) for ds, dl in entry.offsets if ds > 0), default=0)
    assert entry.skew == skew
    assert entry.parallel == (skew < entry.n_layers)


@torch.no_grad()
def test_the_alias_decides_the_answer() -> None:
    """Layer 0 of the second segment sees what layer 1 wrote, and nothing that it wrote itself."""
    entry = ZOO["alias_trap"]
    model, inputs = entry.build(), entry.inputs(1, 2)
    edges = Probe(lambda: model(*inputs), GRIDS["alias_trap"](model)).edges()
    assert ((0, 1), (1, 0)) in edges and ((0, 0), (1, 0)) not in edges
