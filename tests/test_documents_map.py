"""Documents: a queue of texts in one wavefront gives what each gives by itself, whatever the others are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_advancing import MODELS, T, pair, reference_armt, tokens
from torch import Tensor, nn
from toys import SEGMENT, AttributeState, Toy, assert_same, features, made

import rmtcompile
from rmtcompile import FailedDocument
from rmtcompile.runtime.packed import Pack

pytestmark = pytest.mark.filterwarnings("ignore::rmtcompile.SequentialScheduleWarning")

WHOLE = [2, 3, 5, 3, 2, 6, 4, 3]
"""Segments of documents that end with a segment."""


def copied(model: Any) -> Any:
    return rmtcompile.optimize(copy.deepcopy(model) if isinstance(model, nn.Module) else model)


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents were on their way on each level."""
    seen: list[int] = []
    step = Pack.step

    def counted(pack: Pack) -> Any:
        seen.append(len(pack.members))
        return step(pack)

    monkeypatch.setattr(Pack, "step", counted)
    return seen


# ---- the same results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_whole_segments(name: str, widths: list[int]) -> None:
    model, fast = pair(name)
    documents = [MODELS[name][1](segments * T) for segments in WHOLE]
    results = fast.map(documents, together=True)
    assert len(results) == len(documents)
    for document, result in zip(documents, results, strict=True):
        assert_same(model(document), result)
    assert bool(widths) == (name != "rows")


@torch.no_grad()
def test_one_steady_state(widths: list[int]) -> None:
    """Levels are those of one text as long as all together."""
    model = made(lambda: Toy(n_layers=4))
    fast = rmtcompile.optimize(model)
    documents = [features(segments) for segments in WHOLE]
    for document, result in zip(documents, fast.map(documents), strict=True):
        assert_same(model(document), result)
    assert len(widths) == sum(WHOLE) + 4 - 1 and max(widths) > 2


@pytest.mark.parametrize("name", ["reference armt", "skewed", "the last segment is another"])
@torch.no_grad()
def test_rests(name: str) -> None:
    model, fast = pair(name)
    documents = [MODELS[name][1](length) for length in (9, 13, 22, 12, 8, 27, 15, 13, 9, 14, 21, 11)]
    for document, result in zip(documents, fast.map(documents, together=True), strict=True):
        assert_same(model(document), result)


@torch.no_grad()
def test_later_rests_are_in_one_wavefront(widths: list[int]) -> None:
    model = made(lambda: Toy(d=4))
    fast = rmtcompile.optimize(model)
    rests = [features(3)[:, :-1], features(4)[:, :-2], features(3)[:, :-1]]
    fast.map(rests)  # captures
    for together, has_pack in ((True, True), ("auto", False)):
        widths.clear()
        results = fast.map(rests * 2, together=together)
        for wanted, document in zip(results, rests * 2, strict=True):
            assert_same(model(document), wanted)
        assert bool(widths) == has_pack


@pytest.mark.parametrize("name", ["reference armt", "several states"])
@torch.no_grad()
def test_a_changed_token_leaves_all_other_documents_bitwise_equal(name: str) -> None:
    _, fast = pair(name)
    documents = [MODELS[name][1](segments * T).clone() for segments in WHOLE]
    before = fast.map(documents)
    changed = 3
    documents[changed][0, 1] = (documents[changed][0, 1] + 1) % 32
    after = fast.map(documents)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        x, y = (one if isinstance(one, Tensor) else one["logits"] for one in (a, b))
        assert torch.equal(x, y) == (i != changed)


@torch.no_grad()
def test_what_one_document_is_filled_with_does_not_reach_the_next(widths: list[int]) -> None:
    model, fast = pair("reference armt")
    broken = copy.deepcopy(fast)
    embed = broken.model.memory_cell.model.get_input_embeddings()
    embed.weight[31] = float("nan")
    documents = [tokens(segments * T) % 31 for segments in WHOLE]
    documents[2][:] = 31
    results = broken.map(documents)
    assert widths and results[2].logits.isnan().all()
    for i in (0, 1, 3, 4, 5):
        assert_same(model(documents[i]), results[i])


