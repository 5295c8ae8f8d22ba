"""The reference ARMT against formulas written out by hand, a second implementation, and what it promises."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
)
from zoo.authors import authors_armt, example_input

from rmtcompile.models import ARMT, ARMTConfig, AssociativeLayer, build, load, load_weights, save

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OLDER = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
DECODERS: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=6),
    "gemma2": Gemma2Config(**SHAPE, head_dim=4, query_pre_attn_scalar=4, sliding_window=6),
    "gpt2": GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=4, n_positions=64, **ENDS),
    "gpt_neox": GPTNeoXConfig(**OLDER, **ENDS),
}
MEMORY: dict[str, Any] = {"segment_size": 8, "num_mem_tokens": 2, "d_mem": 4}


def small(config: Any = None, *, awake: bool = True, **options: Any) -> ARMT:
    """A small model in float64; awake: with random `W_mv`, so that the memory says something."""
    options = {**MEMORY, "dtype": torch.float64, **options}
    model = build(LlamaConfig(**SHAPE) if config is None else config, **options).eval()
    if awake:
        for layer in model.memory_cell.layers:
            nn.init.normal_(layer.W_mv.weight, std=0.5)
    return model


def ids(length: int, batch: int = 2) -> Tensor:
    return torch.randint(0, 32, (batch, length))


# --- the formulas -------------------------------------------------------------------------------------------


class Naive:
    """The associative memory of one head and one sequence, number by number (arXiv 2407.04841)."""

    def __init__(self, layer: AssociativeLayer, head: int, n_heads: int, correction: bool) -> None:
        def rows(weight: Tensor) -> Tensor:
            return weight.chunk(n_heads)[head]

        self.wq, self.wk = rows(layer.W_mq.weight), rows(layer.W_mk.weight)
        self.wv = rows(layer.W_mv.weight)
        self.wb, self.bias = layer.W_mb.weight[head], layer.W_mb.bias[head]
        self.correction = correction
        self.a: Tensor | None = None
        self.z: Tensor | None = None

    @staticmethod
    def phi(u: Tensor) -> Tensor:
        r = [max(float(c), 0.0) for c in u] + [max(-float(c), 0.0) for c in u]
        values = torch.tensor([r[i] * r[i - j] for j in (1, 2, 3) for i in range(len(r))], dtype=u.dtype)
        return values / max(float(values.norm()), 1e-12)

    def read(self, x: Tensor) -> Tensor:
        if self.a is None or self.z is None:
            return torch.zeros(len(self.wv), dtype=x.dtype)
        q = self.phi(self.wq @ x)
        return (q @ self.a) / (q @ self.z + 1e-5)

    def write(self, tokens: Tensor) -> None:
        """All tokens of a segment see the memory as it was before the segment."""
        a, z = self.a, self.z
        da, dz = 0.0, 0.0
        for m in tokens:
            k, v, strength = self.phi(self.wk @ m), self.wv @ m, torch.sigmoid(self.wb @ m + self.bias)
            gamma = 1.0
            if a is not None and z is not None:
                weight = k @ z + 1e-5
                v = v - (k @ a) / weight
                if self.correction:
                    gamma = min(max(1 - float(weight / (k @ k)), 0.0), 1.0)
            da, dz = da + strength * torch.outer(k, v), dz + gamma * k
        self.a, self.z = (da, dz) if a is None else (a + da, z + dz)


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("n_heads", [1, 2])
@torch.no_grad()
def test_layer_follows_the_formulas(n_heads: int, correction: bool) -> None:
    config = ARMTConfig(segment_size=5, num_mem_tokens=3, d_mem=4, n_heads=n_heads, correction=correction)
    inner = nn.Linear(6, 6, dtype=torch.float64)
    layer = AssociativeLayer(inner, 6, config)
    nn.init.normal_(layer.W_mv.weight)
    naive = [[Naive(layer, h, n_heads, correction) for h in range(n_heads)] for _ in range(2)]
    for _ in range(4):
        x = torch.randn(2, 8, 6, dtype=torch.float64)
        expected = torch.stack(
            [
                torch.stack([token + torch.cat([head.read(token) for head in heads]) for token in sequence])
                for heads, sequence in zip(naive, x)
            ]
        )
        expected = inner(expected)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        for b, heads in enumerate(naive):
            for h, head in enumerate(heads):
                head.write(expected[b, -3:])
                torch.testing.assert_close(layer.association[b, h], head.a, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(layer.normaliser[b, h], head.z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize(("n_heads", "correction"), [(1, True), (2, True), (1, False)])
@torch.no_grad()
def test_agrees_with_the_authors_manner(impl: str, n_heads: int, correction: bool) -> None:
    theirs = authors_armt(n_layers=3, n_heads=n_heads, correction=correction, attn_implementation=impl)
    config = theirs.memory_cell.model.config
    ours = small(config, n_heads=n_heads, correction=correction, attn_implementation=impl)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("memory_cell.layers.")}
    ours.load_state_dict(state)  # strict: the names are the same
    (x,) = example_input(2, 4)
    for length in (32, 21, 8, 5):
        mine, other = ours(x[:, :length]).logits, theirs(x[:, :length]).logits
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)
    mask = torch.ones_like(x)
    mask[0, -4:] = 0
    torch.testing.assert_close(ours(x, mask).logits, theirs(x, attention_mask=mask).logits)


@torch.no_grad()
def test_starts_as_its_decoder() -> None:
    """With `W_mv` at zero each segment is the decoder's own, memory tokens or not (they come last)."""
    model = small(awake=False)
    x = ids(24)
    decoder = LlamaForCausalLM(model.memory_cell.model.config).double().eval()
    plain = {
        k.replace("layer.", "", 1) if ".layer." in k else k: v
        for k, v in model.memory_cell.model.state_dict().items()
        if ".W_m" not in k
    }
    decoder.load_state_dict({k.replace(".layer.", "."): v for k, v in plain.items()})
    expected = torch.cat([decoder(piece).logits for piece in x.split(8, 1)], 1)
    torch.testing.assert_close(model(x).logits, expected)


