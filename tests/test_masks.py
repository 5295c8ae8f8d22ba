"""Values that a mask selects: sums, means, losses and what treats each row by itself are those of the model,
with their gradients, on diagonals; whatever else they reach is refused with its line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, Layer, assert_same, features, made

import rmtcompile
from rmtcompile.errors import CaptureError

CLASSES = 5
Loss = Callable[["Whole", Tensor, Tensor, Tensor], Any]


class Whole(nn.Module):
    """A loss of the whole input, taken where a mask says so."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("weight", torch.arange(1.0, CLASSES + 1))

    def hidden(self, x: Tensor) -> Tensor:
        memories, out = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers], []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, memories[l] = layer(h, memories[l])
            out.append(h)
        return torch.cat(out, 1)

    def forward(self, x: Tensor) -> Any:
        labels = (torch.arange(x.shape[1]) % CLASSES).expand(x.shape[0], -1)
        return self.loss(self, x, self.hidden(x), labels)


class BySegment(Whole):
    """Losses of the segments are added up, each where a mask of the segment says so."""

    def forward(self, x: Tensor) -> Any:
        memories = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        total = x.new_zeros(())
        for piece in x.split(SEGMENT, 1):
            h = piece
            for l, layer in enumerate(self.layers):
                h, memories[l] = layer(h, memories[l])
            labels = (torch.arange(h.shape[1]) % CLASSES).expand(h.shape[0], -1)
            total = total + self.loss(self, piece, h, labels)
        return total


class InLayers(Whole):
    """What a layer hands on is the mean of what it selects."""

    def forward(self, x: Tensor) -> Any:
        memories, out = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers], []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, m = layer(h, memories[l])
                memories[l] = m + torch.nan_to_num(h[h[..., 0] > 0].tanh().mean(0))
            out.append(h)
        return torch.cat(out, 1).square().mean()


