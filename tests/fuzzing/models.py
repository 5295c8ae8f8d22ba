"""From a spec to a module: the loops over segments and layers, and what is around them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fuzzing.layers import Layer
from fuzzing.operations import OPERATIONS, WIDTH, Weights
from fuzzing.places import PLACES
from fuzzing.results import RESULTS
from fuzzing.spec import Spec

TOKENS = 16
"""Words of the models that are given tokens."""


def cut(x: Tensor, how: str, size: int) -> list[Tensor]:
    """x[B, N, ...] in segments of `size` positions; the rest is last, or with "right" first."""
    n = x.shape[1]
    if how == "slices":
        return [x[:, start : start + size] for start in range(0, n, size)]
    if how == "narrow":
        return [x.narrow(1, start, min(size, n - start)) for start in range(0, n, size)]
    if how == "front":
        pieces = []
        while x.shape[1]:
            pieces.append(x[:, :size])
            x = x[:, size:]
        return pieces
    if how == "right":
        cuts = [0, *list(range(n, 0, -size))[::-1]]
        return [x[:, a:b] for a, b in pairwise(cuts)]
    if how == "view" and n % size == 0:
        return list(x.reshape(x.shape[0], -1, size, *x.shape[2:]).unbind(1))
    return list(x.split(size, 1))


class Model(nn.Module):
    """`forward(x: f[B, N, D] or i64[B, N], mask: b[B, N] or None)` of what the spec says."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.store = spec, None
        self.embedding = nn.Embedding(TOKENS, WIDTH) if spec.tokens else None
        self.layers = nn.ModuleList(Layer(spec.kind(l)) for l in range(spec.layers))
        if spec.shared:
            for layer in self.layers:
                if len(layer.weights) == len(self.layers[0].weights):
                    layer.weights = self.layers[0].weights
        self.before = nn.ModuleList(Weights() for _ in spec.prologue)
        self.after = nn.ModuleList(Weights() for _ in spec.epilogue)
        self.positions = nn.Parameter(torch.randn(64, WIDTH))
        self.tokens = nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        spec = self.spec
        masks = [None] * (x.shape[1] + 1) if mask is None else cut(mask, spec.cut, spec.segment)
        segments = cut(x, spec.cut, spec.segment)
        self.means: dict[tuple[int, int], Tensor] = {}
        self.hidden: list[list[Tensor]] = [[] for _ in segments]
        self.carried: dict[str, Tensor] = {}
        self.place = PLACES[spec.place](self, x)
        self.seen = 0
        out = []
        if spec.order == "segments":
            for s, segment in enumerate(segments):
                h = first = self.enter(s, segment)
                for l in range(spec.layers):
                    h = self.cell(s, l, h, first, masks[s])
                out.append(self.leave(s, h, segment))
        else:
            firsts = hs = [self.enter(s, segment) for s, segment in enumerate(segments)]
            for l in range(spec.layers):
                if spec.order == "inside" and l > 0:
                    hs = cut(torch.cat(hs, 1), spec.cut, hs[-1 if spec.cut == "right" else 0].shape[1])
                hs = [self.cell(s, l, h, firsts[s], masks[s]) for s, h in enumerate(hs)]
            out = [self.leave(s, h, segments[s]) for s, h in enumerate(hs)]
        found = RESULTS[spec.result](self, out)
        del self.means, self.hidden, self.carried, self.place
        return found

    def enter(self, s: int, segment: Tensor) -> Tensor:
        """From a segment of the input to what layer 0 reads."""
        h = segment if self.embedding is None else self.embedding(segment)
        for name, weights in zip(self.spec.prologue, self.before):
            if name == "positions":
                h = h + self.positions[self.seen : self.seen + h.shape[1]]
                self.seen += h.shape[1]
            elif name == "memory tokens":
                h = torch.cat([self.tokens.expand(h.shape[0], -1, -1), h], 1)
            elif name == "running sum":
                self.carried["before"] = self.carried.get("before", h.new_zeros(())) + h.mean(1)
                h = h + self.carried["before"][:, None]
            elif name == "token shift":
                last = self.carried.get("last", h[:, :1] * 0)
                self.carried["last"] = h[:, -1:]
                h = h + weights.linear(torch.cat([last, h[:, :-1]], 1))
            elif name == "top of the last":
                if "top" in self.carried:
                    h = h + self.carried["top"][:, None]
            else:
                h = OPERATIONS[name](weights, h)
        return h

    def cell(self, s: int, l: int, h: Tensor, first: Tensor, mask: Tensor | None) -> Tensor:
        spec, layer = self.spec, self.layers[l]
        if spec.injects:
            h = h + 0.5 * first
        if mask is not None and mask.shape[1] < h.shape[1]:
            mask = F.pad(mask, (h.shape[1] - mask.shape[1], 0), value=True)
        zero = h.new_zeros(h.shape[0], WIDTH)
        others = [self.means.get((s - ds, l - dl), zero) for ds, dl in layer.kind.reads]
        if layer.memory is None:
            h, _ = layer(h, None, others, mask)
        else:
            h, new = layer(h, self.place[l] if s or spec.keeps else None, others, mask)
            if spec.is_written(s):
                self.place.put(l, new)
        self.means[s, l] = torch.tanh(h).mean(1)
        self.hidden[s].append(h)
        return h

    def leave(self, s: int, h: Tensor, segment: Tensor) -> Tensor:
        """From what the last layer gives to the segment's part of the result."""
        self.carried["top"] = torch.tanh(h[:, -1])
        for name, weights in zip(self.spec.epilogue, self.after):
            if name == "drop memory tokens":
                h = h[:, -segment.shape[1] :]
            elif name == "running sum":
                self.carried["after"] = self.carried.get("after", h.new_zeros(())) + h.mean(1)
                h = h * torch.sigmoid(self.carried["after"])[:, None]
            elif name == "number":
                h = h / (s + 1)
            else:
                h = OPERATIONS[name](weights, h)
        return h


def build(spec: Spec) -> Model:
    """The model of a spec, with random weights of its seed, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return Model(spec).double().eval()


def inputs(spec: Spec) -> list[tuple[Tensor, ...]]:
    """The arguments of each call."""
    generator = torch.Generator().manual_seed(spec.seed + 1)
    found: list[tuple[Tensor, ...]] = []
    for n in spec.lengths:
        if spec.tokens:
            x = torch.randint(0, TOKENS, (spec.batch, n), generator=generator)
        else:
            x = torch.randn(spec.batch, n, WIDTH, generator=generator, dtype=torch.float64)
        masks = (torch.rand(spec.batch, n, generator=generator) < 0.8,) if spec.mask else ()
        found.append((x, *masks))
    return found
