"""The Associative Recurrent Memory Transformer (ARMT, arXiv 2407.04841) around any Hugging Face decoder.

```
segment s:   [tokens, memory tokens]  ->  layer 0  ->  layer 1  ->  ...  ->  output of the tokens
                                            | ^          | ^
                                         A_0, z_0     A_1, z_1         (carried from segment to segment)
```

Each layer adds to its input what its association matrix A knows about it, runs, and writes what the memory
tokens have become into A.  The plain sequential form is meant to be read and to be checked against:
nothing here is arranged for speed, and no control flow depends on the values of tensors.  Names of
modules are those of the open implementation (`memory_cell.model.<layers>.<i>.W_mq`, ...), so that its
checkpoints load.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .associative import ARMTConfig, AssociativeLayer


@dataclass
class ARMTOutput(ModelOutput):
    """What `ARMT.forward` gives.

    Attributes:
        loss: f[], mean next-token cross entropy, if labels were given.
        logits: f[B, T, V] for models with a language head.
        last_hidden_state: f[B, T, D] for models without one.
        hidden_states: if asked for, one f[B, T, D] for what enters each layer (before association), and the
            decoder's final hidden state.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def find_layers(model: nn.Module) -> str:
    """The path of the longest `nn.ModuleList` that lies in no other one.

    Raises:
        ValueError: the model has no `nn.ModuleList`.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {
        name: len(module)
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    if not outer:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of layers; name its path with layers=..."
        )
    return max(outer, key=lambda name: outer[name])


class MemoryCell(nn.Module):
    """One segment: the decoder on [tokens, memory tokens].

    The decoder is changed in place: each of its layers becomes an `AssociativeLayer`.
    Memory tokens enter as `inputs_embeds`; whether a decoder scales those (Gemma-2) differs
    between transformers 4 and 5.

    Raises:
        ValueError: no list of layers was found at `config.layers`.
    """

    model: Any
    """The decoder."""

    def __init__(self, model: nn.Module, config: ARMTConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.layers_path = config.layers or find_layers(model)
        layers = self.layers
        if not isinstance(layers, nn.ModuleList):
            raise ValueError(
                f"{self.layers_path} is a {type(layers).__name__}, not an nn.ModuleList of layers"
            )
        width: int = self.model.config.hidden_size
        for i, layer in enumerate(layers):
            layers[i] = AssociativeLayer(layer, width, config)
        table = self.model.get_input_embeddings().weight
        start = torch.randn(config.num_mem_tokens, table.shape[1], dtype=table.dtype, device=table.device)
        self.memory = nn.Parameter(start * table.detach().std())

    @property
    def layers(self) -> Any:
        """The decoder's layers."""
        return self.model.get_submodule(self.layers_path)

    def reset(self) -> None:
        """Forgets everything: the next segment is the first."""
        for layer in self.layers:
            layer.reset()

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        write: bool = True,
        output_hidden_states: bool = False,
    ) -> ARMTOutput:
        """One segment: inputs_embeds f[B, T, D], attention_mask i64[B, T] -> the output for its T tokens."""
        memory = self.memory.expand(inputs_embeds.shape[0], -1, -1)
        kwargs: dict[str, Any] = {
            "inputs_embeds": torch.cat([inputs_embeds, memory], dim=1),
            "use_cache": False,
        }
        if attention_mask is not None:
            kwargs["attention_mask"] = F.pad(attention_mask, (0, self.config.num_mem_tokens), value=1)
        if output_hidden_states:
            kwargs["output_hidden_states"] = True
        for layer in self.layers:
            layer.writes = write
        with self._entering(output_hidden_states) as entering:
            out = self.model(**kwargs)
        if output_hidden_states:
            entering.append(out["hidden_states"][-1])
        length = inputs_embeds.shape[1]
        return ARMTOutput(
            logits=out["logits"][:, :length] if "logits" in out else None,
            last_hidden_state=None if "logits" in out else out["last_hidden_state"][:, :length],
            hidden_states=tuple(h[:, :length] for h in entering) if output_hidden_states else None,
        )

    def decode(self, inputs_embeds: Tensor, cache: Any, attention_mask: Tensor | None = None) -> Tensor:
        """Some more tokens of a segment: f[B, n, D] -> logits f[B, n, V]; nothing is written to memory.

        Args:
            cache: keys and values of the segment's tokens so far, to which those of these are added.
            attention_mask: i64[B, tokens of the segment with these], or None.
        """
        return self._cached(inputs_embeds, cache, attention_mask, write=False)["logits"]

    def close(self, cache: Any, attention_mask: Tensor | None, batch: int) -> None:
        """Reads the memory tokens behind a segment's tokens, and writes them to memory."""
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (0, self.config.num_mem_tokens), value=1)
        self._cached(self.memory.expand(batch, -1, -1), cache, attention_mask, write=True)

    def _cached(self, inputs_embeds: Tensor, cache: Any, attention_mask: Tensor | None, write: bool) -> Any:
        for layer in self.layers:
            layer.writes = write
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        taken = inspect.signature(type(self.model).forward).parameters
        given["cache" if "cache" in taken else "past_key_values"] = cache  # transformers 5.24 renamed it
        return self.model(inputs_embeds=inputs_embeds, use_cache=True, **given)

    @contextlib.contextmanager
    def _entering(self, wanted: bool) -> Iterator[list[Tensor]]:
        """Collects what enters each layer, if wanted: versions of transformers differ in what they record."""
        seen: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        layers = self.layers if wanted else ()
        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


