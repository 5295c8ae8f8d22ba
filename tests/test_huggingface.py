"""What people do with models of Hugging Face: training loops, `generate`; a program around or in them."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_model
from test_end_to_end import SHAPE, armt, ids
from torch import Tensor, nn
from toys import assert_same
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

import rmtcompile
from rmtcompile import UnsupportedError
from rmtcompile.models import build


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


@torch.no_grad()
def test_a_model_of_transformers_generates_on_a_program() -> None:
    model = reader()
    told = {"max_new_tokens": 3, "do_sample": False, "use_cache": False}
    x = ids(2)
    expected = model.generate(x, **told)
    fast = rmtcompile.optimize(model)
    assert torch.equal(expected, fast.generate(x, **told))
    assert fast._within.captures > 0 and "forward" not in vars(model)


class Caching(Reader):
    _supports_cache_class = True  # asked for by transformers 4

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> CausalLMOutput:
        out = super().forward(input_ids)
        kept = out.logits[:, None]
        past_key_values.update(kept, kept, 0)
        return out

    def prepare_inputs_for_generation(self, input_ids: Tensor, **given: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "past_key_values": given["past_key_values"]}


@torch.no_grad()
def test_a_cache_among_the_arguments_is_refused() -> None:
    model = Caching(reader().config).eval()
    fast = rmtcompile.optimize(model)
    with pytest.raises(UnsupportedError, match="DynamicCache"):
        fast.generate(ids(2), max_new_tokens=2, do_sample=False, use_cache=True)
    assert "forward" not in vars(model)


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


# ---- the libraries themselves ------------------------------------------------------------------------------


CHECKPOINTS_INSIDE = find_spec("transformers.modeling_layers") is not None
"""Whether this transformers runs layers again from within, and not around them."""


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight texts of four segments, each its own labels."""

    def __init__(self) -> None:
        self.texts = ids(4, batch=8)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.texts[index], "labels": self.texts[index]}


def losses_of_a_trainer(model: nn.Module, folder: Path, **options: Any) -> list[float]:
    told = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=3, learning_rate=1e-2, report_to=[],
        use_cpu=True, logging_steps=1, seed=0, data_seed=0, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model, told, train_dataset=Texts(), eval_dataset=Texts())
    trainer.train()
    logged = trainer.state.log_history
    return [entry[name] for entry in logged for name in ("loss", "eval_loss") if name in entry]


@pytest.mark.filterwarnings("default")  # of the libraries
def test_a_trainer_runs_what_is_installed(tmp_path: Path) -> None:
    theirs, mine = armt("llama", torch.float32), armt("llama", torch.float32)
    program = rmtcompile.install(mine)
    expected = losses_of_a_trainer(theirs, tmp_path / "theirs", save_strategy="no")
    found = losses_of_a_trainer(mine, tmp_path / "mine", save_strategy="no")
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == 3, "nothing was learned"
    assert program.captures == 1


@pytest.mark.filterwarnings("default")  # of the libraries
def test_a_trainer_of_an_optimized_model(tmp_path: Path) -> None:
    """It evaluates, adds up gradients of micro-batches, computes again, saves and goes on from what it has
    saved."""
    options = {
        "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "gradient_accumulation_steps": 2,
        "gradient_checkpointing": CHECKPOINTS_INSIDE,
    }  # fmt: skip
    theirs, mine = armt("llama", torch.float32), armt("llama", torch.float32)
    expected = losses_of_a_trainer(theirs, tmp_path / "theirs", **options)
    fast = rmtcompile.optimize(mine)
    assert losses_of_a_trainer(fast, tmp_path / "mine", **options) == pytest.approx(expected, rel=1e-4)
    assert len(expected) >= 4
    again = rmtcompile.optimize(armt("llama", torch.float32))
    load_model(again, str(tmp_path / "mine" / "checkpoint-3" / "model.safetensors"))
    for name, tensor in fast.state_dict().items():
        assert_same(tensor, again.state_dict()[name])


