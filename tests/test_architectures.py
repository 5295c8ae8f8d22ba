"""Models of Hugging Face, unmodified: ARMT on six decoders, with a window into the segment before, Mamba.

Equal in float64 to 1e-10 for S < L, S = L and S > L, for one segment, and for two rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from toys import assert_same
from zoo.hugging import Chunked, sliding_window_armt

import rmtcompile
from rmtcompile.models import build

OLD = transformers.__version__.startswith("4.")
SEGMENT, N_LAYERS = 8, 2
LENGTHS = (3, 1, 2, 5)  # segments
SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
DECODERS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (lambda: transformers.LlamaConfig(**GROUPED), "model.layers"),
    "gpt2": (
        lambda: transformers.GPT2Config(
            vocab_size=32,
            n_embd=16,
            n_layer=N_LAYERS,
            n_head=4,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        ),
        "transformer.h",
    ),
    "gpt_neox": (lambda: transformers.GPTNeoXConfig(**SHAPE), "gpt_neox.layers"),
    "qwen2": (lambda: transformers.Qwen2Config(**GROUPED), "model.layers"),
    "mistral": (lambda: transformers.MistralConfig(**GROUPED, sliding_window=6), "model.layers"),
    "gemma2": (
        lambda: transformers.Gemma2Config(**GROUPED, head_dim=4, query_pre_attn_scalar=4, sliding_window=5),
        "model.layers",
    ),
}
"""Configuration and path of the layers. Gemma-2's layers alternate: a window of 5 tokens, all tokens."""


def tokens(segments: int, length: int = SEGMENT) -> Tensor:
    return torch.randint(0, 32, (2, segments * length), generator=torch.Generator().manual_seed(segments))


def reference(name: str, correction: bool = True) -> nn.Module:
    """The reference ARMT in float64 with random association weights."""
    model = build(
        DECODERS[name][0](),
        segment_size=SEGMENT,
        num_mem_tokens=2,
        d_mem=4,
        correction=correction,
        dtype=torch.float64,
    ).eval()
    for layer in model.memory_cell.layers:
        nn.init.normal_(layer.W_mv.weight, std=0.5)
    return model


def check(model: nn.Module, logits: Callable[[Any], Tensor] = lambda out: out) -> rmtcompile.Optimized:
    """One program for all lengths, equal to the model, on diagonals."""
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for segments in LENGTHS:
        x = tokens(segments)
        assert_same(logits(model(x)), logits(fast(x)))
    assert fast.captures == 1
    assert fast.schedule.offsets == {(0, 1), (1, 0)}
    assert (fast.schedule.alpha, fast.schedule.width) == (1, N_LAYERS)
    fast.schedule.verify()
    return fast


@pytest.mark.parametrize("name", ["gpt_neox", "mistral", "gemma2"])
@torch.no_grad()
def test_armt(name: str) -> None:
    """Llama, GPT-2 and Qwen2 are in test_end_to_end.py."""
    fast = check(reference(name), lambda out: out.logits)
    assert [group.layers for group in fast.compiled.program.groups] == [(0, 1)]  # also if their masks differ


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_armt_without_correction(name: str) -> None:
    corrected, plain = reference(name), reference(name, correction=False)
    plain.load_state_dict(corrected.state_dict())
    x = tokens(4)
    assert (corrected(x).logits - plain(x).logits).abs().max() > 1e-3
    check(plain, lambda out: out.logits)


@torch.no_grad()
def test_armt_in_training_mode() -> None:
    """GPT-2 drops embeddings, attention and residuals: mean and variance of what it gives are the model's."""
    model = reference("gpt2").train()
    fast = rmtcompile.optimize(model, verify=True)
    x = tokens(5)[:1].expand(50, -1)
    mine, theirs = (torch.cat([run(x).logits for _ in range(4)]) for run in (fast, model))
    assert not torch.equal(mine[0], mine[1]) and not torch.equal(mine[:50], mine[50:100])
    error = (mine.mean(0) - theirs.mean(0)) / ((mine.var(0) + theirs.var(0)) / len(mine)).sqrt()
    assert abs(float(error.std()) - 1) < 0.25 and float(error.abs().max()) < 6
    assert abs(float(mine.var(0).mean() / theirs.var(0).mean()) - 1) < 0.1
    assert fast.schedule.width == N_LAYERS


WINDOWED = [(name, name in ("llama", "gemma2", "mistral")) for name in DECODERS]
"""(decoder, correction): one of the two for each decoder."""


@pytest.mark.parametrize(("name", "correction"), WINDOWED)
@torch.no_grad()
def test_armt_with_a_window_into_the_segment_before(name: str, correction: bool) -> None:
    if OLD and name in ("gpt2", "gemma2"):
        pytest.skip("the decoder itself does not run with these keys and values on transformers 4.51")
    config, path = DECODERS[name]
    model = sliding_window_armt(config(), path, SEGMENT, correction=correction)
    fast = check(model)
    carried = {carry.shape for carry in fast.schedule.carries if len(carry.shape) == 4}
    assert any(shape[-2] == SEGMENT for shape in carried), carried  # keys and values, memory tokens left out


@torch.no_grad()
def test_mamba_with_its_cache() -> None:
    """Four tokens a piece, as many as the convolution is wide; parts of it are computed in float32."""
    config = transformers.MambaConfig(
        vocab_size=32,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=N_LAYERS,
        conv_kernel=4,
        time_step_rank=4,
        residual_in_fp32=False,
    )
    model = Chunked(transformers.MambaForCausalLM(config).double().eval(), step=4)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for segments in LENGTHS:
        x = tokens(segments, 4)
        assert_same(model(x), fast(x))
    x = tokens(3, 4)
    x[:, :4] += 1
    second = [model(ids)[:, 4:8] for ids in (x % 32, tokens(3, 4))]
    assert (second[0] - second[1]).abs().max() > 1e-5  # the first piece reaches the second
    assert fast.captures == 1 and fast.schedule.offsets == {(0, 1), (1, 0)}
