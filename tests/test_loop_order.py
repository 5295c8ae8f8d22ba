"""Forwards whose loops are in the other order: layers outside, and each layer walks the segments itself."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import SEGMENT, WIDTH, Layer, Toy, assert_equal_runs, assert_same, made

import rmtcompile

N_LAYERS = 3


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
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.conv = nn.Linear(WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)
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
        parts = [
            part for piece in x.split(SEGMENT, 1) for part in (piece, self.memory.expand(len(x), -1, -1))
        ]
        h = super().forward(torch.cat(parts, 1))
        return torch.cat([piece[:, :-2] for piece in h.split(SEGMENT + 2, 1)], 1)


class Tokens(Stack):
    """Embeddings, positions and rotations of the whole input; a final norm, a head and one number of all."""

    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 0.1
            parts = (self.qkv(x) * angle.cos()).chunk(3, -1)
            state, out = None, []
            for q, k, v in zip(*(t.split(SEGMENT, 1) for t in parts), strict=True):
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


class Convolved(Stack):
    """A shift by one token and a short convolution, both of the whole input, before the loop."""

    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            h = x + torch.sigmoid(self.gate(x)) * F.pad(x, (0, 0, 1, 0))[:, :-1]
            h = F.silu(self.conv(h.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
            return x + Buffer.layer.forward(self, h)  # type: ignore[arg-type]


class Rows(Stack):
    """Feed-forward networks on the rows of all batches as one axis."""

    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mlp(x.reshape(-1, WIDTH)).view(x.shape)
            return KeptState.layer.forward(self, x)  # type: ignore[arg-type]

        step = KeptState.layer.step


class Products(Stack):
    """What lies inside of the chunks by einsum, for all of them at once; only the state is carried on."""

    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            pad = -x.shape[1] % SEGMENT
            chunks = F.pad(self.qkv(x), (0, 0, 0, pad)).reshape(x.shape[0], -1, SEGMENT, 3, WIDTH)
            q, k, v = chunks.unbind(3)
            y = torch.einsum("bsij,bsjd->bsid", torch.einsum("bsid,bsjd->bsij", q, k).tril(), v)
            new = torch.einsum("bsid,bsie->bsde", k, v)
            state, out = torch.zeros_like(new[:, 0]), []
            for s in range(q.shape[1]):
                out.append(y[:, s] + torch.einsum("bid,bde->bie", q[:, s], state))
                state = 0.9 * state + new[:, s]
            return x + self.out(torch.cat(out, 1)[:, : x.shape[1]])


class States(Stack):
    """Each layer's last state is returned, and a number of all positions of all layers."""

    layer = KeptState.layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        states, total = [], x.new_zeros(())
        for layer in self.layers:
            x = layer(x)
            states.append(layer.state)
            total = total + x.pow(2).mean()
        return x.mean(-1), torch.stack(states), total