class ARMT(nn.Module):
    """A decoder with associative memory over any number of segments.

    Args:
        model: a Hugging Face decoder, with language head (`LlamaForCausalLM`) or without (`LlamaModel`); it
            is changed in place.
        config: the memory.

    Raises:
        ValueError: no list of layers was found, or the sizes do not fit.
    """

    def __init__(self, model: nn.Module, config: ARMTConfig) -> None:
        super().__init__()
        self.config = config
        self.memory_cell = MemoryCell(model, config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> ARMTOutput:
        """Runs the segments in order, from an empty memory; the last segment may be shorter.

        Args:
            input_ids: i64[B, T], or
            inputs_embeds: f[B, T, D].
            attention_mask: i64[B, T], 1 for tokens and 0 for padding.  Memory tokens are never masked.
                With a mask and sdpa, transformers 4.51 branches on its values (`torch.all(mask == 1)`).
            labels: i64[B, T], -100 where there is no loss; shifted here, over segment borders too.
            output_hidden_states: whether to give the hidden states.
            logits_to_keep: of how many positions at the end to give logits; 0 for all.
            num_items_in_batch: by what to divide the loss, instead of by the number of labels here: that of
                all micro-batches of a step, as a `Trainer` that accumulates gradients gives it.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`, or labels for a model without
                language head, or with logits of some positions only.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if labels is not None and logits_to_keep:
            raise ValueError("labels need the logits of all positions")
        if inputs_embeds is None:
            inputs_embeds = self.memory_cell.model.get_input_embeddings()(input_ids)
        size = self.config.segment_size
        self.memory_cell.reset()
        outputs = []
        for start in range(0, inputs_embeds.shape[1], size):
            piece = slice(start, start + size)
            mask = None if attention_mask is None else attention_mask[:, piece]
            out = self.memory_cell(
                inputs_embeds[:, piece], mask, output_hidden_states=output_hidden_states
            )
            if logits_to_keep and out.logits is not None:
                out.logits = out.logits[:, -logits_to_keep:]
            outputs.append(out)
        joined = self._join(outputs, labels, num_items_in_batch)
        if logits_to_keep and joined.logits is not None:
            joined.logits = joined.logits[:, -logits_to_keep:]
        return joined

    accepts_loss_kwargs = True
    """For a `Trainer`: `forward` takes `num_items_in_batch`."""

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Has the decoder's layers compute again in backward what they do not keep; arguments are those of
        transformers. A program of rmtcompile computes levels again instead.

        Raises:
            ValueError: this transformers runs whole layers again, which would write their memory twice.
        """
        self._checkpointing("enable")(*args, **kwargs)
        layers = [layer.layer for layer in self.memory_cell.layers]
        if not all(getattr(layer, "gradient_checkpointing", False) for layer in layers):
            self.activation_checkpointing_disable()
            raise ValueError(
                "this transformers runs whole layers again, and would write their memory twice: use "
                "rmtcompile.optimize(model, recompute='level'), or a newer transformers"
            )

    def activation_checkpointing_disable(self) -> None:
        """Undoes it."""
        self._checkpointing("disable")()

    gradient_checkpointing_enable = activation_checkpointing_enable  # the name before transformers 5.20
    gradient_checkpointing_disable = activation_checkpointing_disable

    def _checkpointing(self, what: str) -> Any:
        decoder = self.memory_cell.model
        older = getattr(decoder, f"gradient_checkpointing_{what}", None)
        return getattr(decoder, f"activation_checkpointing_{what}", older)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int | None = None, **options: Any) -> Tensor:
        """Continuations: i64[B, T] -> i64[B * num_return_sequences, up to T + max_new_tokens], T >= 1.

        Greedy, the same tokens as taking the best last token of `forward` again and again. Whole segments are
        read by one call of the model, and every further token reads the keys and values of its segment.
        Rows that have ended are filled up with `pad_token_id`.

        Args:
            options: attention_mask: i64[B, T], 0 for padding.
                do_sample, temperature, top_k, top_p, min_p, typical_p: whether tokens are drawn, of which.
                num_return_sequences: continuations of each text, which share one reading of it.
                repetition_penalty, no_repeat_ngram_size, bad_words_ids, suppress_tokens: what is not wanted.
                max_length: of text and new tokens, in the place of max_new_tokens.
                min_new_tokens, min_length: before which no row ends.
                eos_token_id: a token that ends a row, or several.  pad_token_id: the first of these, or 0.
                generation_config: a `GenerationConfig` of transformers with such fields; options go first.
                logits_processor, stopping_criteria, streamer: as of transformers.
                use_cache: False computes the open segment again for each token, as is done for decoders
                whose cache is not the usual one of transformers.
                cuda_graphs: "auto" has tokens read by a CUDA graph, recorded in each call, where that can be
                and where enough are to come; True, or raise; False, never.

        Raises:
            ValueError: an option that is not done here (beams), that has no effect, or that a class of
                transformers refuses; a text or a mask of another shape, several continuations without
                sampling, a cache of a decoder that has another one, CUDA graphs where there can be none.
            TypeError: there is no such option.
        """
        from .generation import generate

        return generate(self, input_ids, max_new_tokens, **options)

    def save_pretrained(self, folder: str | Path, *, safe_serialization: bool = True) -> None:
        """Writes the model to a folder; see `rmtcompile.models.save`.

        Raises:
            ValueError: it is to be something else than safetensors.
        """
        if not safe_serialization:
            raise ValueError("models are written as safetensors; torch.save pickles a state_dict")
        from .checkpoint import save

        save(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> ARMT:
        """The model that `save_pretrained` wrote; see `rmtcompile.models.load`."""
        from .checkpoint import load

        return load(folder, **options)

    @staticmethod
    def _join(
        outputs: list[ARMTOutput], labels: Tensor | None, items: Tensor | int | None = None
    ) -> ARMTOutput:
        """Concatenates the outputs of the segments, and takes the loss over all of them."""
        joined: dict[str, Any] = {}
        for key in ("logits", "last_hidden_state"):
            if getattr(outputs[0], key) is not None:
                joined[key] = torch.cat([out[key] for out in outputs], dim=1)
        if outputs[0].hidden_states is not None:
            layers = zip(*(out["hidden_states"] for out in outputs))
            joined["hidden_states"] = tuple(torch.cat(pieces, dim=1) for pieces in layers)
        if labels is not None:
            if "logits" not in joined:
                raise ValueError("labels need a model with a language head")
            logits = joined["logits"][:, :-1].flatten(0, 1)
            wide = torch.promote_types(logits.dtype, torch.float32)
            wanted = labels[:, 1:].flatten()
            if items is None:
                joined["loss"] = F.cross_entropy(logits.to(wide), wanted)
            else:
                joined["loss"] = F.cross_entropy(logits.to(wide), wanted, reduction="sum") / items
        return ARMTOutput(**joined)


def build(
    config_or_model: Any,
    *,
    segment_size: int,
    num_mem_tokens: int,
    d_mem: int,
    n_heads: int = 1,
    correction: bool = True,
    layers: str | None = None,
    head: bool = True,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> ARMT:
    """An ARMT from a Hugging Face config (random weights, no download) or from a decoder (changed in place).

    Args:
        config_or_model: a `PretrainedConfig`, or a decoder with or without language head.
        segment_size, num_mem_tokens, d_mem, n_heads, correction, layers: see `ARMTConfig`.
        head: for a config, whether the decoder gets a language head.
        dtype: for a config, the dtype of the parameters; None leaves it to the config.
        attn_implementation: for a config, "sdpa", "eager", ...; None leaves it to the config.

    Raises:
        ValueError: the sizes do not fit, or no list of layers was found.
    """
    config = ARMTConfig(segment_size, num_mem_tokens, d_mem, n_heads, correction, layers)
    if isinstance(config_or_model, nn.Module):
        return ARMT(config_or_model, config)
    auto = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    options = decoder_options(dtype, attn_implementation)
    return ARMT(auto.from_config(copy.deepcopy(config_or_model), **options), config)


def decoder_options(dtype: torch.dtype | None, attn_implementation: str | None) -> dict[str, Any]:
    """Keyword arguments for `from_config`: transformers 4.56 renamed `torch_dtype` to `dtype`."""
    options: dict[str, Any] = {}
    if dtype is not None:
        major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
        options["dtype" if (major, minor) >= (4, 56) else "torch_dtype"] = dtype
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    return options
