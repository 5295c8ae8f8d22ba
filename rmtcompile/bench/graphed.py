"""The honest opponent: the sequential ARMT put together by hand, compiled, one CUDA graph a segment.

It shares no machinery with the compiler.  It is the reference ARMT around a decoder of the Llama family,
written as a function of weights and state:

```
graph of segment s   ids -> embed -> cell(W_0, A_0) -> ... -> cell(W_L-1, A_L-1) -> norm (-> head) -> out
                                        in place A_0             in place A_L-1
```

`cell` is compiled once per variant (first segment, later segments) with static shapes; attention uses the
faster of cuDNN and flash at this shape; query, key and value projections are one product.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rmtcompile.bench.measure import event_seconds
from rmtcompile.models import ARMT
from rmtcompile.models.associative import EPSILON, NU, dpfp


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x: f[..., D], in float32 inside."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, x: f[B, H, N, d]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def features(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Unit features of memory keys and queries: f[B, N, D] -> f[B, H, N, 6 d_mem / H]."""
    return F.normalize(dpfp(_heads(F.linear(x, weight), heads)), dim=-1)


def recall(phi: Tensor, association: Tensor, normaliser: Tensor) -> tuple[Tensor, Tensor]:
    """What the association holds for the features, and their weights."""
    weight = phi @ normaliser.unsqueeze(-1) + EPSILON
    return (phi @ association) / weight, weight