@torch.no_grad()
def test_memory_matters_after_the_first_segment_only() -> None:
    asleep, x = small(awake=False), ids(24)
    before = asleep(x).logits
    for layer in asleep.memory_cell.layers:
        nn.init.normal_(layer.W_mv.weight, std=0.5)
    after = asleep(x).logits
    assert torch.equal(before[:, :8], after[:, :8])
    assert ((before - after)[:, 8:].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 30])
@torch.no_grad()
def test_any_length_is_a_prefix_of_a_longer_one(length: int) -> None:
    model, x = small(), ids(32)
    torch.testing.assert_close(model(x[:, :length]).logits, model(x).logits[:, :length])


def test_gradients_reach_the_memory_and_back_through_segments() -> None:
    model = small().train()
    x = model.memory_cell.model.get_input_embeddings()(ids(24)).detach().requires_grad_()
    model(inputs_embeds=x).logits[:, 16:].sum().backward()
    assert x.grad is not None and (x.grad[:, :8].abs() > 0).any()
    missing = [name for name, p in model.named_parameters() if p.grad is None and "embed_tokens" not in name]
    assert missing == []


# --- decoders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoders_run(name: str, impl: str, head: bool) -> None:
    if (name, impl) == ("gemma2", "sdpa") and int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip("Gemma-2 is eager only: its attention has a soft cap")
    model, x = small(DECODERS[name], attn_implementation=impl, head=head), ids(21)
    out = model(x, attention_mask=torch.ones_like(x), output_hidden_states=True)
    plain = model(x)
    result, again = (out.logits, plain.logits) if head else (out.last_hidden_state, plain.last_hidden_state)
    assert result.shape == (2, 21, 32 if head else 16) and result.dtype == torch.float64
    torch.testing.assert_close(result, again)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 21, 16)] * 4
    if not head:
        assert torch.equal(out.hidden_states[-1], result)
    assert set(plain.keys()) == {"logits" if head else "last_hidden_state"}
    assert model.memory_cell.layers[0].association.shape == (2, 1, 24, 16)


@torch.no_grad()
def test_hidden_states_are_what_enters_each_layer() -> None:
    model, x = small(), ids(16)
    states = model(x, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], model.memory_cell.model.get_input_embeddings()(x))
    logits = model.memory_cell.model.lm_head(states[-1])
    torch.testing.assert_close(logits, model(x).logits)


@torch.no_grad()
def test_embeddings_instead_of_tokens() -> None:
    model, x = small(), ids(20)
    embeds = model.memory_cell.model.get_input_embeddings()(x)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(x).logits)


@torch.no_grad()
def test_masked_tokens_do_not_count() -> None:
    model, x = small(), ids(20)
    mask = torch.ones_like(x)
    mask[:, 2:4] = 0
    other = x.clone()
    other[:, 2:4] = (x[:, 2:4] + 1) % 32
    left, right = model(x, mask).logits, model(other, mask).logits
    torch.testing.assert_close(left[:, 4:], right[:, 4:])


