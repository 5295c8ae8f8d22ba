"""Random models by what surrounds their layers: reads of one segment, other loop orders, carries outside."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, cat, nn, sigmoid
from toys import SEGMENT, WIDTH, Layer, assert_equal_runs, features, made

import rmtcompile
from rmtcompile.errors import UnsupportedError
from rmtcompile.passes.grid import wavefront


@dataclass(frozen=True)
class Glue:
    """What happens around the layers.

    Attributes:
        reads: (ds, dl) of each state that a layer reads, consumer minus producer; ds None stands for
            segment 0.
        skips_first: whether segment 0 reads something else.
        by_layer: whether the outer loop is that over layers.
        sums_before, sums_after: a running sum of what enters, or of what leaves, is added to it.
        keeps: whether the last state stays in an attribute.
    """

    reads: tuple[tuple[int | None, int], ...]
    skips_first: bool
    by_layer: bool
    sums_before: bool
    sums_after: bool
    keeps: bool


class Glued(nn.Module):
    def __init__(self, glue: Glue, n_layers: int) -> None:
        super().__init__()
        self.glue, self.kept = glue, None
        self.layers = nn.ModuleList(Layer() for _ in range(n_layers))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.states: dict[tuple[int, int], Tensor] = {}
        pieces = list(x.split(SEGMENT, 1))
        if self.glue.by_layer:
            for l in range(len(self.layers)):
                for s, h in enumerate(pieces):
                    pieces[s] = self.cell(s, l, h)
        else:
            before = after = x.new_zeros(x.shape[0], WIDTH)
            for s, h in enumerate(pieces):
                if self.glue.sums_before:
                    before = before + h.mean(1)
                    h = h + before[:, None]
                for l in range(len(self.layers)):
                    h = self.cell(s, l, h)
                if self.glue.sums_after:
                    after = after + h.mean(1)
                    h = h * sigmoid(after)[:, None]
                pieces[s] = h
        if self.glue.keeps:
            self.kept = self.states[len(pieces) - 1, len(self.layers) - 1]
        del self.states
        return {"all": cat(pieces, 1), "last": pieces[-1][:, -1]}

    def cell(self, s: int, l: int, h: Tensor) -> Tensor:
        state = h.new_zeros(h.shape[0], WIDTH)
        for ds, dl in self.glue.reads:
            if ds is not None or s > 0:
                state = state + self.states.get((0 if ds is None else s - ds, l - dl), h.new_zeros(()))
        if self.glue.skips_first and s == 0:
            state = h.mean(1)
        h, self.states[s, l] = self.layers[l](h, state)
        return h


reads = st.sampled_from([(1, 1), (1, 0), (2, 1), (1, -1), (2, 2), (None, 1), (None, 0)])
glues = st.builds(
    Glue, st.lists(reads, max_size=2, unique=True).map(tuple), *(st.booleans() for _ in range(5))
)


@pytest.mark.filterwarnings("ignore::rmtcompile.SequentialScheduleWarning")
@settings(
    max_examples=8,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(glues, st.integers(1, 4), st.booleans(), st.booleans(), st.sampled_from(["auto", "sequential"]))
def test_equal_or_refused(glue: Glue, n_layers: int, small_blocks: bool, ragged: bool, plan: str) -> None:
    """Never wrong silently."""
    with pytest.MonkeyPatch.context() as patch:
        if small_blocks:
            patch.setattr(wavefront, "BLOCK", 1)
        model = made(lambda: Glued(glue, n_layers))
        fast = rmtcompile.optimize(copy.deepcopy(model), plan=plan)
        inputs = [features(n)[:, : -1 if ragged else None] for n in (5, 2, 1, 9)]
        try:
            assert_equal_runs(model, fast, inputs)
        except UnsupportedError as error:
            event(type(error).__name__)
        else:
            event(f"alpha {fast.schedule.alpha}")
            if glue.keeps:
                assert_equal_runs(lambda _: model.kept, lambda _: fast.model.kept, inputs[-1:])
