"""runtime/bands/packed.py: a queue of texts in one wavefront that is cut into bands."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_growing_carries import model_of
from torch import Tensor, nn
from toys import Toy, Uneven, assert_same, features, made
from zoo.others import ZOO

import rmtcompile
from rmtcompile import FailedDocument
from rmtcompile.runtime.bands.packed import BandedPack

NAMES = ("infini_attention", "skewed", "hybrid", "compressed_older", "skip_connections", "alternating")
COUNTS = (4, 5, 1, 3, 6, 4)


def in_bands(model: nn.Module, bands: int = 2, **options: Any) -> Any:
    return rmtcompile.optimize(copy.deepcopy(model), devices=["cpu"] * bands, **options)


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts were on their way on each level."""
    seen: list[int] = []
    step = BandedPack.step

    def counted(pack: BandedPack) -> Any:
        seen.append(len(pack.members))
        return step(pack)

    monkeypatch.setattr(BandedPack, "step", counted)
    return seen


@pytest.mark.parametrize("bands", [2, 3])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_texts_of_any_lengths(name: str, bands: int, levels: list[int]) -> None:
    model = ZOO[name].build()
    texts = [ZOO[name].inputs(2, count)[0] for count in COUNTS]
    texts += [text[:, :-1] for text in texts[:2]] if name in ("infini_attention", "skip_connections") else []
    stream = in_bands(model, bands).stream(texts, together=True)
    for text, result in zip(texts, stream, strict=True):
        assert_same(copy.deepcopy(model)(text), result)
    assert not stream.alone and max(levels) > 1


@torch.no_grad()
def test_one_ramp_for_all(levels: list[int]) -> None:
    """As many levels as one text of all segments takes, and layers of several costs."""
    model = made(lambda: Uneven([8, 8, 4096, 8]))
    fast = in_bands(model)
    texts = [features(count, d=16) for count in COUNTS]
    for text, result in zip(texts, fast.map(texts, together=True), strict=True):
        assert_same(model(text), result)
    assert len(levels) == sum(COUNTS) + 4 - 1


class Narrow(Toy):
    """Fails for texts of one row."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            raise ZeroDivisionError("of no use")
        return super().forward(x)


@torch.no_grad()
def test_a_text_that_fails_stops_no_other() -> None:
    model = made(lambda: Narrow(4))
    fast = in_bands(model)
    texts = [features(3), features(4, batch=1), features(5), features(2)]
    results = fast.map(texts, together=True)
    for text, result in zip(texts, results, strict=True):
        if text.shape[0] == 1:
            assert isinstance(result, FailedDocument) and "of no use" in str(result.error)
        else:
            assert_same(model(text), result)


@torch.no_grad()
def test_weights_that_are_written_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also through `.data`, which torch does not count: copies on other devices are compared, and all texts
    on their way run again."""
    model = made(lambda: Toy(4))
    fast = in_bands(model)
    texts = [features(count) for count in (4, 5, 6)]
    fast(texts[0])
    executor = fast._last[0].executor
    held = iter([True, False])
    monkeypatch.setattr(executor, "has_held", lambda: next(held, True))
    results = []
    for result in fast.stream(texts, together=True):
        results.append(result)
        if len(results) == 1:
            for twin in (model, fast.model):
                for parameter in twin.parameters():
                    parameter.data.mul_(0.5)
    for text, result in zip(texts[1:], results[1:], strict=True):
        assert_same(model(text), result)


@torch.no_grad()
def test_why_texts_run_by_themselves() -> None:
    fast = in_bands(made(lambda: Toy(4)))
    stream = fast.stream([features(4), features(4)], share_prefixes=True)
    assert len(list(stream)) == 2
    assert next(iter(stream.alone)) == "its layers are cut into bands, which share no beginnings"
    growing = in_bands(model_of("triangle"))
    stream = growing.stream([features(2), features(3)], together=True)
    for count, result in zip((2, 3), stream, strict=True):
        assert_same(model_of("triangle")(features(count)), result)
    assert next(iter(stream.alone)) == "cells hold values that grow with the segments"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["infini_attention", "skewed", "hybrid"])
@torch.no_grad()
def test_on_two_devices(name: str, levels: list[int]) -> None:
    """On a machine of one card both bands share it."""
    cards = ["cuda:0", f"cuda:{min(2, torch.cuda.device_count()) - 1}"]
    model = ZOO[name].build().cuda(0)
    texts = [ZOO[name].inputs(2, count)[0].cuda(0) for count in COUNTS]
    fast = rmtcompile.optimize(copy.deepcopy(model), devices=cards, backend="eager")
    for text, result in zip(texts, fast.map(texts, together=True), strict=True):
        assert_same(copy.deepcopy(model)(text), result)
    assert max(levels) > 1