def test_a_loss_of_several_micro_batches() -> None:
    model, batch = armt("llama", torch.float64), ids(3, batch=4)
    labels = batch.clone()
    labels[0, :11] = -100
    items = (labels[:, 1:] != -100).sum()
    whole = model(batch, labels=labels).loss
    parts = [
        model(batch[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=items).loss for i in (0, 2)
    ]
    assert_same(whole, parts[0] + parts[1])


def test_checkpoints_of_activations_are_switched() -> None:
    """By the reference model, as by any of transformers; its program computes again what they would."""
    model = armt("llama", torch.float64).train()
    layers = [layer.layer for layer in model.memory_cell.layers]
    if not CHECKPOINTS_INSIDE:
        with pytest.raises(ValueError, match="would write their memory twice"):
            model.gradient_checkpointing_enable()
        assert not model.memory_cell.model.is_gradient_checkpointing
        return
    for name in ("gradient", "activation"):
        getattr(model, f"{name}_checkpointing_enable")()
        assert all(layer.gradient_checkpointing for layer in layers)
        fast = rmtcompile.optimize(copy.deepcopy(model))
        fast(ids(3), labels=ids(3)).loss.backward()
        assert fast.explain().recomputed == 1
        getattr(model, f"{name}_checkpointing_disable")()
        assert not any(layer.gradient_checkpointing for layer in layers)


@pytest.mark.filterwarnings("default")
def test_accelerate_prepares_a_program() -> None:
    theirs, mine = armt("llama", torch.float32), armt("llama", torch.float32)
    batch = ids(3, batch=2)
    found = []
    for model in (theirs, rmtcompile.optimize(mine)):
        AcceleratorState._reset_state(reset_partial_state=True)  # others in this process have made one
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        out = prepared(batch, labels=batch)
        accelerator.backward(out.loss)
        optimizer.step()
        found.append(out.loss.detach())
    assert_same(found[0], found[1], 1e-3)
    before = armt("llama", torch.float32).state_dict()
    assert any(not torch.equal(p, before[name]) for name, p in mine.state_dict().items()), "no step was taken"
    for p, q in zip(theirs.parameters(), mine.parameters(), strict=True):
        assert_same(p.detach(), q.detach(), 1e-2)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("way", ["optimized", "installed"])
def test_accelerate_takes_off_what_it_has_put_on(way: str) -> None:
    theirs, mine = armt("llama", torch.float32), armt("llama", torch.float32)
    fast: Any = rmtcompile.optimize(mine) if way == "optimized" else mine
    if way == "installed":
        rmtcompile.install(mine)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(fast)
    with torch.no_grad():
        rounded = prepared(ids(3)).logits
        again = copy.deepcopy(prepared)
        again.memory_cell.memory.add_(1.0)
        assert not torch.equal(rounded, again(ids(3)).logits), "a copy runs on weights of its own"
        bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert_same(theirs(ids(3)).logits, bare(ids(3)).logits, 1e-5)
    assert not torch.equal(rounded, theirs(ids(3)).logits)


@pytest.mark.filterwarnings("default")
def test_attention_that_is_an_operation_on_functions_is_refused() -> None:
    config = LlamaConfig(**SHAPE)
    options = {"segment_size": 8, "num_mem_tokens": 2, "d_mem": 4}
    model = build(config, **options, attn_implementation="flex_attention").eval()
    with torch.no_grad(), pytest.raises(UnsupportedError, match="takes a function: flex_attention") as found:
        rmtcompile.optimize(model)(ids(3))
    assert "attn_implementation='sdpa'" in str(found.value)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("way", ["optimized", "installed"])
def test_adapters_of_peft(way: str) -> None:
    """A frozen model with low-rank adapters: a program of all of it, or in the model that is wrapped."""
    found = []
    for is_mine in (False, True):
        model = armt("llama", torch.float64).requires_grad_(False)
        if is_mine and way == "installed":
            rmtcompile.install(model)
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).double()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
                elif "lora_A" in name:
                    parameter.copy_(torch.linspace(-0.2, 0.1, parameter.numel()).view_as(parameter))
        run = rmtcompile.optimize(adapted) if is_mine and way == "optimized" else adapted
        run(input_ids=ids(3), labels=ids(3)).loss.backward()
        grads = [p.grad for p in adapted.parameters() if p.grad is not None]
        assert len(grads) == sum("lora_" in name for name, _ in adapted.named_parameters())
        found.append(grads)
    for theirs, mine in zip(*found, strict=True):
        assert_same(theirs, mine, 1e-7)