@torch.no_grad()
def test_loss_is_over_the_whole_sequence() -> None:
    model, x = small(), ids(20)
    labels = x.clone()
    labels[:, :5] = -100
    out = model(x, labels=labels)
    kept = F.log_softmax(out.logits, -1)[:, 4:-1].gather(-1, x[:, 5:, None])
    torch.testing.assert_close(out.loss, -kept.mean())


@pytest.mark.parametrize("length", [3, 8, 15])
@torch.no_grad()
def test_generation_is_forward_again_and_again(length: int) -> None:
    model, x = small(), ids(length)
    expected = x
    for _ in range(12):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(x, 12), expected)


def test_wraps_a_decoder_that_exists() -> None:
    decoder = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    model = build(decoder, **MEMORY, layers="model.layers")
    assert model.memory_cell.model is decoder
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(ids(20)).logits.dtype == torch.bfloat16


# --- checkpoints --------------------------------------------------------------------------------------------


def test_names_are_those_of_the_open_implementation() -> None:
    names = set(small().state_dict())
    layer = "memory_cell.model.model.layers.2."
    assert {
        "memory_cell.memory",
        "memory_cell.model.lm_head.weight",
        "memory_cell.model.model.norm.weight",
    } < names
    assert {name.removeprefix(layer) for name in names if name.startswith(layer)} == {
        "W_mq.weight", "W_mk.weight", "W_mv.weight", "W_mb.weight", "W_mb.bias",
        "layer.self_attn.q_proj.weight", "layer.self_attn.k_proj.weight", "layer.self_attn.v_proj.weight",
        "layer.self_attn.o_proj.weight", "layer.mlp.gate_proj.weight", "layer.mlp.up_proj.weight",
        "layer.mlp.down_proj.weight", "layer.input_layernorm.weight", "layer.post_attention_layernorm.weight",
    }  # fmt: skip


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_round_trip(tmp_path: Path, tied: bool, head: bool) -> None:
    model = small(LlamaConfig(**SHAPE, tie_word_embeddings=tied), head=head, n_heads=2)
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.config == model.config
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    x = ids(20)
    assert torch.equal(again(x)[0], model(x)[0])
    assert load(tmp_path, dtype=torch.bfloat16)(x)[0].dtype == torch.bfloat16


@torch.no_grad()
def test_layers_registered_twice_load_under_either_name(tmp_path: Path) -> None:
    theirs = authors_armt(n_layers=3)
    file = tmp_path / "model.safetensors"
    state = {
        k: v for k, v in theirs.state_dict().items() if not k.startswith("memory_cell.model.model.layers.")
    }
    assert any(k.startswith("memory_cell.layers.") for k in state)
    save_file(state, file)
    ours = small(theirs.memory_cell.model.config, awake=False)
    load_weights(ours, file)
    (x,) = example_input(2, 3)
    torch.testing.assert_close(ours(x).logits, theirs(x).logits)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = small()
    save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["memory_cell.other"] = tensors.pop("memory_cell.memory")
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match=r"missing \['memory_cell.memory'\], unexpected \['memory_cell.other'\]"
    ):
        load_weights(model, file)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_size": 0}, "segment_size has to be at least 1, not 0"),
        ({"num_mem_tokens": 0}, "num_mem_tokens has to be at least 1, not 0"),
        ({"n_heads": 3}, "n_heads=3 does not divide d_mem=4"),
        ({"n_heads": 3, "d_mem": 6}, "n_heads=3 does not divide the model's width 16"),
        ({"layers": "model.norm"}, "model.norm is a LlamaRMSNorm, not an nn.ModuleList of layers"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = small(head=False)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="labels need a model with a language head"):
        model(ids(4), labels=ids(4))
    with pytest.raises(ValueError, match=r"Linear has no nn\.ModuleList of layers"):
        build(nn.Linear(2, 2), **MEMORY)


def test_a_copy_has_the_memory_and_not_its_history() -> None:
    model = small()
    model(ids(20))
    layer, again = model.memory_cell.layers[0], copy.deepcopy(model).memory_cell.layers[0]
    assert layer.association.requires_grad and not again.association.requires_grad
    assert torch.equal(layer.association, again.association)


def test_sizes_of_a_model_stay_and_a_cache_stays_off() -> None:
    config = small().config
    config.use_cache = False
    config.pad_token_id = 3
    for name, value in (("use_cache", True), ("d_mem", 8)):
        with pytest.raises(AttributeError, match=name):
            setattr(config, name, value)


def test_it_is_saved_and_loaded_as_others_are(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path / "model")
    again = ARMT.from_pretrained(tmp_path / "model")
    tokens = ids(20)
    assert again.config == model.config and torch.equal(model(tokens).logits, again(tokens).logits)
