"""What a run holds: weights, carries, one window of activations and what is returned, whatever the length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory import peak_bytes
from torch import Tensor, nn
from toys import Layer, assert_same, made
from zoo.authors import authors_armt

import rmtcompile

LENGTH, WORDS, WIDTH = 8, 40, 16
SHORT, LONG = 8, 64
"""Segments; both more than there are layers, so that both have levels of full width."""


class WholeInput(nn.Module):
    """Embeds all its tokens before the first segment, and applies its head to all of them after the last."""

    def __init__(self, n_layers: int = 3) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH * LONG, WIDTH)
        self.layers = nn.ModuleList(Layer(WIDTH) for _ in range(n_layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.words(ids) * WIDTH**0.5 + self.places(torch.arange(ids.shape[1]))
        if mask is not None:
            x = x.masked_fill(mask[..., None] == 0, 0.0)
        states = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        out = []
        for h in x.split(LENGTH, 1):
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h, states[l])
            out.append(h)
        return self.head(self.norm(torch.cat(out, 1)))


def tokens(segments: int, rest: int = 0) -> Tensor:
    return torch.randint(
        0, 32, (2, segments * LENGTH + rest), generator=torch.Generator().manual_seed(segments)
    )


def armt() -> nn.Module:
    return authors_armt(n_layers=3, segment_size=LENGTH, dtype=torch.float64)


MODELS: dict[str, Callable[[], Any]] = {"whole input": lambda: made(WholeInput), "authors": armt}


def logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out["logits"]


@pytest.mark.parametrize("name", MODELS)
def test_memory_does_not_grow_with_the_segments(name: str) -> None:
    model = MODELS[name]()
    last = lambda ids: logits(model(ids))[:, -1]  # noqa: E731
    fast = rmtcompile.optimize(last)
    held = {}
    for segments in (SHORT, LONG):
        ids = tokens(segments)
        with torch.no_grad():
            assert_same(last(ids), fast(ids))
        held[segments] = peak_bytes(fast, ids)
    assert held[LONG] <= held[SHORT], held
    assert peak_bytes(last, tokens(LONG)) > 4 * peak_bytes(last, tokens(SHORT)), "what is measured grows"


@torch.no_grad()
def test_logits_are_not_held_where_tokens_are_returned() -> None:
    model = made(WholeInput)
    fast = rmtcompile.optimize(lambda ids: model(ids).argmax(-1))
    held = {}
    for segments in (SHORT, LONG):
        ids = tokens(segments)
        assert_same(model(ids).argmax(-1), fast(ids))
        held[segments] = peak_bytes(fast, ids) - 2 * fast(ids).nbytes
    assert held[LONG] <= 1.05 * held[SHORT], held


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_only_what_is_returned_grows(name: str) -> None:
    """All logits, and what they are made of at the end: their pieces while they are put together, or, where
    the head reads the whole input, its hidden states in pieces, joined, and normalised."""
    model = MODELS[name]()
    beside = 1 if name == "authors" else 3 * WIDTH / WORDS
    fast = rmtcompile.optimize(lambda ids: logits(model(ids)))
    held = {}
    for segments in (SHORT, LONG):
        out = fast(tokens(segments))
        held[segments] = peak_bytes(fast, tokens(segments)) - (1 + beside) * out.nbytes
    assert held[LONG] <= 1.05 * held[SHORT], held


def test_the_head_runs_once_on_one_position() -> None:
    model = made(WholeInput)
    fast = rmtcompile.optimize(lambda ids: model(ids)[:, -1])
    fast(tokens(4))
    code = fast.code
    start = code.index("def epilogue_last(")
    last = code[start : code.index("def ", start + 4)]
    assert code.count("'head.weight']") + code.count(".head.weight']") == 1
    assert code.count("aten.linear") == last.count("aten.linear") == 1
    assert f"1, {LENGTH - 1}, {LENGTH}, 1)" in last, "the last position of the last segment"
    assert "def epilogue(" not in code, "nothing follows the last layer of any other segment"


@torch.no_grad()
def test_a_mask_of_the_whole_input_and_a_short_last_segment() -> None:
    model = made(WholeInput)
    f = lambda ids, mask: model(ids, mask)[:, -3:]  # noqa: E731
    fast = rmtcompile.optimize(f)
    for segments, rest in ((4, 0), (1, 0), (2, 0), (9, 0), (3, 5), (1, 5), (6, 5), (0, 5)):
        ids = tokens(segments, rest)
        mask = (ids % 7 > 0).long()
        assert_same(f(ids, mask), fast(ids, mask))


def test_gradients_reach_what_is_embedded_segment_by_segment() -> None:
    model = made(WholeInput)
    fast = rmtcompile.optimize(lambda ids: model(ids)[..., 0])
    expected = torch.autograd.grad(model(tokens(4))[..., 0].sum(), list(model.parameters()))
    got = torch.autograd.grad(fast(tokens(4)).sum(), list(model.parameters()))
    assert_same(expected, got, 1e-9)
