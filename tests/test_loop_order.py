"""Forwards whose loops are in the other order: layers outside, and each layer walks the segments itself."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import SEGMENT, WIDTH, assert_equal_runs, assert_same, made

import rmtcompile

N_LAYERS = 3
WHOLE = (12, 3, 6, 9, 15, 18)
RAGGED = (13, 8, 2, 16, 4)


def mlp(d: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))


class Stack(nn.Module):
    """f[B, N, D] -> f[B, N, D], layer by layer; subclasses say what a layer is."""

    layer: type[nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.layer() for _ in range(N_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Projections(nn.Module):
    """What the layers below have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.gate = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.norm, self.mlp = nn.LayerNorm(WIDTH), mlp()


# ---- ways to write a layer ---------------------------------------------------------------------------------


class Pieces(Stack):
    """A plain list over slices, joined at the end of each layer; the first segment has no memory to read."""

    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            memory, out = None, []
            for start in range(0, x.shape[1], SEGMENT):
                piece = x[:, start : start + SEGMENT]
                if memory is not None:
                    piece = piece + torch.sigmoid(self.out(piece)) @ memory
                q, k, v = self.qkv(piece + self.mlp(piece)).chunk(3, -1)
                piece = piece + q
                new = torch.sigmoid(k).transpose(1, 2) @ v / SEGMENT
                memory = new if memory is None else 0.9 * memory + new
                out.append(piece)
            return torch.cat(out, 1)


class Split(Stack):
    """Norms and products of the whole input, pieces of them by `split`, a residual of the whole behind."""

    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            parts = [t.split(SEGMENT, 1) for t in self.qkv(self.norm(x)).chunk(3, -1)]
            state, out = x.new_zeros(x.shape[0], WIDTH, WIDTH), []
            for q, k, v in zip(*parts, strict=True):
                out.append((q @ k.transpose(1, 2)).tril() @ v + q @ state)
                state = state + k.transpose(1, 2) @ v
            x = x + self.out(torch.cat(out, 1))
            return x + self.mlp(x)


class Buffer(Stack):
    """Results are written into a buffer, segment by segment."""

    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            out, state = torch.empty_like(x), torch.zeros_like(x[:, :1])
            for i in range(0, x.shape[1], SEGMENT):
                piece = slice(i, i + SEGMENT)
                out[:, piece] = torch.tanh(q[:, piece] + state) * v[:, piece]
                state = 0.5 * state + k[:, piece].mean(1, keepdim=True)
            return x + self.out(out)