@torch.no_grad()
def test_documents_of_one_dim_dicts_and_tuples() -> None:
    model, fast = pair("reference armt")
    ids = tokens(3 * T, batch=1)
    for document in (ids[0], {"input_ids": ids}, (ids,)):
        for result in fast.map([document] * 3):
            assert_same(model(ids), result)


@torch.no_grad()
def test_masks_and_losses_of_each_document() -> None:
    model, _ = pair("reference armt")
    fast = copied(model)
    documents = []
    for segments in (3, 2, 4, 3):
        ids = tokens(segments * T)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        documents.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    for document, result in zip(documents, fast.map(documents), strict=True):
        assert_same(model(**document), result)


@torch.no_grad()
def test_the_model_is_left_as_after_the_last_document() -> None:
    model = made(AttributeState)
    twin = copy.deepcopy(model)
    documents = [features(segments, batch=1) for segments in (3, 4, 2, 5)]
    results = rmtcompile.optimize(twin).map(documents)
    for document, result in zip(documents, results, strict=True):
        assert_same(model(document), result)
    for mine, other in zip(model.layers, twin.layers, strict=True):
        assert (mine.first, mine.count) == (other.first, other.count)
        assert_same(mine.memory, other.memory)


# ---- one after the other -----------------------------------------------------------------------------------


class Going(Toy):
    """Goes on with the memory of its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        states = list(self.states) if self.states is not None else [x.new_zeros(2, 4)] * 3
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h, states[l])
            out.append(h)
        self.states = states
        return torch.cat(out, 1)


@torch.no_grad()
def test_what_goes_on_from_call_to_call_does_so() -> None:
    model = made(Going)
    stream = rmtcompile.optimize(copy.deepcopy(model)).stream([features(n) for n in (3, 2, 4, 3)])
    for segments, result in zip((3, 2, 4, 3), stream, strict=True):
        assert_same(model(features(segments)), result)
    assert "the forward goes on from what it has left in the model" in stream.alone


class Scaled(Toy):
    """Every cell reads what is computed of the whole text."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax((1, 2), keepdim=True)
        states = [x.new_zeros(2, 4)] * 3
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h / scale, states[l])
            out.append(h)
        return torch.cat(out, 1)


@torch.no_grad()
def test_cells_that_share_a_value_of_their_text_run_apart() -> None:
    model = made(Scaled)
    stream = rmtcompile.optimize(model).stream([features(n) for n in (3, 2, 4)])
    for segments, result in zip((3, 2, 4), stream, strict=True):
        assert_same(model(features(segments)), result)
    assert stream.alone == {"all cells of a call share a value that is computed of the input": 3}


@torch.no_grad()
def test_hooks_run_for_each_document() -> None:
    fast = rmtcompile.optimize(made(Toy))
    seen = []
    fast.register_forward_hook(lambda *_: seen.append(1))
    fast.map([features(3)] * 3)
    assert len(seen) == 3


@torch.no_grad()
def test_by_themselves_if_asked_for(widths: list[int]) -> None:
    fast = rmtcompile.optimize(made(Toy))
    stream = fast.stream([features(3)] * 2, together=False)
    assert len(list(stream)) == 2 and not widths
    assert stream.alone == {"documents are to run by themselves": 2}


# ---- failures, order, cancelling ---------------------------------------------------------------------------


@torch.no_grad()
def test_a_document_that_fails_does_not_stop_the_others() -> None:
    model, fast = pair("reference armt")
    good = [tokens(segments * T) for segments in WHOLE]
    bad = tokens(3 * T)
    bad[1, -2] = 99
    documents = [*good[:2], bad, *good[2:4], "a text", *good[4:]]
    results = fast.map(documents)
    failed = [i for i, result in enumerate(results) if isinstance(result, FailedDocument)]
    assert failed == [2, 5] == [results[i].index for i in failed]
    for i in set(range(len(documents))) - set(failed):
        assert_same(model(documents[i]), results[i])
    with pytest.raises(IndexError, match="out of range"):
        _ = results[2].logits
    with pytest.raises(TypeError, match="a document is a tensor, a dict of arguments or a tuple"):
        results[5]["logits"]
    assert repr(results[5]).startswith("FailedDocument(5: TypeError: a document is")


