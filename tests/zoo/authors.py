"""An ARMT written the way people write one: state in plain attributes, flags and counters in Python.

This is the kind of model that capture meets in the wild, on purpose written apart from
`rmtcompile.models.armt` (which is the readable reference).  It keeps the habits that make such code hard
to compile:

- the memory lives in plain tensor attributes (`W_mem`, `z`), neither buffers nor parameters, replaced in
  `forward`;
- they start as zeros with a batch axis of 1, so their shape changes on the first write;
- `first_seg` is a Python flag, `seg_num` a Python counter;
- `zero_mem()` runs at the start of every forward;
- segments are cut with Python slicing, hidden states are requested and thrown away;
- the output holds per-segment entries (`logits_0`, ...) and a loss that is the integer 0 when there are
  no labels.

Follows the behaviour of the open implementation of arXiv 2407.04841 (equations 3 to 8).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions


class Phi:
    """DPFP-nu as a callable object: f[..., d] -> f[..., 2 * nu * d]."""

    def __init__(self, nu: int) -> None:
        self.nu = nu

    def __call__(self, x: Tensor) -> Tensor:
        both = torch.cat((F.relu(x), F.relu(-x)), -1)
        shifted = [both.roll(j + 1, -1) for j in range(self.nu)]
        return torch.cat(shifted, -1) * torch.cat([both] * self.nu, -1)


class AssociativeLayer(nn.Module):
    """A decoder layer with an association matrix per head, kept in attributes."""

    def __init__(
        self,
        layer: nn.Module,
        d_model: int,
        num_mem_tokens: int,
        d_mem: int,
        n_heads: int = 1,
        correction: bool = True,
        info: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.info = info
        self.num_mem_tokens, self.n_heads, self.correction = num_mem_tokens, n_heads, correction
        self.d_key = 6 * d_mem
        self.d_model = d_model
        self.phi = Phi(3)
        self.W_mq = nn.Linear(d_model, d_mem, bias=False)
        self.W_mk = nn.Linear(d_model, d_mem, bias=False)
        self.W_mv = nn.Linear(d_model, d_model, bias=False)
        self.W_mb = nn.Linear(d_model, n_heads)
        nn.init.zeros_(self.W_mv.weight)
        self.zero_mem()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)  # Gemma-2 asks its layers for `attention_type`

    def zero_mem(self) -> None:
        like = self.W_mq.weight
        self.first_seg = True
        self.W_mem = torch.zeros(
            1, self.n_heads, self.d_key // self.n_heads, self.d_model // self.n_heads
        ).to(like)
        self.z = torch.zeros(1, self.n_heads, self.d_key // self.n_heads).to(like)
        self.seg_num = 0

    def split(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        return x.reshape(b, n, self.n_heads, d // self.n_heads).permute(0, 2, 1, 3)

    def join(self, x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        return x.permute(0, 2, 1, 3).reshape(b, n, h * d)

    def associate(self, hidden_states: Tensor) -> Tensor:
        self.W_mem = self.W_mem.to(hidden_states.device)
        self.z = self.z.to(hidden_states.device)
        mq = F.normalize(self.phi(self.split(self.W_mq(hidden_states))), dim=-1, p=2.0)
        num = torch.einsum("bhqk,bhkv->bhqv", mq, self.W_mem)
        denom = torch.einsum("bhk,bhqk->bhq", self.z, mq)[..., None] + 1e-5
        return self.join(num / denom)

    def update_mem(self, mem_tokens: Tensor) -> None:
        self.W_mem = self.W_mem.to(mem_tokens.device)
        self.z = self.z.to(mem_tokens.device)
        mk = F.normalize(self.phi(self.split(self.W_mk(mem_tokens))), dim=-1, p=2.0)
        new_mv = self.split(self.W_mv(mem_tokens))
        gamma: Tensor | int = 1
        if self.first_seg:
            prev_mv = torch.zeros_like(new_mv, device=new_mv.device)
        else:
            num = torch.einsum("bhmk,bhkv->bhmv", mk, self.W_mem)
            denom = torch.einsum("bhk,bhmk->bhm", self.z, mk)[..., None] + 1e-5
            prev_mv = num / denom
            if self.correction:
                gamma = 1 - denom / (torch.linalg.norm(mk, dim=-1) ** 2)[..., None]
                gamma = torch.clip(gamma, 0, 1).detach()
        mb = self.split(torch.sigmoid(self.W_mb(mem_tokens)))
        self.W_mem = self.W_mem + torch.einsum("bhmk,bhmv,bhmx->bhkv", mk, new_mv - prev_mv, mb)
        self.z = self.z + (gamma * mk).sum(dim=-2)
        self.seg_num += 1

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.first_seg:
            hidden_states = self.associate(hidden_states) + hidden_states
        out = self.layer(hidden_states, *args, **kwargs)
        states = out[0] if isinstance(out, tuple) else out
        self.update_mem(states[:, -self.num_mem_tokens :])
        self.first_seg = False
        return out


class MemoryCell(nn.Module):
    """One segment: embeddings, memory tokens after them, the wrapped model."""

    def __init__(
        self,
        base_model: Any,
        num_mem_tokens: int,
        d_mem: int,
        layers_attr: str = "model.layers",
        correction: bool = True,
        n_heads: int = 1,
        ask_hidden_states: bool = True,
    ) -> None:
        super().__init__()
        self.model = base_model
        self.num_mem_tokens = num_mem_tokens
        self.ask_hidden_states = ask_hidden_states
        embeddings = base_model.get_input_embeddings()
        self.layers = base_model.get_submodule(layers_attr)  # registered twice, as in the open implementation
        for i in range(len(self.layers)):
            self.layers[i] = AssociativeLayer(
                self.layers[i],
                embeddings.embedding_dim,
                num_mem_tokens,
                d_mem,
                n_heads,
                correction,
                info={"layer": i},
            )
        std = embeddings.weight.data.std()
        self.memory = nn.Parameter(torch.randn(num_mem_tokens, embeddings.embedding_dim) * std)

    def zero_mem(self) -> None:
        for layer in self.layers:
            layer.zero_mem()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        embeds = self.model.get_input_embeddings()(input_ids)
        kwargs["inputs_embeds"] = torch.cat([embeds, self.memory.repeat(input_ids.shape[0], 1, 1)], dim=1)
        if attention_mask is not None:
            shape = list(attention_mask.shape)
            shape[-1] += self.num_mem_tokens
            mask = torch.ones(*shape, dtype=torch.int64).to(attention_mask.device)
            mask[..., : -self.num_mem_tokens] = attention_mask
            kwargs["attention_mask"] = mask
        if self.ask_hidden_states:
            kwargs["output_hidden_states"] = True
        model_out = self.model(input_ids=None, use_cache=False, **kwargs)
        out = CausalLMOutputWithCrossAttentions()
        out["logits"] = model_out.logits[:, : -self.num_mem_tokens]
        return out


class RecurrentWrapper(nn.Module):
    """The segment loop: tokens i64[B, T] -> logits f[B, T, V], and an entry for each segment."""

    def __init__(self, memory_cell: MemoryCell, **rmt_kwargs: Any) -> None:
        super().__init__()
        self.memory_cell = memory_cell
        self.rmt_config = rmt_kwargs

    def segment(self, **tensors: Tensor | None) -> list[dict[str, Tensor]]:
        segments: list[dict[str, Tensor]] = []
        size = self.rmt_config["segment_size"]
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            cuts = [*range(0, tensor.shape[1], size), tensor.shape[1]]
            for s, (start, end) in enumerate(pairwise(cuts)):
                if s == len(segments):
                    segments.append({})
                segments[s][name] = tensor[:, start:end]
        return segments

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Any:
        self.memory_cell.zero_mem()
        cell_outputs = []
        for _seg_num, segment in enumerate(self.segment(input_ids=input_ids, attention_mask=attention_mask)):
            cell_outputs.append(self.memory_cell(**segment))
        out = CausalLMOutputWithCrossAttentions()
        full = torch.cat([o.logits for o in cell_outputs], dim=1)
        out["loss"] = 0
        if labels is not None:
            flat = full[:, :-1].reshape(-1, full.size(-1))
            out["loss"] = F.cross_entropy(flat, labels[:, 1:].reshape(-1))
        out["logits"] = full
        for seg_num, o in enumerate(cell_outputs):
            for key, value in o.items():
                out[f"{key}_{seg_num}"] = value
        return out


def authors_armt(
    n_layers: int = 4,
    segment_size: int = 8,
    num_mem_tokens: int = 2,
    d_mem: int = 4,
    n_heads: int = 1,
    correction: bool = True,
    ask_hidden_states: bool = True,
    dtype: torch.dtype = torch.float64,
    attn_implementation: str = "sdpa",
    seed: int = 0,
) -> RecurrentWrapper:
    """A small random Llama (width 16, 4 query and 2 key/value heads, 32 tokens) in the authors' wrapper.

    `W_mv` starts at zero there, which would hide every memory error: here all association weights are random.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=n_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            attn_implementation=attn_implementation,
        )
        cell = MemoryCell(
            transformers.LlamaForCausalLM(config),
            num_mem_tokens,
            d_mem,
            correction=correction,
            n_heads=n_heads,
            ask_hidden_states=ask_hidden_states,
        )
        for layer in cell.layers:
            nn.init.normal_(layer.W_mv.weight, std=0.5)
        return RecurrentWrapper(cell, segment_size=segment_size).to(dtype).eval()


def example_input(batch: int, segments: int, segment_size: int = 8, seed: int = 0) -> tuple[Tensor]:
    """Tokens i64[batch, segments * segment_size]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 32, (batch, segments * segment_size), generator=generator),)