def entropy(model: Whole, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    mask = x[..., 0] > 0
    return F.cross_entropy(model.head(h)[mask], labels[mask])


def weighted(model: Whole, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    mask = (x[..., 0] > 0).view(-1)
    logits, labels = model.head(h).view(-1, CLASSES)[mask], labels.reshape(-1)[mask]
    return F.cross_entropy(logits, labels, weight=model.weight, label_smoothing=0.1)


def probabilities(model: Whole, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    mask = x[..., 0] > 0
    return F.cross_entropy(model.head(h)[mask], F.one_hot(labels, CLASSES)[mask].to(h.dtype))


def written_twice(model: Whole, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    labels = torch.where(x[..., 0] > 0, labels, -1)
    return F.cross_entropy(model.head(h)[labels != -1], labels[labels != -1])


def shifted(model: Whole, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    mask = x[..., 0] > 0
    return F.cross_entropy(model.head(h)[:, :-1][mask[:, 1:]], labels[:, 1:][mask[:, 1:]], reduction="sum")


def counted(model: Whole, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    mask = x[..., 0] > 0
    logits, labels = model.head(h)[mask], labels[mask]
    return F.cross_entropy(logits, labels, reduction="sum") / labels.numel() + logits.sum() / logits.shape[0]


def by_hand(model: Whole, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    mask = x[..., 0] > 0
    rows = model.head(h[mask]).log_softmax(-1)  # the head runs on what is selected
    return -rows.gather(-1, labels[mask].unsqueeze(-1)).squeeze(-1).mean()


def elements(model: Whole, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    return h.masked_select(x > 0).pow(2).mean() + F.mse_loss(h[x > 0.5], x[x > 0.5], reduction="sum")


def logarithm(model: Whole, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    """Where it is not selected it has neither a value nor a gradient."""
    return (h[h > 0].log() + h[h > 0].rsqrt()).sum()


def positions(model: Whole, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    found = (x[..., 0] > 0).nonzero(as_tuple=True)
    flat = (x[..., 0] > 0).view(-1).nonzero().squeeze(-1)
    return (
        F.cross_entropy(model.head(h)[found], labels[found]) + h.view(-1, WIDTH).index_select(0, flat).mean()
    )


def accuracy(model: Whole, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    mask = x[..., 0] > 0
    hits = model.head(h)[mask].argmax(-1) == labels[mask]
    return hits.to(h.dtype).mean() + h[mask].mean((0, 1)) + hits.any() + hits.all()


def stored(model: Whole, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    kept, mask = x.clone(), x[..., 0] > 0
    kept[mask] = h[mask]
    return kept.square().mean()


def overwritten(model: Whole, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    """What was selected stays, whatever is written later."""
    mask, kept = x[..., 0] > 0, h.clone()
    rows = kept.detach()[mask]
    kept.zero_()
    mask[:, 0] = True
    return rows.mean() + h[mask].mean()


def twice(model: Whole, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    mask = x[..., 0] > 0
    rows, labels = model.head(h)[mask], labels[mask]
    few = labels > 1
    return F.cross_entropy(rows[few], labels[few])


LOSSES = [
    entropy, weighted, probabilities, written_twice, shifted, counted, by_hand, elements, logarithm,
    positions, accuracy, stored, overwritten, twice,
]  # fmt: skip


def assert_trains(model: nn.Module, fast: Any, x: Tensor) -> None:
    """Equal loss and gradients, undefined where the model's are."""
    reference = copy.deepcopy(model)
    expected, got = reference(x), fast(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12, equal_nan=True)
    model.zero_grad()
    if expected.requires_grad:
        expected.sum().backward()
        got.sum().backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        none = torch.zeros_like(q)
        mine, other = (none if one.grad is None else one.grad for one in (p, q))
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_on_diagonals(loss: Loss) -> None:
    model = made(lambda: Whole(loss))
    fast = rmtcompile.optimize(model, backend="eager")
    for segments in (2, 1, 5):
        assert_trains(model, fast, features(segments))
    assert_trains(model, fast, features(5)[:, : 4 * SEGMENT + 1])  # a shorter last segment
    assert fast.schedule.width == 3


@pytest.mark.parametrize("loss", [entropy, elements, by_hand, accuracy])
def test_nothing_is_selected(loss: Loss) -> None:
    model = made(lambda: Whole(loss))
    fast = rmtcompile.optimize(model, backend="eager")
    fast(features(4))
    assert_trains(model, fast, -features(4).abs())


@pytest.mark.parametrize("kind", [BySegment, InLayers])
@pytest.mark.parametrize("loss", [entropy, counted, by_hand])
def test_in_segments_and_layers(kind: type[Whole], loss: Loss) -> None:
    if kind is InLayers and loss is not entropy:
        return
    model = made(lambda: kind(loss))
    fast = rmtcompile.optimize(model, backend="eager")
    for segments in (5, 2, 1):
        x = features(segments)
        x[:, ::SEGMENT, 0] = 1  # something is selected in each segment
        assert_trains(model, fast, x)
    fast(features(5))
    assert fast.schedule.width == 3


def test_what_is_not_selected_may_be_undefined() -> None:
    """Neither values nor gradients of it get anywhere."""
    model = made(lambda: Whole(lambda self, x, h, labels: (h[x[..., 0] > 0] / x[x[..., 0] > 0]).mean()))
    fast = rmtcompile.optimize(model, backend="eager")
    x = features(4)
    x[..., 1:] = x[..., 1:].abs() + 1
    x[..., 0] = torch.where(x[..., 0] > 0, x[..., 0], 0)
    assert_trains(model, fast, x)


def test_half_precision_sums_do_not_overflow() -> None:
    x = features(4, dtype=torch.float16)
    model = made(lambda: Whole(lambda self, x, h, labels: (h[x > 0] * 0 + 3e4).mean()), torch.float16)
    with torch.no_grad():
        torch.testing.assert_close(rmtcompile.optimize(model, backend="eager")(x), model(x))


REFUSED: dict[str, Loss] = {
    "the result": lambda self, x, h, labels: h[x[..., 0] > 0],
    "`T`": lambda self, x, h, labels: h[x[..., 0] > 0].T.sum(),
    "`max`": lambda self, x, h, labels: h[x[..., 0] > 0].max(),
    "`cumsum`": lambda self, x, h, labels: h[x[..., 0] > 0].cumsum(0).sum(),
    "`cat`": lambda self, x, h, labels: torch.cat([h[x[..., 0] > 0], h[x[..., 0] > 0]]).sum(),
    "`add_`": lambda self, x, h, labels: h[x[..., 0] > 0].add_(1).sum(),
    "`__len__`": lambda self, x, h, labels: h.sum() / len(h[x[..., 0] > 0]),
    "`__add__`": lambda self, x, h, labels: h.sum() / (h[x[..., 0] > 0].shape[0] + 1),
    "selections by masks that may differ": lambda self, x, h, labels: F.mse_loss(
        h[x[..., 0] > 0], h[x[..., 1] > 0]
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_uses_are_refused(what: str) -> None:
    model = made(lambda: Whole(REFUSED[what]))
    with pytest.raises(CaptureError) as refusal:
        rmtcompile.optimize(model, backend="eager")(features(3))
    text = str(refusal.value)
    assert what in text.replace("`add`", "`__add__`") and "test_masks.py:" in text
    assert "torch.where(mask, labels, -100)" in text


def test_a_mask_that_changes_in_between_is_another_one() -> None:
    def loss(self: Whole, x: Tensor, h: Tensor, labels: Tensor) -> Tensor:
        mask = x[..., 0] > 0
        logits = self.head(h)[mask]
        mask[:, 0] = True
        return F.cross_entropy(logits, labels[mask])

    with pytest.raises(CaptureError, match="masks that may differ"):
        rmtcompile.optimize(made(lambda: Whole(loss)), backend="eager")(features(3))


def test_a_selection_that_is_left_behind_is_refused() -> None:
    class Leaving(Whole):
        def forward(self, x: Tensor) -> Tensor:
            self.left = self.hidden(x)[x[..., 0] > 0]
            return self.left.sum()

    with pytest.raises(CaptureError, match="the result has to know"):
        rmtcompile.optimize(made(lambda: Leaving(entropy)), backend="eager")(features(3))


class Ended(Whole):
    """Texts of a batch end at different lengths: memories of those that have ended stay as they are."""

    def forward(self, x: Tensor, lengths: Tensor) -> Any:  # type: ignore[override]
        memories = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        out = []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            goes_on = (lengths > s * SEGMENT)[:, None]
            for l, layer in enumerate(self.layers):
                h, new = layer(h, memories[l])
                memories[l] = torch.where(goes_on, new, memories[l])
            out.append(h)
        return self.loss(self, x, torch.cat(out, 1), torch.stack(memories))


@pytest.mark.parametrize("loss", [lambda m, x, h, memories: (h, memories), lambda m, x, h, memories: h])
def test_memories_of_texts_that_have_ended_stay(loss: Loss) -> None:
    """Whether the memories are returned, or those of the last segment are dead code."""
    model = made(lambda: Ended(loss))
    other = copy.deepcopy(model)
    fast = rmtcompile.optimize(other)
    for segments, rest, batch in ((5, 0, 2), (2, 0, 2), (7, 1, 1), (1, 0, 2)):
        x = features(segments + 1, batch)[:, : segments * SEGMENT + rest]
        lengths = torch.arange(1, batch + 1) * SEGMENT + 1
        expected, got = model(x, lengths), fast(x, lengths)
        assert_same(expected, got)
        first = [y[0] if isinstance(y, tuple) else y for y in (expected, got)]
        grads = [
            torch.autograd.grad(y.square().sum(), list(m.parameters()), allow_unused=True)
            for y, m in zip(first, (model, other), strict=True)
        ]
        assert_same(*grads, 1e-9)
    assert fast.schedule.level_rule == "s + l"
