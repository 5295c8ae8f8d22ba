"""Other people's recurrences, and what is expected of each: `ZOO[name]`.

A dependence offset is (segments, layers), consumer cell minus producer cell.  A cell is what one layer
does for one segment, with the glue that belongs to it (its residual connection, its memory update).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import cells, hybrids, memories, storage, traps
from .blocks import features, tokens

ARMT_OFFSETS = frozenset({(0, 1), (1, 0)})


@dataclass(frozen=True)
class ZooEntry:
    """One model of the zoo.

    Attributes:
        make: makes the model with its defaults; called under a fixed seed by `build`.
        offsets: the dependence offsets expected with enough segments (empty for models that must be refused).
        parallel: whether some wavefront has more than one cell.
        n_layers: number of layers.
        segment: tokens (or steps) in a segment.
        skew: k of level = l + k * s where that form describes the levels, else None.
        refused: whether a compiler has to refuse it.
        rerolls: whether constants are affine in s, so that any number of segments can be predicted from a
            few.
        trains: whether the model itself can be differentiated (in-place writes may forbid it).
        ragged: whether the last segment may be shorter.
        d: feature size of float inputs; 0 for models that take tokens.
    """

    make: Callable[[], Any]
    offsets: frozenset[tuple[int, int]] = ARMT_OFFSETS
    parallel: bool = True
    n_layers: int = 4
    segment: int = 4
    skew: int | None = 1
    refused: bool = False
    rerolls: bool = True
    trains: bool = True
    ragged: bool = True
    d: int = 0

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Callable[..., Any]:
        """The model with random weights, in eval mode; the global random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
        if isinstance(model, nn.Module):
            return model.to(dtype).eval()
        assert dtype == torch.float64, "models that are plain functions are float64"
        return model

    def inputs(
        self, batch: int, segments: int, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> tuple[Tensor]:
        """Tokens i64[batch, segments * segment], or features f[batch, segments * segment, d]."""
        if self.d:
            return features(batch, segments * self.segment, self.d, dtype, seed)
        return tokens(batch, segments, self.segment, seed)


def _offsets(*pairs: tuple[int, int]) -> frozenset[tuple[int, int]]:
    return frozenset({(0, 1), *pairs})


ZOO: dict[str, ZooEntry] = {
    "parallel_rmt": ZooEntry(memories.ParallelRMT),
    "infini_attention": ZooEntry(memories.InfiniTransformer),
    "block_recurrent": ZooEntry(memories.BlockRecurrent),
    "transformer_xl": ZooEntry(memories.TransformerXL, _offsets((1, 1)), skew=0),
    "gru_time_major": ZooEntry(cells.TimeMajorGRU, segment=1, ragged=False, d=8),
    "lstm_layer_major": ZooEntry(cells.LayerMajorLSTM, segment=1, ragged=False, d=8),
    "gru_residual": ZooEntry(cells.ResidualGRU, n_layers=5, segment=1, ragged=False, d=8),
    "classic_rmt": ZooEntry(memories.ClassicRMT, _offsets((1, -3)), parallel=False, skew=4),
    "skewed": ZooEntry(memories.Skewed, _offsets((1, -2)), n_layers=5, skew=3),
    "sliced_state": ZooEntry(storage.SlicedState, trains=False),
    "stacked_memories": ZooEntry(storage.StackedMemories),
    "rolled_memories": ZooEntry(
        functools.partial(storage.StackedMemories, roll=-1), _offsets((1, -1), (1, 3)), skew=2
    ),
    "rolled_serial": ZooEntry(
        functools.partial(storage.StackedMemories, roll=1), _offsets((1, 1), (1, -3)), parallel=False, skew=4
    ),
    "buffer_copy": ZooEntry(storage.BufferCopy),
    "in_place": ZooEntry(storage.InPlace),
    "hybrid": ZooEntry(hybrids.Hybrid, n_layers=6),
    "cache_object": ZooEntry(storage.CacheObject, ragged=False),
    "universal": ZooEntry(memories.Universal),
    "glue_update": ZooEntry(memories.GlueUpdate),
    "alternating": ZooEntry(memories.Alternating, n_layers=6, ragged=False),
    "local_global": ZooEntry(memories.LocalGlobal, n_layers=6, ragged=False),
    "alias_trap": ZooEntry(storage.AliasTrap, _offsets((1, -1), (1, 0)), skew=2, trains=False),
    "shared_scratch": ZooEntry(
        storage.SharedScratch, _offsets((1, -2)), parallel=False, n_layers=3, skew=3, trains=False
    ),
    "compressed_older": ZooEntry(memories.CompressedOlder, _offsets((1, 0), (2, 0))),
    "named_outputs": ZooEntry(memories.NamedOutputs, n_layers=3),
    "plain_function": ZooEntry(traps.plain_function, trains=False),
    "skip_connections": ZooEntry(memories.SkipConnections, _offsets((0, 2), (1, 0)), n_layers=5),
    "no_carry": ZooEntry(memories.NoCarry, _offsets(), n_layers=3, skew=0),
    "running_mean": ZooEntry(memories.RunningMean, n_layers=3, rerolls=False),
    "growing_cache": ZooEntry(traps.GrowingCache, n_layers=3),
    "data_dependent": ZooEntry(
        traps.DataDependent, frozenset(), parallel=False, n_layers=3, skew=None, refused=True
    ),
}
"""Every zoo model by name."""
