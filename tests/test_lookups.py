"""Gradients of embeddings: one for the whole input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import SEGMENT, WIDTH, Layer, assert_same, made

import rmtcompile
from rmtcompile.runtime import lookups
from rmtcompile.runtime.lookups import divided

WORDS = 11


class Words(nn.Module):
    """i[B, N], i[B, N] -> logits; two embeddings, one with padding, and a head that is one of them."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=3)
        self.kinds = nn.Embedding(4, WIDTH)
        self.layers = nn.ModuleList(Layer(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        memories: list[Any] = [torch.zeros(ids.shape[0], WIDTH, dtype=self.words.weight.dtype)] * 3
        out = []
        for piece, kind in zip(ids.split(SEGMENT, 1), kinds.split(SEGMENT, 1), strict=True):
            h = self.words(piece) + self.kinds(kind) + 0.1 * F.embedding(piece, self.words.weight)
            for l, layer in enumerate(self.layers):
                h, memories[l] = layer(h, memories[l])
            out.append(self.head(h))
        return torch.cat(out, 1)


def ids(segments: int, words: int, rest: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(segments)
    return torch.randint(words, (2, segments * SEGMENT + rest), generator=generator)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many indices each dense gradient of an embedding was made of."""
    made: list[int] = []
    plain = lookups.dense_gradient

    def counted(grad: Tensor, indices: Tensor, *rest: Any) -> Tensor:
        made.append(indices.numel())
        return plain(grad, indices, *rest)

    monkeypatch.setattr(lookups, "dense_gradient", counted)
    return made


@pytest.mark.parametrize("recompute", ["none", "level", 2])
@pytest.mark.parametrize("tied", [False, True])
def test_one_gradient_for_the_whole_input(tied: bool, recompute: Any, dense: list[int]) -> None:
    model = made(lambda: Words(tied))
    fast = rmtcompile.optimize(copy.deepcopy(model), recompute=recompute)
    for segments, rest in ((5, 0), (2, 0), (1, 0), (6, 0), (3, 1)):
        found = []
        for run in (fast, model):
            parameters = list(run.parameters())
            loss = run(ids(segments, WORDS, rest), ids(segments, 4, rest)).pow(2).sum()
            found.append(list(torch.autograd.grad(loss, parameters)))
        assert_same(found[1], found[0], 1e-9)
        if not rest:
            # Three lookups: with padding and without, and that of kinds.
            assert dense == [2 * segments * SEGMENT] * 3
        dense.clear()


def test_gradients_of_gradients() -> None:
    model = made(Words)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    found = []
    for run in (fast, model):
        parameters = [run.words.weight, *run.layers.parameters()]
        loss = run(ids(3, WORDS), ids(3, 4)).pow(2).sum()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        again = torch.autograd.grad(sum(g.pow(2).sum() for g in first), parameters)
        found.append([*first, *again])
    assert_same(found[1], found[0], 1e-8)


def test_a_function_without_embeddings_of_arguments() -> None:
    aten = torch.ops.aten

    def plain(x: Tensor) -> tuple[Tensor]:
        return (aten.mul(x, 2),)

    def computed(weight: Tensor, x: Tensor) -> tuple[Tensor]:
        return (aten.embedding(weight, aten.add(x, 1)),)

    def by_frequency(weight: Tensor, x: Tensor) -> tuple[Tensor]:
        return (aten.embedding(weight, x, -1, True),)

    assert divided(plain) is divided(computed) is divided(by_frequency) is None