class Functions(nn.Module):
    """Layers that are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ParameterList(torch.randn(WIDTH, WIDTH) / 2 for _ in range(N_LAYERS))
        self.second = nn.ParameterList(torch.randn(WIDTH, WIDTH) / 2 for _ in range(N_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.first, self.second, strict=True):
            state, out = x.new_zeros(x.shape[0], 1, WIDTH), []
            for piece in torch.tanh(x @ first).split(SEGMENT, 1):
                piece = torch.tanh(piece @ second + state)
                state = 0.5 * state + piece.mean(1, keepdim=True)
                out.append(piece)
            x = x + torch.cat(out, 1)
        return x


FEW = [DeltaRule, Convolved]
"""They take long to compile."""
ANY = [
    Pieces,
    Split,
    Buffer,
    MemoryTokens,
    Tokens,
    Mixed,
    TwoLists,
    KeptState,
    Rows,
    Products,
    States,
    Functions,
]


def inputs(length: int) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


@pytest.mark.parametrize("build", [Reshaped, *ANY, *FEW])
def test_whole_segments(build: Callable[[], nn.Module]) -> None:
    """Exact, on diagonals as wide as the model is deep."""
    model = made(build)
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="eager")
    assert_equal_runs(model, fast, map(inputs, (12, 3, 6, 15, 18)))
    schedule = fast.schedule
    assert (schedule.level_rule, schedule.width) == ("s + l", schedule.n_layers)
    assert schedule.n_layers >= N_LAYERS


@pytest.mark.parametrize(("build", "lengths"), [*((b, (13, 2, 16)) for b in ANY), *((b, (13,)) for b in FEW)])
def test_ragged_ends(build: Callable[[], nn.Module], lengths: tuple[int, ...]) -> None:
    model = made(build)
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="eager")
    assert_equal_runs(model, fast, map(inputs, lengths))


@pytest.mark.parametrize("build", [Pieces, Buffer, Reshaped, MemoryTokens, Products, Functions])
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


class TwoInside(Stack):
    """A layer of two modules, called in turn for each segment."""

    class layer(Projections):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.ModuleList([mlp(), mlp()])

        def forward(self, x: Tensor) -> Tensor:
            memory, out = x.new_zeros(x.shape[0], WIDTH, WIDTH), []
            for piece in x.split(SEGMENT, 1):
                piece = piece + torch.sigmoid(self.out(piece)) @ memory
                for block in self.block:
                    piece = piece + block(piece)
                _, k, v = self.qkv(piece).chunk(3, -1)
                memory = memory + torch.sigmoid(k).transpose(1, 2) @ v / SEGMENT
                out.append(piece)
            return torch.cat(out, 1)


@torch.no_grad()
def test_modules_inside_of_layers_named_as_layers() -> None:
    """They are called layer by layer, two of them in turn."""
    model = made(TwoInside)
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="eager", layers=r"layers\.\d+\.block\.\d")
    assert_equal_runs(model, fast, map(inputs, (12, 6, 15)))
    assert fast.schedule.n_layers == 2 * N_LAYERS


class WholeMask(Stack):
    """A mask of the whole input, of its padding and of positions, cut into blocks along the diagonal."""

    class layer(Projections):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            memory, out = x.new_zeros(x.shape[0], WIDTH, WIDTH), []
            for start in range(0, x.shape[1], SEGMENT):
                end = start + SEGMENT
                piece = x[:, start:end] + x[:, start:end] @ memory
                q, k, v = self.qkv(piece).chunk(3, -1)
                scores = (q @ k.transpose(1, 2)).masked_fill(mask[start:end, start:end], -1e9)
                piece = piece + scores.softmax(-1) @ v
                memory = memory + torch.sigmoid(k).transpose(1, 2) @ v / SEGMENT
                out.append(piece)
            return torch.cat(out, 1)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        real = torch.concat([piece > 0 for piece in x[0, :, 0].split(SEGMENT)])
        mask = ~((at[None] <= at[:, None]) & real[at][None])
        for layer in self.layers:
            x = layer(x, mask)
        return x


@torch.no_grad()
def test_a_mask_of_the_whole_input() -> None:
    model = made(WholeMask)
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="eager")
    assert_equal_runs(model, fast, map(inputs, (12, 3, 6, 15, 13, 11)))
    assert fast.schedule.level_rule == "s + l"


class MixedLists(nn.Module):
    """The model's own loop over layers: memories are walked segment by segment, feed-forwards run at once."""

    def __init__(self) -> None:
        super().__init__()
        self.mem = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(N_LAYERS))
        self.ff, self.norm = nn.ModuleList(mlp() for _ in range(N_LAYERS)), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for mem, ff in zip(self.mem, self.ff, strict=True):
            memory, out = x.new_zeros(x.shape[0], 1, WIDTH), torch.zeros_like(x)
            for at in range(0, x.shape[1], SEGMENT):
                y = x[:, at : at + SEGMENT]
                y = y + torch.tanh(mem(y)) * memory
                memory = torch.tanh(memory + y.mean(1, keepdim=True))
                out[:, at : at + SEGMENT] = y
            x = x + ff(self.norm(out))
        return x


class PadsAndUnbinds(MixedLists):
    """The same over whole segments of a padded input, in one reshape; what was padded is cut off."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        h = F.pad(x, (0, 0, 0, -n % SEGMENT)).view(b, -1, SEGMENT, d)
        for mem, ff in zip(self.mem, self.ff, strict=True):
            memory, out = x.new_zeros(b, 1, d), []
            for y in h.unbind(1):
                y = y + torch.tanh(mem(y)) * memory
                memory = torch.tanh(memory + y.mean(1, keepdim=True))
                out.append(y)
            h = torch.stack(out, 1)
            h = self.norm(h + ff(h))
        return h.reshape(b, -1, d)[:, :n]


class MaskedMean(MixedLists):
    """A mask says which segments are written, and of which positions the mean is returned."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x[..., 0] > -0.5
        for mem, ff in zip(self.mem, self.ff, strict=True):
            memory, out = x.new_zeros(x.shape[0], 1, WIDTH), []
            for y, k in zip(x.split(SEGMENT, 1), mask.split(SEGMENT, 1), strict=True):
                y = y * k[..., None] + torch.tanh(mem(y)) * memory
                new = torch.tanh(memory + y.mean(1, keepdim=True))
                memory = torch.where(k.any(1)[:, None, None], new, memory)
                out.append(y)
            x = torch.cat(out, 1)
            x = self.norm(x + ff(x))
        return x[mask].mean(0)