@torch.no_grad()
def test_where_cells_fail_each_document_runs_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(model)
    documents = [features(segments) for segments in WHOLE]
    step, count = Pack.step, 0

    def failing(pack: Pack) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            raise torch.OutOfMemoryError
        return step(pack)

    monkeypatch.setattr(Pack, "step", failing)
    for document, result in zip(documents, fast.map(documents), strict=True):
        assert_same(model(document), result)
    assert count > 5


@torch.no_grad()
def test_documents_are_read_as_there_is_room() -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(model)
    read = 0

    def endless() -> Iterator[Tensor]:
        nonlocal read
        while True:
            read += 1
            yield features(3)

    stream = fast.stream(endless())
    for i, result in zip(range(10), stream, strict=False):
        assert_same(model(features(3)), result)
        assert read <= i + 3
    stream.close()
    assert list(stream) == [] and read <= 13
    assert_same(model(features(4)), fast(features(4)))


@torch.no_grad()
def test_an_error_of_the_source_comes_behind_what_was_read() -> None:
    fast = rmtcompile.optimize(made(Toy))

    def breaking() -> Iterator[Tensor]:
        yield from (features(3), features(2), features(4))
        raise OSError("no more")

    stream = fast.stream(breaking())
    assert [next(stream).shape[1] for _ in range(3)] == [9, 6, 12]
    with pytest.raises(OSError, match="no more"):
        next(stream)


@torch.no_grad()
def test_other_calls_in_between_change_nothing() -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(model)
    documents = [features(segments) for segments in WHOLE]
    for document, result in zip(documents, fast.stream(documents), strict=True):
        assert_same(model(document), result)
        assert_same(model(features(7)), fast(features(7)))
        assert_same(model(features(4)), fast.run(features(4))[0])


def test_nothing_of_gradients_is_kept() -> None:
    fast = rmtcompile.optimize(made(Toy))
    assert not any(result.requires_grad for result in fast.map([features(3), features(2)]))


@torch.no_grad()
def test_an_empty_queue() -> None:
    assert rmtcompile.optimize(reference_armt()).map([]) == []


# ---- prefixes ----------------------------------------------------------------------------------------------


def alike(x: Tensor, unit: int) -> list[Tensor]:
    """Documents that begin alike, in several ways."""
    y, z = x.flip(1), x.roll(1, 1)

    def of(*parts: tuple[Tensor, int]) -> Tensor:
        return torch.cat([part[:, : n * unit] for part, n in parts], 1)

    return [
        of((x, 3)), of((x, 4), (y, 2)), of((x, 4), (z, 3)), of((y, 3)), of((x, 2), (y, 3)),
        of((x, 4), (z, 5)), of((x, 4), (z, 5)), of((y, 5)),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["reference armt", "skewed", "the last segment is another"])
@torch.no_grad()
def test_segments_with_which_several_begin_run_once(name: str, widths: list[int]) -> None:
    model, fast = pair(name)
    longest = MODELS[name][1](10 * T).clone()
    documents = alike(longest, T)
    stream = fast.stream(documents, share_prefixes=True)
    for document, result in zip(documents, stream, strict=True):
        assert_same(model(document), result)
    assert stream.shared >= 5 and stream.shared_segments >= 22 and not stream._snapshots
    layers = fast.compiled.program.n_layers
    alpha = fast.compiled.program.alpha
    assert len(widths) <= alpha * (stream.segments - stream.shared_segments) + 2 * alpha * layers


@torch.no_grad()
def test_what_else_is_given_tells_documents_apart() -> None:
    model, _ = pair("reference armt")
    fast = copied(model)
    ids = tokens(5 * T)
    documents = []
    for masked in (0, 0, 1, 1):
        mask = torch.ones_like(ids)
        mask[0, :masked] = 0
        documents.append({"input_ids": ids, "attention_mask": mask})
    stream = fast.stream(documents, share_prefixes=True)
    for document, result in zip(documents, stream, strict=True):
        assert_same(model(**document), result)
    assert stream.shared == 2 and stream.shared_segments == 8 and not stream.alone


