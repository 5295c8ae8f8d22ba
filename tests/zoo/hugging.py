"""Wrappers around Hugging Face models that keep a cache from segment to segment.

    sliding window   each layer sees the keys and values of the segment before, its own memory tokens left out
    state space      a Mamba read piece by piece, its convolution and state-space states in its cache object

Hugging Face's cache classes differ between 4.51 and 5.x; what differs is in three functions at the end.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .authors import MemoryCell

KeyValue = tuple[Tensor, Tensor]


class SlidingWindowARMT(nn.Module):
    """ARMT whose layers also attend to the segment before: tokens i64[B, T] -> logits f[B, T, V].

    The keys and values of a segment's tokens are handed to the next one as an ordinary cache; the memory
    tokens are not in it. A token sees itself, what is before it in its segment, and as many tokens of the
    segment before as make a window of one segment; the memory tokens see all of both.
    """

    def __init__(self, cell: MemoryCell, segment_size: int) -> None:
        super().__init__()
        self.memory_cell, self.segment_size = cell, segment_size

    def mask(self, length: int, past: int, like: Tensor) -> Tensor:
        """Additive f[B, 1, length + memory, past + length + memory]."""
        n = length + self.memory_cell.num_mem_tokens
        now = torch.ones(n, n, dtype=torch.bool, device=like.device).tril()
        before = torch.ones(n, past, dtype=torch.bool, device=like.device).triu()
        before[length:] = True
        seen = torch.cat((before, now), -1)
        hidden = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
        hidden = hidden.masked_fill(~seen, torch.finfo(like.dtype).min)
        return hidden.expand(like.shape[0], 1, -1, -1)

    def forward(self, input_ids: Tensor) -> Tensor:
        cell = self.memory_cell
        cell.zero_mem()
        past: list[KeyValue] = []
        logits = []
        for tokens in input_ids.split(self.segment_size, 1):
            embeds = cell.model.get_input_embeddings()(tokens)
            n, seen = tokens.shape[1], past[0][0].shape[2] if past else 0
            out = cell.model(
                inputs_embeds=torch.cat([embeds, cell.memory.expand(len(tokens), -1, -1)], 1),
                attention_mask=self.mask(n, seen, embeds),
                past_key_values=cache_of(past),
                use_cache=True,
            )
            past = [tuple(t[:, :, seen : seen + n] for t in pair) for pair in pairs_of(out.past_key_values)]
            logits.append(out.logits[:, :n])
        return torch.cat(logits, 1)


class Chunked(nn.Module):
    """A state-space model read `step` tokens at a time with its cache: i64[B, T] -> f[B, T, V]."""

    def __init__(self, model: Any, step: int) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, input_ids: Tensor) -> Tensor:
        cache = state_cache(self.model, input_ids)
        logits = []
        for start in range(0, input_ids.shape[1], self.step):
            piece = input_ids[:, start : start + self.step]
            positions = torch.arange(self.step) + 2 * self.step  # anything behind the first tokens
            kwargs = {"cache_position": positions} if takes_positions(self.model) else {}
            logits.append(self.model(piece, cache_params=cache, use_cache=True, **kwargs).logits)
        return torch.cat(logits, 1)


def sliding_window_armt(
    config: Any,
    layers_attr: str,
    segment_size: int = 8,
    num_mem_tokens: int = 2,
    d_mem: int = 4,
    correction: bool = True,
    seed: int = 0,
) -> SlidingWindowARMT:
    """In float64, with random association weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        cell = MemoryCell(model, num_mem_tokens, d_mem, layers_attr, correction)
        for layer in cell.layers:
            nn.init.normal_(layer.W_mv.weight, std=0.5)
        return SlidingWindowARMT(cell, segment_size).double().eval()


def cache_of(past: list[KeyValue]) -> Any:
    """A cache that holds these keys and values, by layer."""
    cache = transformers.DynamicCache()
    for index, (key, value) in enumerate(past):
        cache.update(key, value, index)
    return cache


def pairs_of(cache: Any) -> list[KeyValue]:
    """Keys and values of a cache, by layer."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache))


def state_cache(model: Any, like: Tensor) -> Any:
    """An empty state-space cache of float64: in 4.51 it has a class of its own."""
    old = getattr(transformers, "MambaCache", None) or getattr(
        inspect.getmodule(type(model)), "MambaCache", None
    )
    if takes_positions(model):
        return old(model.config, like.shape[0], device=like.device, dtype=torch.float64)
    return transformers.DynamicCache(config=model.config)


def takes_positions(model: Any) -> bool:
    """Whether the forward asks for `cache_position`, as it does in 4.51."""
    return "cache_position" in inspect.signature(model.forward).parameters
