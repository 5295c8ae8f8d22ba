"""Models that walk each segment in parts, token by token say: the grid of the parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import made

import rmtcompile

D, T, L = 8, 4, 3


def lin() -> nn.Linear:
    return nn.Linear(D, D)


class Cell(nn.Module):
    """A layer that keeps its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = lin(), lin()

    def start(self, x: Tensor) -> Any:
        return torch.zeros(len(x), D, dtype=x.dtype)

    def forward(self, x: Tensor, h: Any) -> tuple[Tensor, Any]:
        h = torch.tanh(self.k(x) + self.v(h))
        return x + h, h


class Gated(Cell):
    """The same with two states."""

    def start(self, x: Tensor) -> Any:
        return super().start(x), super().start(x)

    def forward(self, x: Tensor, h: Any) -> tuple[Tensor, Any]:
        a, c = h
        f = torch.sigmoid(self.k(x) + self.v(a))
        c = f * c + (1 - f) * torch.tanh(x)
        return x + f * torch.tanh(c), (f * torch.tanh(c), c)


class Outer(Cell):
    """A matrix that a token writes with an outer product."""

    def start(self, x: Tensor) -> Any:
        return torch.zeros(len(x), D, D, dtype=x.dtype)

    def forward(self, x: Tensor, h: Any) -> tuple[Tensor, Any]:
        k = F.normalize(self.k(x), dim=-1)
        return x + torch.einsum("bd,bde->be", k, h), 0.9 * h + k[:, :, None] * self.v(x)[:, None]


class Tokens(nn.Module):
    """Segments of four; in each its tokens, in each of these the layers."""

    kind: type[Cell] = Cell

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.norm = lin(), lin(), nn.LayerNorm(D)
        self.layers = nn.ModuleList(self.kind() for _ in range(L))

    def forward(self, x: Tensor) -> Tensor:
        h, out = [layer.start(x) for layer in self.layers], []
        for part in x.split(T, 1):
            z, y = self.first(part), []
            for t in range(z.shape[1]):
                token = z[:, t]
                for i, layer in enumerate(self.layers):
                    token, h[i] = layer(token, h[i])
                y.append(token)
            out.append(self.head(self.norm(torch.stack(y, 1))))
        return torch.cat(out, 1)


