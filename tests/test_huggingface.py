"""What people do with models of Hugging Face: training loops, `generate`; a program around or in them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_end_to_end import armt, ids
from torch import Tensor, nn
from toys import assert_same
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import rmtcompile


class Reader(PreTrainedModel, GenerationMixin):
    """A recurrent-memory model as libraries expect models to be."""

    config_class = LlamaConfig
    main_input_name = "input_ids"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.armt = armt("llama", torch.float64)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> CausalLMOutput:
        out = self.armt(input_ids, labels=labels)
        return CausalLMOutput(loss=out.loss, logits=out.logits)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}


def reader() -> Reader:
    config = LlamaConfig(vocab_size=32, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return Reader(config).eval()


def test_generate_runs_what_is_installed() -> None:
    model = reader()
    told = {"max_new_tokens": 3, "do_sample": False, "use_cache": False}
    expected = model.generate(ids(2), **told)
    program = rmtcompile.install(model)
    assert isinstance(model, PreTrainedModel)
    assert torch.equal(expected, model.generate(ids(2), **told))
    assert program.captures > 0
    captures = program.captures
    rmtcompile.uninstall(model)
    assert torch.equal(expected, model.generate(ids(2), **told)) and program.captures == captures


def trained(model: nn.Module, inner: nn.Module) -> list[Tensor]:
    """Losses of a few steps, as a training loop of Hugging Face takes them."""
    model.train()
    inner.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        batch = ids(3 + step)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    model.eval()
    return losses


@pytest.mark.parametrize("way", ["optimized", "installed"])
def test_a_training_loop(way: str) -> None:
    theirs, mine = armt("llama", torch.float64), armt("llama", torch.float64)
    fast: Any = rmtcompile.optimize(mine) if way == "optimized" else mine
    if way == "installed":
        rmtcompile.install(mine)
    assert_same(trained(theirs, theirs), trained(fast, mine), 1e-8)
    with torch.no_grad():
        again = copy.deepcopy(fast)  # its memory has a history of gradients
        assert_same(theirs(ids(2)).logits, again(ids(2)).logits, 1e-8)
    with pytest.raises(AttributeError, match="use_cache"):
        mine.config.use_cache = True