@pytest.mark.parametrize("build", [MixedLists, PadsAndUnbinds, MaskedMean])
def test_some_lists_called_for_each_segment_and_some_once(build: Callable[[], nn.Module]) -> None:
    model = made(build)
    other = copy.deepcopy(model)
    fast = rmtcompile.optimize(other, backend="eager")
    for length in (12, 3, 6, 15, 13):
        x = inputs(length)
        expected, got = model(x), fast(x)
        assert_same(expected, got)
        theirs = torch.autograd.grad(expected.square().sum(), list(model.parameters()), allow_unused=True)
        mine = torch.autograd.grad(got.square().sum(), list(other.parameters()), allow_unused=True)
        assert_same(theirs, mine, 1e-9)
        if length == 12:
            assert (fast.schedule.level_rule, fast.schedule.width) == ("s + l", N_LAYERS)


@torch.no_grad()
@pytest.mark.parametrize("build", [Pieces, TwoInside])
def test_two_segments_are_on_diagonals_too(build: Callable[[], nn.Module]) -> None:
    """Where the second one's writes are dead code, and its reads are of what the first one started from."""
    model = made(build)
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="eager", layers=r"layers\.\d+\.(mlp|block\.0)")
    assert_equal_runs(model, fast, [inputs(6)])
    assert fast.schedule.level_rule == "s + l"


@torch.no_grad()
def test_it_is_the_schedule_of_the_other_order() -> None:
    """The loops exchanged by hand give the same levels, offsets and number of cells."""

    class Walks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Layer()

        def forward(self, x: Tensor) -> Tensor:
            state, out = x.new_zeros(x.shape[0], WIDTH), []
            for piece in x.split(SEGMENT, 1):
                piece, state = self.inner(piece, state)
                out.append(piece)
            return torch.cat(out, 1)

    class LayerMajor(Stack):
        layer = Walks

    schedules = []
    for build in (LayerMajor, Toy):
        fast = rmtcompile.optimize(made(build), backend="eager")
        fast(inputs(15))
        schedules.append(fast.schedule)
    a, b = schedules
    assert (a.n_layers, a.offsets, a.levels) == (b.n_layers, b.offsets, b.levels)


# ---- what is refused ---------------------------------------------------------------------------------------


class Attends(Stack):
    """A layer that walks the segments, then attends to all positions."""

    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            x = Pieces.layer.forward(self, x)  # type: ignore[arg-type]
            q, k, v = self.qkv(x).chunk(3, -1)
            return x + F.scaled_dot_product_attention(q, k, v)


class Pools(Stack):
    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            return Pieces.layer.forward(self, x + x.mean(1, keepdim=True))  # type: ignore[arg-type]


class Backwards(Stack):
    """Each layer walks from the last segment to the first."""

    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            state, out = x.new_zeros(x.shape[0], 1, WIDTH), []
            for piece in reversed(x.split(SEGMENT, 1)):
                piece = piece + torch.tanh(self.out(piece) + state)
                state = 0.5 * state + piece.mean(1, keepdim=True)
                out.append(piece)
            return torch.cat(out[::-1], 1)


@pytest.mark.parametrize(
    ("build", "operation"),
    [(Attends, "scaled_dot_product_attention"), (Pools, "mean"), (Backwards, "layers.")],
)
def test_what_needs_all_segments_is_refused(build: Callable[[], nn.Module], operation: str) -> None:
    with pytest.raises(rmtcompile.UnsupportedError) as caught, torch.no_grad():
        rmtcompile.optimize(made(build), backend="eager")(inputs(12))
    assert "all segments at once" in str(caught.value)
    assert operation in str(caught.value)
    if build is not Backwards:
        assert "test_loop_order.py:" in str(caught.value)


class Dropping(Stack):
    """Dropout of the whole input in front of each layer's loop; what comes out shows what was drawn."""

    class layer(Projections):
        def forward(self, x: Tensor) -> Tensor:
            memory = x.new_zeros(x.shape[0], WIDTH)
            out = []
            for piece in F.dropout(x, 0.2, self.training).split(SEGMENT, 1):
                out.append(piece * (2 + torch.tanh(self.out(memory)))[:, None])
                memory = 0.5 * memory + piece.mean(1)
            return torch.cat(out, 1)


@torch.no_grad()
def test_dropout_of_the_whole_input() -> None:
    model = made(Dropping)
    fast = rmtcompile.optimize(model)
    x = torch.ones(50, 5 * SEGMENT, WIDTH, dtype=torch.float64)
    assert_same(model(x), fast(x))
    model.train()
    kept = (fast(x) != 0).double()
    assert fast.schedule.width == N_LAYERS
    assert abs(kept.mean() - 0.8**N_LAYERS) < 0.03
    by_segment = kept.unflatten(1, (5, SEGMENT)).transpose(0, 1).flatten(1)
    drawn = torch.corrcoef(by_segment) - torch.eye(5, dtype=torch.float64)
    assert drawn.abs().max() < 0.2, "segments have drawn the same numbers"
    assert not torch.equal(kept, (fast(x) != 0).double())