def cell(
    x: Tensor,
    w: dict[str, Tensor],
    association: Tensor,
    normaliser: Tensor,
    cos: Tensor,
    sin: Tensor,
    sizes: tuple[int, int, int, int, int],
    epsilon: float,
    first: bool,
    correction: bool,
) -> Tensor:
    """One layer on one segment: f[B, N, D] -> f[B, N, D]; association and normaliser change in place."""
    heads, kv_heads, head_dim, n_mem, mem_heads = sizes
    if not first:
        phi = features(x, w["mq"], mem_heads)
        x = x + recall(phi, association, normaliser)[0].transpose(1, 2).flatten(2)
    qkv = F.linear(rms_norm(x, w["norm1"], epsilon), w["qkv"]).unflatten(-1, (-1, head_dim)).transpose(1, 2)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    attended = F.scaled_dot_product_attention(
        rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=heads != kv_heads
    )
    x = x + F.linear(attended.transpose(1, 2).flatten(2), w["o"])
    normed = rms_norm(x, w["norm2"], epsilon)
    x = x + F.linear(F.silu(F.linear(normed, w["gate"])) * F.linear(normed, w["up"]), w["down"])
    m = x[:, -n_mem:]
    k = features(m, w["mk"], mem_heads)
    v = _heads(F.linear(m, w["mv"]), mem_heads)
    b = _heads(torch.sigmoid(F.linear(m, w["mb"], w["mb_bias"])), mem_heads)
    if first:
        association.copy_(k.mT @ (b * v))
        normaliser.copy_(k.sum(-2))
        return x
    known, weight = recall(k, association, normaliser)
    gamma = torch.ones_like(weight)
    if correction:
        gamma = (1 - weight / k.square().sum(-1, keepdim=True)).clamp(0, 1)
    association.add_(k.mT @ (b * (v - known)))
    normaliser.add_((gamma * k).sum(-2))
    return x


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SequentialGraphed:
    """Sequential, compiled, in CUDA graphs; on a CPU the same functions, neither compiled nor graphed.

    Args:
        backend: a `torch.compile` backend, None for none; "auto" is inductor on CUDA and None on a CPU.

    Weights are the model's own, except that query, key and value projections which do not lie side by side
    in memory are copied side by side.

    Attributes:
        attention: the chosen attention back end, "" on a CPU.
    """

    def __init__(self, model: ARMT, batch: int, backend: Any = "auto") -> None:
        self.model = model
        self.batch = batch
        self.attention = ""
        self._pointers: list[int] = []
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        decoder = model.memory_cell.model
        self._inner = decoder.get_submodule("model") if hasattr(decoder, "lm_head") else decoder
        self._head = decoder.lm_head.weight if hasattr(decoder, "lm_head") else None
        config = decoder.config
        self._epsilon = config.rms_norm_eps
        self._sizes = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            model.config.num_mem_tokens,
            model.config.n_heads,
        )
        self._cuda = model.memory_cell.memory.is_cuda
        if backend == "auto":
            backend = "inductor" if self._cuda else None

        def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            if backend is None:
                return function
            return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)

        self._cell, self._norm = compiled(cell), compiled(rms_norm)
        self._allocate(config.hidden_size, config.num_hidden_layers)

    def _allocate(self, width: int, layers: int) -> None:
        """Static buffers: tokens, state, output."""
        like, c = self.model.memory_cell.memory, self.model.config
        key, value = 2 * NU * c.d_mem // c.n_heads, width // c.n_heads
        rows = self._head.shape[0] if self._head is not None else width
        self.ids = torch.zeros(self.batch, c.segment_size, dtype=torch.long, device=like.device)
        self.out = like.new_zeros(self.batch, c.segment_size, rows)
        self.association = like.new_zeros(layers, self.batch, c.n_heads, key, value)
        self.normaliser = like.new_zeros(layers, self.batch, c.n_heads, key)
        positions = torch.arange(c.segment_size + c.num_mem_tokens, device=like.device)[None]
        cos, sin = self._inner.rotary_emb(like, position_ids=positions)
        self._cos, self._sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def prepare(self) -> None:
        """Compile and capture, again where parameters have moved since."""
        pointers = [p.data_ptr() for p in self.model.parameters()]
        if pointers == self._pointers:
            return
        self._pointers, self._graphs = pointers, {}
        self._weights = [_weights(layer) for layer in self.model.memory_cell.layers]
        if not self._cuda:
            return
        with self._backend():
            pool = None
            for first in (True, False):
                graph = _capture(lambda first=first: self._segment(first), pool)  # type: ignore[misc]
                self._graphs[first] = graph
                pool = graph.pool()

    def __call__(self, ids: Tensor) -> Tensor:
        """i64[B, T] -> f[B, T, D], or f[B, T, V] with a head; T is a multiple of the segment."""
        size = self.model.config.segment_size
        out = self.out.new_empty(ids.shape[0], ids.shape[1], self.out.shape[-1])
        for start in range(0, ids.shape[1], size):
            self.ids.copy_(ids[:, start : start + size])
            if self._cuda:
                self._graphs[start == 0].replay()
            else:
                self._segment(start == 0)
            out[:, start : start + size].copy_(self.out)
        return out

    def _segment(self, first: bool) -> None:
        """One segment from `ids` to `out`, state updated in place."""
        memory = self.model.memory_cell.memory.expand(self.batch, -1, -1)
        embedded = F.embedding(self.ids, self._inner.embed_tokens.weight)
        x = torch.cat([embedded, memory], dim=1)
        fixed = (self._cos, self._sin, self._sizes, self._epsilon, first, self.model.config.correction)
        for w, association, normaliser in zip(self._weights, self.association, self.normaliser, strict=True):
            x = self._cell(x, w, association, normaliser, *fixed)
        x = self._norm(x[:, : self.ids.shape[1]], self._inner.norm.weight, self._epsilon)
        self.out.copy_(x if self._head is None else F.linear(x, self._head))

    @contextlib.contextmanager
    def _backend(self) -> Iterator[None]:
        """The faster attention at this shape, measured."""
        heads, kv_heads, head_dim, n_mem, _ = self._sizes
        rows, like = self.model.config.segment_size + n_mem, self.model.memory_cell.memory

        def states(n: int) -> Tensor:
            return torch.randn_like(like.new_empty(self.batch, rows, n, head_dim)).transpose(1, 2)

        q, k, gqa = states(heads), states(kv_heads), heads != kv_heads
        found: dict[str, float] = {}
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with contextlib.suppress(RuntimeError), sdpa_kernel(backend):

                def attend() -> None:
                    F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=gqa)

                graph = _capture(attend, None)  # launched eagerly, the host's part would decide
                found[backend.name] = statistics.median(event_seconds(graph.replay, 20))
        if not found:
            yield
            return
        self.attention = min(found, key=lambda name: found[name])
        with sdpa_kernel(getattr(SDPBackend, self.attention)):
            yield


def _weights(layer: Any) -> dict[str, Tensor]:
    """The weights of one associative layer around a Llama layer."""
    inner = layer.layer
    attention, mlp = inner.self_attn, inner.mlp
    return {
        "norm1": inner.input_layernorm.weight,
        "qkv": joined([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]),
        "o": attention.o_proj.weight,
        "norm2": inner.post_attention_layernorm.weight,
        "gate": mlp.gate_proj.weight,
        "up": mlp.up_proj.weight,
        "down": mlp.down_proj.weight,
        "mq": layer.W_mq.weight,
        "mk": layer.W_mk.weight,
        "mv": layer.W_mv.weight,
        "mb": layer.W_mb.weight,
        "mb_bias": layer.W_mb.bias,
    }


def joined(parts: list[Tensor]) -> Tensor:
    """Row blocks as one matrix: a view where they lie side by side in memory, a copy otherwise."""
    first = parts[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    beside = True
    for part in parts:
        same = part.untyped_storage().data_ptr() == storage and part.is_contiguous()
        beside = beside and same and part.data_ptr() == end
        end += part.numel() * part.element_size()
    if not beside:
        return torch.cat(parts)
    rows = sum(part.shape[0] for part in parts)
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())


def _capture(function: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `function`, which is run twice before on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        function()
    return graph
