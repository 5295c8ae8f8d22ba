"""Losses that are added up segment by segment and divided by what was counted in the input meanwhile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, Layer, assert_same, made

import rmtcompile


class Shifted(nn.Module):
    """Labels are the next tokens: the last segment has one less."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, 7)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def loss(self, logits: Tensor, ids: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        n = min(logits.shape[1], ids.shape[1] - 1 - seen)
        labels = ids[:, seen + 1 : seen + 1 + n]
        loss = F.cross_entropy(logits[:, :n].reshape(-1, 7), labels.reshape(-1), reduction="sum")
        return loss, (labels != 3).sum()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        memories = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        total, count, seen = 0.0, 0, 0
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, memories[l] = layer(h, memories[l])
            loss, number = self.loss(self.head(h), ids, seen)
            total, count, seen = total + loss, count + number, seen + h.shape[1]
        return total / count


class Weighted(Shifted):
    """The weight of each position comes from the input."""

    def loss(self, logits: Tensor, ids: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        piece = ids[:, seen : seen + logits.shape[1]]
        weight = 1 / (1 + piece.to(logits.dtype))
        loss = F.cross_entropy(logits.flatten(0, 1), piece.flatten(), reduction="none")
        return (loss.view(weight.shape) * weight).sum(), weight.sum()


class Masked(Shifted):
    """The loss of what a mask selects."""

    def loss(self, logits: Tensor, ids: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        piece = ids[:, seen : seen + logits.shape[1]]
        mask = piece != 0
        return F.cross_entropy(logits[mask], piece[mask], reduction="sum"), mask.sum()


@pytest.mark.parametrize("kind", [Shifted, Weighted, Masked])
def test_equal_on_diagonals(kind: type[Shifted]) -> None:
    model = made(kind)
    fast = rmtcompile.optimize(model, backend="eager")
    parameters = list(model.parameters())
    for length in (5 * SEGMENT, 2 * SEGMENT, SEGMENT, 4 * SEGMENT + 2, 7 * SEGMENT):
        ids = torch.arange(2 * length).remainder(7).view(2, length)
        expected, got = model(ids), fast(ids)
        assert_same(expected, got)
        for p, q in zip(
            torch.autograd.grad(expected, parameters, allow_unused=True),
            torch.autograd.grad(got, parameters, allow_unused=True),
            strict=True,
        ):
            assert_same(torch.zeros(1) if p is None else p, torch.zeros(1) if q is None else q, 1e-9)
    assert fast.schedule.width == 3
