"""Generation: the reference ARMT's, against its own forward on the whole text."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import pytest
import torch
import transformers
from test_end_to_end import SHAPE
from test_models import DECODERS, MEMORY, ids, small
from torch import Tensor
from toys import assert_same
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import MaxTimeCriteria, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import rmtcompile
from rmtcompile.models import ARMT, build, generation, recorded
from rmtcompile.models.generation import prefilled
from rmtcompile.models.recorded import NotRecordedError
from rmtcompile.runtime.execute import Executor

SIZE = MEMORY["segment_size"]
NEW = 2 * SIZE + 3
"""Tokens that are generated: past the ends of two segments."""


@functools.cache
def pair() -> tuple[ARMT, Any]:
    """A model and its program, which all tests share."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small()
    return model, rmtcompile.optimize(copy.deepcopy(model))


class Noted(LogitsProcessor):
    """Notes the logits of each step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(scores.clone())
        return scores


def on_the_whole_text(model: ARMT, x: Tensor, new: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens and logits of the plain loop."""
    logits = []
    for _ in range(new):
        logits.append(model(x, mask).logits[:, -1])
        x = torch.cat([x, logits[-1].argmax(-1, keepdim=True)], 1)
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
    return x, torch.stack(logits)


@pytest.mark.parametrize("length", [1, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE, 4 * SIZE + 2])
@torch.no_grad()
def test_the_tokens_and_logits_of_the_whole_text(length: int) -> None:
    model, fast = pair()
    x, noted = ids(length), Noted()
    expected, logits = on_the_whole_text(model, x, NEW)
    assert torch.equal(expected, fast.generate(x, NEW, logits_processor=[noted]))
    assert_same(logits, torch.stack(noted.seen))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("use_cache", [None, False])
@torch.no_grad()
def test_decoders(name: str, use_cache: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    softmax = torch.nn.functional.softmax  # Gemma-2 takes it in float32, which rounds
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    model, noted = small(DECODERS[name]), Noted()
    x = ids(SIZE + 3)
    expected, logits = on_the_whole_text(model, x, NEW)
    got = model.generate(x, NEW, logits_processor=[noted], use_cache=use_cache)
    assert torch.equal(expected, got)
    assert_same(logits, torch.stack(noted.seen))


@torch.no_grad()
def test_padding() -> None:
    model, fast = pair()
    x = ids(2 * SIZE + 3)
    mask = torch.ones_like(x)
    mask[0, :2] = 0
    mask[1, SIZE : SIZE + 3] = 0
    mask[1, 2 * SIZE] = 0
    noted = Noted()
    expected, logits = on_the_whole_text(model, x, NEW, mask)
    looks_at_masks = int(transformers.__version__.split(".")[0]) < 5  # a branch that no program can hold
    got = (model if looks_at_masks else fast).generate(x, NEW, attention_mask=mask, logits_processor=[noted])
    assert torch.equal(expected, got)
    assert_same(logits, torch.stack(noted.seen))


@torch.no_grad()
def test_closed_segments_are_read_once_and_by_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = pair()
    runs: list[int] = []
    run = Executor.run

    def counted(self: Executor, segments: int, *args: Any, **kwargs: Any) -> Any:
        runs.append(segments)
        return run(self, segments, *args, **kwargs)

    x = ids(5 * SIZE + 1)
    fast.generate(x, 1)
    monkeypatch.setattr(Executor, "run", counted)
    fast.generate(x, NEW)
    assert runs == [5] and fast._within.code.count("aten.cat([*run.taps") == 0  # logits of one position only


@torch.no_grad()
def test_a_token_costs_one_position() -> None:
    model = small()
    read: list[int] = []
    model.memory_cell.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: read.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    model.generate(ids(SIZE + 3), NEW)
    memory = MEMORY["num_mem_tokens"]
    prompt, steps = [SIZE + memory, 3], [n for n in read[2:] if n != memory]
    assert read[:2] == prompt and steps == [1] * (NEW - 1)
    assert read.count(memory) == (3 + NEW - 1) // SIZE


@torch.no_grad()
def test_drawn_tokens_are_those_of_the_classes_of_transformers() -> None:
    model, fast = pair()
    x = ids(SIZE + 2)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9}
    torch.manual_seed(1)
    got = fast.generate(x, NEW, **options)
    torch.manual_seed(1)
    expected = x
    for _ in range(NEW):
        scores = model(expected).logits[:, -1]
        for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.9)):
            scores = warper(expected, scores)
        expected = torch.cat([expected, torch.multinomial(scores.softmax(-1), 1)], 1)
    assert torch.equal(expected, got)


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_many_continuations_of_one_reading(batch: int) -> None:
    model, fast = pair()
    x, noted = ids(2 * SIZE + 3, batch), Noted()
    options = {"do_sample": True, "num_return_sequences": 4}
    got = fast.generate(x, NEW, **options, logits_processor=[noted])
    assert got.shape == (4 * batch, x.shape[1] + NEW)
    assert torch.equal(got[:, : x.shape[1]], x.repeat_interleave(4, 0))
    assert len({tuple(row.tolist()) for row in got}) > batch
    expected = model(got).logits[:, x.shape[1] - 1 : -1].transpose(0, 1)
    assert_same(expected, torch.stack(noted.seen))