class Doubled(Tokens):
    """The tokens one by one as slices, pre-computed positions, no head."""

    kind = Gated

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Embedding(64, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.where(torch.arange(x.shape[1]))
        h, out = [layer.start(x) for layer in self.layers], []
        for s in range(0, x.shape[1], T):
            part = self.first(x[:, s : s + T])
            for token in part.unbind(1):
                for i, layer in enumerate(self.layers):
                    token, h[i] = layer(token, h[i])
                out.append(token)
        return torch.stack(out, 1)


class Chunks(Tokens):
    """Half segments of two tokens; a projection of whole segments before and behind."""

    kind = Outer

    def forward(self, x: Tensor) -> Tensor:
        h, out = [layer.start(x) for layer in self.layers], []
        for part in x.split(T, 1):
            z = self.norm(self.first(part))
            y = []
            for half in z.split(T // 2, 1):
                a = half.mean(1)
                for i, layer in enumerate(self.layers):
                    a, h[i] = layer(a, h[i])
                y.append(half + a[:, None])
            out.append(F.gelu(self.head(torch.cat(y, 1))))
        return torch.cat(out, 1)


class Summed(Tokens):
    """What a segment ends with goes through its own mean: nothing that parts can be told apart in."""

    def forward(self, x: Tensor) -> Tensor:
        h, out = [layer.start(x) for layer in self.layers], []
        for part in x.split(T, 1):
            z, y = self.first(part), []
            z = z - z.mean(1, keepdim=True)
            for t in range(T):
                token = z[:, t]
                for i, layer in enumerate(self.layers):
                    token, h[i] = layer(token, h[i])
                y.append(token)
            out.append(torch.stack(y, 1).mean(1))
        return torch.stack(out, 1)


def text(tokens: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize(("kind", "parts"), [(Tokens, 4), (Doubled, 4), (Chunks, 2)])
def test_parts_are_the_segments_of_the_grid(kind: type[nn.Module], parts: int) -> None:
    model = made(kind)
    fast = rmtcompile.optimize(model)
    for tokens in (16, 16, 24, 8, 4, 40):
        x = text(tokens)
        with torch.no_grad():
            assert torch.allclose(fast(x), model(x), rtol=0, atol=1e-12)
    steps = 40 // T * parts
    assert fast.schedule.width == L
    assert fast.schedule.n_levels == steps + L - 1
    assert f"in {parts} parts" in str(fast.explain())


@pytest.mark.parametrize("kind", [Tokens, Doubled, Chunks])
def test_gradients(kind: type[nn.Module]) -> None:
    model, x = made(kind), text(20)
    fast, found = rmtcompile.optimize(model), []
    for run in (model, fast):
        given = x.clone().requires_grad_()
        target = torch.sin(torch.arange(run(given).numel(), dtype=x.dtype)).reshape(run(given).shape)
        model.zero_grad()
        (run(given) * target).sum().backward()
        found.append([given.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    assert fast.schedule.width == L


def test_ragged_ends_other_batches_and_one_segment() -> None:
    model = made(Tokens)
    fast = rmtcompile.optimize(model)
    for tokens, batch in ((18, 2), (19, 2), (17, 1), (4, 1), (3, 2), (22, 3), (1, 1), (21, 2)):
        x = text(tokens, batch)
        with torch.no_grad():
            assert torch.allclose(fast(x), model(x), rtol=0, atol=1e-12), (tokens, batch)


def test_rests_that_are_no_whole_parts() -> None:
    model = made(Chunks)
    fast = rmtcompile.optimize(model)
    for tokens in (18, 17, 20, 19):
        x = text(tokens)
        with torch.no_grad():
            assert torch.allclose(fast(x), model(x), rtol=0, atol=1e-12), tokens
        assert fast.compiled.parts == 2


def test_what_needs_whole_segments_runs_on_these() -> None:
    model = made(Summed)
    fast = rmtcompile.optimize(model)
    for tokens in (16, 24):
        with torch.no_grad():
            assert torch.allclose(fast(text(tokens)), model(text(tokens)), rtol=0, atol=1e-12)
    assert fast.compiled.parts == 1


class FromTheStart(Tokens):
    """All tokens of a segment read what the one before has left, behind a gate that is closed at first."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h, out = [layer.start(x) for layer in self.layers], []
        for part in x.split(T, 1):
            new = list(h)
            for t in range(part.shape[1]):
                token = part[:, t]
                for i, layer in enumerate(self.layers):
                    token, new[i] = layer(token, self.gate * h[i])
                out.append(token)
            h = new
        return torch.stack(out, 1)


class Positions(Tokens):
    """Positions in the segment, zeros at first."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(T, D))

    def forward(self, x: Tensor) -> Tensor:
        n = -(-x.shape[1] // T)
        return super().forward(x + self.positions.repeat(n, 1)[: x.shape[1]])


@pytest.mark.parametrize("kind", [FromTheStart, Positions])
@pytest.mark.parametrize("tokens", [12, 16, 40])
def test_parts_that_differ_where_no_value_shows_it(kind: type[nn.Module], tokens: int) -> None:
    model = made(kind)
    for name in ("gate", "positions"):
        if hasattr(model, name):
            nn.init.zeros_(getattr(model, name))
    fast, x = rmtcompile.optimize(model), text(tokens)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), rtol=0, atol=1e-12)
        for p in model.parameters():
            p.add_(torch.rand_like(p))
        assert torch.allclose(fast(x), model(x), rtol=0, atol=1e-12)
        assert torch.allclose(fast(text(24)), model(text(24)), rtol=0, atol=1e-12)


def test_a_text_in_parts_runs_on_the_models_segments() -> None:
    model, x = made(Tokens), text(32)
    fast = rmtcompile.optimize(model)
    with torch.no_grad():
        whole = fast(x)
        a, state = fast.run(x[:, :16])
        b, _ = fast.run(x[:, 16:], state=state)
        assert fast.compiled.parts == 1
        assert torch.allclose(torch.cat([a, b], 1), whole, rtol=0, atol=1e-12)
        assert torch.allclose(fast(x), model(x), rtol=0, atol=1e-12)
        assert fast.compiled.parts == 4


def test_documents() -> None:
    model = made(Tokens)
    fast = rmtcompile.optimize(model)
    texts = [text(n, 1) for n in (16, 8, 20, 9, 3)]
    with torch.no_grad():
        fast(texts[0])
        for mine, x in zip(fast.map(texts), texts, strict=True):
            assert torch.allclose(mine, model(x), rtol=0, atol=1e-12)


def test_saved(tmp_path: Path) -> None:
    model, x = made(Tokens), text(16)
    fast = rmtcompile.optimize(model)
    with torch.no_grad():
        fast(x)
    fast.save(tmp_path)
    again = rmtcompile.load(tmp_path, made(Tokens))
    with torch.no_grad():
        assert torch.equal(again(x), fast(x))
        assert torch.allclose(again(text(28)), model(text(28)), rtol=0, atol=1e-12)
    assert again.compiled.parts == 4
    assert not again.captures


def test_verify_and_reports(tmp_path: Path) -> None:
    model, x = made(Tokens), text(16)
    fast = rmtcompile.optimize(model, verify=True)
    with torch.no_grad():
        fast(x)
        fast(text(20))
    fast.dump(tmp_path / "dump")
    assert f"{L} layers x 20 segments" in str(fast.schedule)
    assert fast.schedule.n_segments == 20
    assert fast.view(tmp_path / "view.html").stat().st_size
    assert fast.profile(x).schedule.n_segments == 16