@torch.no_grad()
def test_a_failing_document_leaves_nothing_to_others() -> None:
    model, fast = pair("skewed")
    documents = [document.clone() for document in alike(MODELS["skewed"][1](10 * T), T)]
    documents[1] = documents[1][:, :, None].expand(-1, -1, 3) if documents[1].dim() == 2 else "a text"
    results = fast.map([*documents, documents[2]], share_prefixes=True)
    assert [i for i, one in enumerate(results) if isinstance(one, FailedDocument)] == [1]
    for i in (0, 2, 3, 4, 5, 6, 7):
        assert_same(model(documents[i]), results[i])


@torch.no_grad()
def test_forwards_that_need_the_whole_input_share_nothing() -> None:
    class Shifted(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + x.mean((1, 2), keepdim=True))

    model = made(Shifted)
    fast = rmtcompile.optimize(model)
    documents = alike(features(10), SEGMENT)
    stream = fast.stream(documents, share_prefixes=True)
    for document, result in zip(documents, stream, strict=True):
        assert_same(model(document), result)
    assert not stream.shared


# ---- what is written meanwhile, compiled cells -------------------------------------------------------------


@torch.no_grad()
def test_a_document_that_is_written_over_meanwhile_is_no_silent_error() -> None:
    fast = rmtcompile.optimize(made(lambda: Toy(n_layers=4)))
    room = features(2)

    def reused() -> Iterator[Tensor]:
        for seed in range(4):
            room.copy_(features(2) + seed)
            yield room

    results = fast.map(reused())
    assert isinstance(results[0], FailedDocument)
    with pytest.raises(rmtcompile.UnsupportedError, match="written over while it was on its way"):
        _ = results[0].shape


@torch.no_grad()
def test_weights_that_are_written_meanwhile_are_those_of_all_cells() -> None:
    model = made(lambda: Toy(n_layers=4))
    fast = rmtcompile.optimize(model)
    documents = [features(2) + seed for seed in range(5)]
    stream = fast.stream(documents)
    assert_same(model(documents[0]), next(stream))
    model.layers[2].mix.weight.mul_(1.5)
    for document, result in zip(documents[1:], stream, strict=True):
        assert_same(model(document), result)


@torch.no_grad()
def test_compiled_cells(widths: list[int]) -> None:
    model, _ = pair("reference armt")
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="aot_eager")
    documents = [tokens(segments * T) for segments in WHOLE]
    for document, result in zip(documents, fast.map(documents), strict=True):
        assert_same(model(document), result)
    assert widths


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@torch.no_grad()
def test_on_cuda(widths: list[int]) -> None:
    model = reference_armt().cuda()
    fast = rmtcompile.optimize(copy.deepcopy(model))
    lengths = [*(segments * T for segments in WHOLE), *range(9, 16)]
    documents = [tokens(length).cuda() for length in lengths]
    for together in ("auto", True):
        results = fast.map(documents, together=together)
        for document, result in zip(documents, results, strict=True):
            assert_same(model(document), result, 1e-5)
        assert bool(widths) == (together is True)


def test_together_has_three_values() -> None:
    fast = copied(made(Toy))
    for wrong in ("x", "all", None, 2):
        with pytest.raises(ValueError, match=r"together must be True, False or 'auto', not "):
            fast.map([features(2)], together=wrong)


@torch.no_grad()
def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    model, fast = made(Toy), rmtcompile.optimize(made(Toy))
    documents = [features(n) for n in (4, 5, 3)]
    found = fast.map(documents, progress=True)
    assert "documents: 100%" in capsys.readouterr().err
    for document, result in zip(documents, found, strict=True):
        assert_same(model(document), result)
    fast.map(iter(documents), progress=True)
    assert "3document" in capsys.readouterr().err.replace(" ", "")