@torch.no_grad()
def test_the_memory_of_one_text_is_held_once() -> None:
    model = small()
    segment, _ = prefilled(model, ids(2 * SIZE + 3, 1))
    layer = model.memory_cell.layers[1]
    assert layer.association is not None
    before = layer.association.data_ptr()
    segment.repeat(32)
    assert layer.association.shape[0] == 32 and layer.association.data_ptr() == before
    assert layer.association.untyped_storage().nbytes() == layer.association[0].nbytes


class Shown(BaseStreamer):
    def __init__(self) -> None:
        self.given: list[Tensor] = []
        self.is_closed = False

    def put(self, value: Tensor) -> None:
        self.given.append(value.reshape(-1))

    def end(self) -> None:
        self.is_closed = True


class Until(StoppingCriteria):
    """Stops a row with so many tokens."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return self.lengths <= input_ids.shape[1]


@torch.no_grad()
def test_ends_of_rows() -> None:
    model, _ = pair()
    x = ids(SIZE + 2)
    plain = model.generate(x, NEW)
    stops = Until([x.shape[1] + 5, x.shape[1] + 2])
    got = model.generate(x, NEW, stopping_criteria=[stops, MaxTimeCriteria(1000.0)], pad_token_id=31)
    assert torch.equal(got[0], plain[0, : x.shape[1] + 5])
    assert torch.equal(got[1, :-3], plain[1, : x.shape[1] + 2]) and (got[1, -3:] == 31).all()
    end = int(plain[0, x.shape[1] + 3])
    row = plain[:1, x.shape[1] :].tolist()[0]
    got = model.generate(x[:1], NEW, eos_token_id=[end, 99])
    assert got[0, x.shape[1] :].tolist() == row[: row.index(end) + 1]


@torch.no_grad()
def test_a_streamer_gets_the_text_and_each_token() -> None:
    model, _ = pair()
    x, shown = ids(SIZE + 2, 1), Shown()
    got = model.generate(x, 5, streamer=shown)
    assert torch.equal(torch.cat(shown.given), got[0]) and len(shown.given) == 6 and shown.is_closed


def test_what_makes_no_sense_is_refused() -> None:
    model, _ = pair()
    with pytest.raises(ValueError, match="do_sample=True"):
        model.generate(ids(3), 2, num_return_sequences=2)
    with pytest.raises(ValueError, match="temperature"):
        model.generate(ids(3), 2, do_sample=True, temperature=0.0)
    for wrong, options in {
        "num_beams=4 is not done here": {"num_beams": 4},
        "penalty_alpha=0.5 is not done here": {"generation_config": GenerationConfig(penalty_alpha=0.5)},
        "top_p has no effect without do_sample": {"top_p": 0.9},
        "min_new_tokens has no effect without eos": {"min_new_tokens": 2},
        "top_p": {"do_sample": True, "top_p": 2.0},
        "repetition_penalty|penalty": {"repetition_penalty": -1.0},
        "at least one new token, not -3": {"max_new_tokens": -3},
        "at least one new token, not -1": {"max_new_tokens": None, "max_length": 2},
        "say how many tokens": {"max_new_tokens": None},
        r"mask has to be \(2, 3\)": {"attention_mask": torch.ones(1, 2)},
    }.items():
        with pytest.raises(ValueError, match=wrong):
            model.generate(ids(3), **{"max_new_tokens": 2, **options})
    with pytest.raises(ValueError, match=r"batch, tokens.*not \(3,\)"):
        model.generate(ids(3)[0], 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        model.generate(ids(3), 2, temprature=0.5)
    older = small()
    older.memory_cell.model.config.cache_implementation = "hybrid"
    with pytest.raises(ValueError, match="another cache for LlamaForCausalLM"):
        older.generate(ids(3), 2, use_cache=True)
    with pytest.raises(ValueError, match="logits of all positions"):
        model(ids(9), labels=ids(9), logits_to_keep=1)


WAYS = {
    "penalty": {"repetition_penalty": 1.5},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "words that are not wanted": {"bad_words_ids": [[3], [5, 7]], "suppress_tokens": [1, 2]},
    "not before": {"min_new_tokens": 9, "eos_token_id": [13, 23]},
    "not before, with the text": {"min_length": SIZE + 9, "eos_token_id": 3},
    "drawn": {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
    "drawn, typical": {"do_sample": True, "typical_p": 0.8, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("default")  # transformers 4 warns of a top_k that is 0
@torch.no_grad()
def test_options_are_those_of_transformers(way: str) -> None:
    """The same tokens as a decoder of transformers draws from the same logits; options of a config, too."""
    options = {"top_k": 0, "pad_token_id": 0, **WAYS[way]}
    x = ids(SIZE)
    config = LlamaConfig(**SHAPE, eos_token_id=None)
    model = build(config, segment_size=64, num_mem_tokens=2, d_mem=4).double().eval()
    decoder = copy.deepcopy(model.memory_cell.model)  # a first segment has read no memory
    layers = decoder.get_submodule(model.memory_cell.layers_path)
    for i, layer in enumerate(layers):
        layers[i] = layer.layer
    config = GenerationConfig(**options, max_new_tokens=NEW)
    found = []
    for run, given in (
        (model, {**options, "max_new_tokens": NEW}),
        (model, {"generation_config": config}),
        (decoder, {"generation_config": config}),
    ):
        torch.manual_seed(0)
        found.append(run.generate(x, attention_mask=torch.ones_like(x), **given))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], model.generate(x, NEW)[:, : found[0].shape[1]])


@pytest.mark.filterwarnings("default")  # of transformers
@torch.no_grad()
def test_what_a_config_begins_with_is_not_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    """A cache that may be used need not be; values that transformers 4 has in each config say nothing."""
    older, x = small(), ids(3)
    older.memory_cell.model.config.cache_implementation = "hybrid"
    expected = older.generate(x, 4, use_cache=False)
    config = GenerationConfig(max_new_tokens=4, use_cache=True)
    with caplog.at_level(logging.WARNING, "rmtcompile"):
        assert torch.equal(expected, older.generate(x, generation_config=config))
        assert not caplog.records
        older.generate(x, generation_config=GenerationConfig(max_new_tokens=4, top_p=0.5))
    assert "top_p of the generation config: no effect" in caplog.text


@torch.no_grad()
def test_logits_to_keep() -> None:
    model, fast = pair()
    x = ids(3 * SIZE)
    expected = model(x).logits
    for keep in (1, SIZE - 1, SIZE + 1):
        assert_same(expected[:, -keep:], model(x, logits_to_keep=keep).logits)
    assert_same(expected[:, -1:], fast(x, logits_to_keep=1).logits)


# ---- tokens that are read by a graph -----------------------------------------------------------------------

is_static = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="static caches count on the host"
)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs on a CPU: functions that are run again, and are noted here."""
    made: list[Any] = []

    def recorded_here(body: Any) -> Any:
        made.append(body)
        return body

    monkeypatch.setattr(generation, "hindrance", lambda cell: None)
    monkeypatch.setattr(recorded, "recorded", recorded_here)
    return made