class Reshaped(Stack):
    """The input is cut by one reshape before all layers; they loop over an axis of it, and stack."""

    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
            state, out = torch.zeros(x.shape[0], 1, WIDTH, dtype=x.dtype), []
            for s in range(x.shape[1]):
                out.append(torch.softmax(q[:, s] @ k[:, s].transpose(1, 2), -1) @ v[:, s] + state)
                state = torch.sigmoid(self.gate(state)) * state + v[:, s].mean(1, keepdim=True)
            return x + self.out(torch.stack(out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(1, (-1, SEGMENT))).flatten(1, 2)


class DeltaRule(Stack):
    """A gated delta rule in chunks, heads first, padded: what lies inside of a chunk is computed for all of
    them at once (a triangular system, row by row, in place), the state chunk by chunk, into a buffer."""

    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            heads = self.qkv(self.norm(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
            pad = (SEGMENT - x.shape[1] % SEGMENT) % SEGMENT
            q, k, v = (F.pad(t, (0, 0, 0, pad)).unflatten(2, (-1, SEGMENT)) for t in heads)
            k = F.normalize(k, dim=-1)
            beta = F.pad(torch.sigmoid(self.gate(x)).transpose(1, 2), (0, pad)).unflatten(2, (-1, SEGMENT))
            decay = (-0.1 * beta).cumsum(-1)
            ratio = (decay[..., None] - decay[..., None, :]).tril().exp().tril()
            upper = torch.triu(torch.ones(SEGMENT, SEGMENT, dtype=torch.bool))
            system = -(((beta[..., None] * k) @ k.transpose(-1, -2)) * ratio).masked_fill(upper, 0)
            for i in range(1, SEGMENT):
                row, below = system[..., i, :i].clone(), system[..., :i, :i].clone()
                system[..., i, :i] = row + (row[..., None] * below).sum(-2)
            system = system + torch.eye(SEGMENT, dtype=x.dtype)
            values = system @ (v * beta[..., None])
            keys = system @ (k * beta[..., None] * decay.exp()[..., None])
            state, out = x.new_zeros(x.shape[0], 2, WIDTH // 2, WIDTH // 2), torch.zeros_like(v)
            for s in range(q.shape[2]):
                new = values[:, :, s] - keys[:, :, s] @ state
                inner = (q[:, :, s] @ k[:, :, s].transpose(-1, -2) * ratio[:, :, s]).tril()
                out[:, :, s] = (q[:, :, s] * decay[:, :, s, :, None].exp()) @ state + inner @ new
                last = decay[:, :, s, -1, None, None]
                left = (last - decay[:, :, s, :, None]).exp()
                state = state * last.exp() + (k[:, :, s] * left).transpose(-1, -2) @ new
            y = out.flatten(2, 3)[:, :, : x.shape[1]].transpose(1, 2).flatten(2)
            x = x + self.out(y)
            return x + self.mlp(x)


class MemoryTokens(Stack):
    """Memory tokens are put between the segments once, and taken out at the end."""

    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            out, memory = [], torch.zeros(x.shape[0], 2, WIDTH, dtype=x.dtype)
            x = x + self.mlp(x)
            for piece in x.split(SEGMENT + 2, 1):
                q, k, v = self.qkv(torch.cat([memory, piece], 1)).chunk(3, -1)
                piece = piece + F.scaled_dot_product_attention(q, k, v)[:, 2:]
                memory = 0.5 * memory + piece[:, -2:]
                out.append(piece)
            return torch.cat(out, 1)

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        parts = [part for piece in x.split(SEGMENT, 1) for part in (piece, self.memory.expand(len(x), -1, -1))]
        h = super().forward(torch.cat(parts, 1))
        return torch.cat([piece[:, :-2] for piece in h.split(SEGMENT + 2, 1)], 1)


class Tokens(Stack):
    """Embeddings, positions and rotations of the whole input; a final norm, a head and one number of all."""

    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 0.1
            q, k, v = (self.qkv(x) * angle.cos()).chunk(3, -1)
            state, out = None, []
            for q, k, v in zip(*(t.split(SEGMENT, 1) for t in (q, k, v)), strict=True):
                k, v = (k, v) if state is None else (torch.cat([state[0], k], 1), torch.cat([state[1], v], 1))
                out.append(F.scaled_dot_product_attention(q, k, v))
                state = k[:, -SEGMENT:], v[:, -SEGMENT:]
            return x + self.out(torch.cat(out, 1))

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.positions = nn.Embedding(10, WIDTH), nn.Embedding(32, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[..., 0] * 5).long().remainder(10)
        h = super().forward(self.emb(ids) + self.positions(torch.arange(ids.shape[1])))
        return self.head(self.norm(h))


class Mixed(Stack):
    """Layers that walk the segments, and layers of which each takes the whole sequence, row by row."""

    layer = Pieces.layer

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Pieces.layer(), mlp(), Split.layer(), mlp()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class TwoLists(Stack):
    """A list of mixers and one of feed-forward networks, called in turn, with norms of the model between."""

    layer = Split.layer

    def __init__(self) -> None:
        super().__init__()
        self.forwards = nn.ModuleList(mlp() for _ in range(N_LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(N_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm, feed in zip(self.layers, self.norms, self.forwards, strict=True):
            x = x + layer(norm(x))
            x = x + feed(x)
        return x


class KeptState(Stack):
    """The state lies in an attribute of each layer, and stays there."""

    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            self.state = torch.zeros(x.shape[0], 1, WIDTH, dtype=x.dtype)
            return torch.cat([self.step(piece) for piece in x.split(SEGMENT, 1)], 1)

        def step(self, piece: Tensor) -> Tensor:
            piece = piece + torch.tanh(self.out(piece) + self.state)
            self.state = 0.5 * self.state + self.mlp(piece).mean(1, keepdim=True)
            return piece


EVEN = [Reshaped]
ANY = [Pieces, Split, Buffer, DeltaRule, MemoryTokens, Tokens, Mixed, TwoLists, KeptState]


def inputs(length: int) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


@pytest.mark.parametrize("build", EVEN + ANY)
def test_every_number_of_segments(build: Callable[[], nn.Module]) -> None:
    """Exact, on diagonals as wide as the model is deep."""
    model = made(build)
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="eager")
    assert_equal_runs(model, fast, map(inputs, WHOLE))
    fast(inputs(18))
    assert fast.schedule.width == fast.schedule.n_layers >= N_LAYERS
    assert fast.schedule.level_rule == "s + l"


@pytest.mark.parametrize("build", ANY)
def test_ragged_ends(build: Callable[[], nn.Module]) -> None:
    model = made(build)
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="eager")
    assert_equal_runs(model, fast, map(inputs, RAGGED))


@pytest.mark.parametrize("build", EVEN + ANY)
def test_gradients(build: Callable[[], nn.Module]) -> None:
    model = made(build)
    other = copy.deepcopy(model)
    fast = rmtcompile.optimize(other, backend="eager")
    for length in (12, 6):
        x = inputs(length)
        expected, got = model(x), fast(x)
        assert_same(expected, got)
        weights = torch.randn_like(expected)
        theirs = torch.autograd.grad((expected * weights).sum(), list(model.parameters()), allow_unused=True)
        mine = torch.autograd.grad((got * weights).sum(), list(other.parameters()), allow_unused=True)
        assert_same(theirs, mine, 1e-9)
