"""Shapes of models, and the least work that one cell, one input and one wavefront are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rmtcompile.models import ARMT, build
from rmtcompile.models.associative import NU


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    theta: float = 5e5

    def config(self) -> Any:
        """Its Hugging Face config."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.ffn,
            vocab_size=self.vocab,
            rope_theta=self.theta,
            rms_norm_eps=1e-5,
            max_position_embeddings=1 << 20,
            tie_word_embeddings=True,
        )


SHAPES = {
    "tiny": Shape(hidden=64, layers=4, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=256),
    "160m": Shape(
        hidden=768, layers=12, heads=12, kv_heads=12, head_dim=64, ffn=3072, vocab=32000, theta=1e4
    ),
    "1b": Shape(hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192, vocab=128256),
    "3b": Shape(hidden=3072, layers=28, heads=24, kv_heads=8, head_dim=128, ffn=8192, vocab=128256),
    "8b": Shape(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256),
}
"""160m: Llama-160M; 1b, 3b: Llama-3.2; 8b: Llama-3.1; tiny: for tests on a CPU."""


@dataclass(frozen=True)
class Case:
    """One model: a shape with its memory, batch, dtype and head."""

    shape: Shape
    segment: int
    memory: int
    d_mem: int
    batch: int
    dtype: torch.dtype
    head: bool = False
    seed: int = 0

    def build(self, device: torch.device) -> ARMT:
        """The reference ARMT with random weights, `W_mv` too: zeros would make the memory say nothing."""
        torch.manual_seed(self.seed)
        with torch.device(device):
            model = build(
                self.shape.config(),
                segment_size=self.segment,
                num_mem_tokens=self.memory,
                d_mem=self.d_mem,
                head=self.head,
                dtype=self.dtype,
                attn_implementation="sdpa",
            )
            for layer in model.memory_cell.layers:
                nn.init.normal_(layer.W_mv.weight, std=0.02)
        return model.eval().requires_grad_(False)

    def ids(self, tokens: int, device: torch.device) -> torch.Tensor:
        """Random tokens, i64[B, tokens]."""
        return torch.randint(0, self.shape.vocab, (self.batch, tokens), device=device)

    # ---- the least work ----

    def linear_flops(self, rows: int) -> float:
        """The decoder layer's matrix products on `rows` tokens."""
        s = self.shape
        attention = s.hidden * (2 * s.heads + 2 * s.kv_heads) * s.head_dim
        return 2.0 * rows * (attention + 3 * s.hidden * s.ffn)

    def attention_flops(self, rows: int) -> float:
        """Causal attention over `rows` tokens: half of the square, twice (scores, values)."""
        return 2.0 * rows * rows * self.shape.heads * self.shape.head_dim

    def memory_flops(self, first: bool) -> float:
        """Reading and writing the association for one input; the first segment reads nothing."""
        d, features, rows = self.shape.hidden, 2 * NU * self.d_mem, self.segment + self.memory
        write = self.memory * (self.d_mem * d + d * d + d + features * d)
        read = 0 if first else rows * (d * self.d_mem + features * d) + self.memory * features * d
        return 2.0 * (read + write)

    def cell_flops(self, first: bool = False) -> float:
        """One cell of one input: a layer on a segment."""
        rows = self.segment + self.memory
        return self.linear_flops(rows) + self.attention_flops(rows) + self.memory_flops(first)

    def armt_flops(self, tokens: int) -> float:
        """The whole recurrence over `tokens` tokens, batch and head included."""
        segments = tokens // self.segment
        cells = self.cell_flops(first=True) + (segments - 1) * self.cell_flops()
        return self.batch * (self.shape.layers * cells + self._head_flops(tokens))

    def full_flops(self, tokens: int) -> float:
        """The decoder without memory, with full attention over `tokens` tokens."""
        layer = self.linear_flops(tokens) + self.attention_flops(tokens)
        return self.batch * (self.shape.layers * layer + self._head_flops(tokens))

    def _head_flops(self, tokens: int) -> float:
        return 2.0 * tokens * self.shape.hidden * self.shape.vocab if self.head else 0.0

    def layer_parameters(self) -> int:
        """Numbers in one layer's weights, association included."""
        s = self.shape
        decoder = s.hidden * (2 * s.heads + 2 * s.kv_heads) * s.head_dim + 3 * s.hidden * s.ffn + 2 * s.hidden
        return decoder + 2 * self.d_mem * s.hidden + s.hidden * s.hidden + s.hidden + 1

    def cell_bytes(self) -> float:
        """The fewest bytes that one cell of one input moves: weights, association and hidden states, once."""
        features = 2 * NU * self.d_mem
        state = 2 * (features * self.shape.hidden + features)
        hidden = 2 * (self.segment + self.memory) * self.shape.hidden
        return self.dtype.itemsize * float(self.layer_parameters() + self.batch * (state + hidden))


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters, shared ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