@is_static
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_graphs_of_decoders(name: str, graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    softmax = torch.nn.functional.softmax  # see test_decoders
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    model = small(DECODERS[name])
    for length in (1, SIZE - 1, SIZE, SIZE + 3):
        noted, x = Noted(), ids(length)
        expected, logits = on_the_whole_text(model, x, NEW)
        del graphs[:]
        assert torch.equal(expected, model.generate(x, NEW, logits_processor=[noted], cuda_graphs=True))
        assert_same(logits, torch.stack(noted.seen))
        assert len(graphs) == (2 if length == 1 else 1)  # the first segment has no memory to read


@is_static
@torch.no_grad()
def test_graphs_of_padded_texts(graphs: list[Any]) -> None:
    model = small()
    x = ids(2 * SIZE + 3)
    mask = torch.ones_like(x)
    mask[0, :2] = mask[1, SIZE : SIZE + 3] = mask[1, 2 * SIZE] = 0
    noted = Noted()
    expected, logits = on_the_whole_text(model, x, NEW, mask)
    options = {"attention_mask": mask, "cuda_graphs": True, "logits_processor": [noted]}
    assert torch.equal(expected, model.generate(x, NEW, **options)) and graphs
    assert_same(logits, torch.stack(noted.seen))


@is_static
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_graphs_of_many_continuations(batch: int, graphs: list[Any]) -> None:
    """The memory of one text is read where it is, until continuations write theirs."""
    model = small()
    x, noted = ids(2 * SIZE + 3, batch), Noted()
    options = {"do_sample": True, "num_return_sequences": 4, "cuda_graphs": True}
    got = model.generate(x, NEW, **options, logits_processor=[noted])
    expected = model(got).logits[:, x.shape[1] - 1 : -1].transpose(0, 1)
    assert_same(expected, torch.stack(noted.seen))
    assert len(graphs) == (2 if batch == 1 else 1)


@is_static
@torch.no_grad()
def test_the_memory_after_generation_is_the_models_own(graphs: list[Any]) -> None:
    """Another generation does not write into a memory that somebody has kept."""
    model, other = small(), ids(2 * SIZE + 5)
    model.generate(ids(SIZE + 2), NEW, cuda_graphs=True)
    kept = [layer.association for layer in model.memory_cell.layers]
    values = copy.deepcopy(kept)
    model.generate(other, NEW, cuda_graphs=True)
    assert_same(values, kept)


@is_static
@torch.no_grad()
def test_a_graph_that_computes_something_else_is_not_used(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one with a position written into it; and one that cannot be recorded."""

    def stale(body: Any) -> Any:
        result = body()
        return lambda: result

    def failing(body: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model, x = small(), ids(SIZE + 2)
    expected = model.generate(x, 40)
    for fake, said in ((stale, "differ from launched ones"), (failing, "not permitted when stream is")):
        monkeypatch.setattr(recorded, "recorded", fake)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "rmtcompile"):
            assert torch.equal(expected, model.generate(x, 40))
        assert caplog.text.count(said) == 1
        with pytest.raises(NotRecordedError, match=said):
            model.generate(x, 40, cuda_graphs=True)


@torch.no_grad()
def test_what_hinders_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    with pytest.raises(ValueError, match="cuda_graphs=True: CUDA graphs need one CUDA device"):
        model.generate(ids(3), 2, cuda_graphs=True)
    with pytest.raises(ValueError, match="read without a cache"):
        model.generate(ids(3), 2, cuda_graphs=True, use_cache=False)
    with pytest.raises(ValueError, match="has to be True, False or 'auto'"):
        model.generate(ids(3), 2, cuda_graphs="yes")


@pytest.mark.gpu
@torch.no_grad()
def test_hooks_hinder_graphs() -> None:
    model = small().cuda()
    model.memory_cell.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="a CUDA graph calls no hooks, and there are some"):
        model.generate(ids(3).cuda(), 2, cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_graphs_on_cuda(name: str) -> None:
    model = small(DECODERS[name]).cuda()
    for batch, length in ((1, 1), (2, SIZE - 1), (2, 2 * SIZE + 3)):
        x, noted = ids(length, batch).cuda(), [Noted(), Noted()]
        launched = model.generate(x, 40, logits_processor=noted[:1], cuda_graphs=False)
        assert torch.equal(launched, model.generate(x, 40, logits_processor=noted[1:], cuda_graphs=True))
        assert_same(torch.stack(noted[0].seen), torch.stack(noted[1].seen), 1e-5)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    given = {"attention_mask": mask}
    launched = model.generate(x, 40, **given, cuda_graphs=False)
    assert torch.equal(launched, model.generate(x, 40, **given, cuda_graphs=True))
    many = model.generate(x, 40, do_sample=True, num_return_sequences=4, cuda_graphs=True)
    assert many.shape == (8, x.shape[1] + 40)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@torch.no_grad()
def test_on_cuda() -> None:
    model = small().cuda()
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for length in (SIZE - 1, 3 * SIZE, 4 * SIZE + 2, 5 * SIZE + 1):
        x, noted = ids(length).cuda(), Noted()
        expected, logits = on_the_whole_text(model, x, NEW)
        assert torch.equal(expected, fast.generate(x, NEW, logits_processor=[noted]))
        assert_same(logits, torch.stack(noted.seen), 1e-5)
    got = fast.generate(x, NEW, do_sample=True, num_return_sequences=4)
    assert got.shape == (8, x.shape[1] + NEW)
