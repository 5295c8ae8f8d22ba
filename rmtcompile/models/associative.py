"""The associative memory of one decoder layer: the feature map, the delta rule, the wrapper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NU = 3
"""Shifts of the DPFP feature map."""

EPSILON = 1e-5
"""Added to each denominator z @ phi."""


@dataclass
class ARMTConfig:
    """What makes a decoder an ARMT.

    Attributes:
        segment_size: tokens in a segment, memory tokens not counted.
        num_mem_tokens: memory tokens after the tokens of each segment.
        d_mem: size of memory keys and queries, before the feature map makes it 2 * NU times as large.
        n_heads: heads of the association, each with a matrix of its own.
        correction: whether gamma keeps the normaliser from counting again what the memory knows.
        layers: path of the decoder's `nn.ModuleList` of layers, e.g. "model.layers"; None for the longest
            one.
        use_cache: always off; training loops of Hugging Face switch it off.

    Raises:
        ValueError: a size is below one, or `n_heads` does not divide `d_mem`.
        AttributeError: one of these is set to another value, which the model would not follow.
    """

    segment_size: int
    num_mem_tokens: int
    d_mem: int
    n_heads: int = 1
    correction: bool = True
    layers: str | None = None
    use_cache = False  # no field: it is not saved

    def __setattr__(self, name: str, value: Any) -> None:
        fixed = vars(self) if name in self.__dataclass_fields__ else {"use_cache": False}
        if name not in fixed:
            super().__setattr__(name, value)
        elif value != fixed[name]:
            raise AttributeError(f"{name} is {fixed[name]!r} for as long as the model is there")

    def __post_init__(self) -> None:
        for name in ("segment_size", "num_mem_tokens", "d_mem", "n_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} has to be at least 1, not {getattr(self, name)}")
        if self.d_mem % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} does not divide d_mem={self.d_mem}")


def dpfp(x: Tensor, nu: int = NU) -> Tensor:
    """The deterministic parameter-free projection: f[..., d] -> f[..., 2 * nu * d] (arXiv 2102.11174, DPFP).

    With r = [relu(x), relu(-x)], the result is the concatenation over j = 1..nu of r * roll(r, j).
    """
    r = torch.cat([F.relu(x), F.relu(-x)], dim=-1)
    return torch.cat([r * r.roll(j, dims=-1) for j in range(1, nu + 1)], dim=-1)


class AssociativeLayer(nn.Module):
    """A decoder layer with an associative memory (arXiv 2407.04841, the associative memory block).

    With H heads, features phi(x) = dpfp(x) / |dpfp(x)|, keys k = phi(W_mk m), values v = W_mv m and strengths
    b = sigmoid(W_mb m) of the memory tokens m that the layer gave, and queries q = phi(W_mq x) of all
    that enters it:

        read     x  <- x + (q A) / (q z)
        write    v' =  (k A) / (k z)                              what A knows of k
                 A  <- A + sum over memory tokens of  k^T b (v - v')
                 z  <- z + sum over memory tokens of  gamma k
                 gamma = clip(1 - (k z) / |k|^2, 0, 1)            without gradient; 1 without correction

    EPSILON is added to k z and q z.  The first segment reads nothing, and writes with v' = 0 and gamma = 1.

    Attributes:
        association: A, f[B, H, 2 * NU * d_mem / H, D / H]; None before the first write.
        normaliser: z, f[B, H, 2 * NU * d_mem / H]; None before the first write.
        writes: whether the memory tokens at the end of the input are written; False reads only.
    """

    def __init__(self, layer: nn.Module, d_model: int, config: ARMTConfig) -> None:
        """Wraps `layer`; new parameters take the dtype and device of its first parameter.

        Raises:
            ValueError: `config.n_heads` does not divide `d_model`.
        """
        super().__init__()
        if d_model % config.n_heads:
            raise ValueError(f"n_heads={config.n_heads} does not divide the model's width {d_model}")
        self.num_mem_tokens, self.n_heads, self.correction = (
            config.num_mem_tokens,
            config.n_heads,
            config.correction,
        )
        like = next(layer.parameters())
        place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.W_mq = nn.Linear(d_model, config.d_mem, bias=False, **place)
        self.W_mk = nn.Linear(d_model, config.d_mem, bias=False, **place)
        self.W_mv = nn.Linear(d_model, d_model, bias=False, **place)
        self.W_mb = nn.Linear(d_model, config.n_heads, **place)
        nn.init.zeros_(self.W_mv.weight)  # an ARMT starts as its decoder
        self.layer = layer
        self.association: Tensor | None = None
        self.normaliser: Tensor | None = None
        self.writes = True

    def __getattr__(self, name: str) -> Any:
        """What is not here is the layer's: decoders ask their layers for things like `attention_type`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles get: the memory's values, without their history of gradients."""
        state = dict(vars(self))
        for name in ("association", "normaliser"):
            state[name] = None if state[name] is None else state[name].detach()
        return state

    def reset(self) -> None:
        """Forgets everything: the next segment is the first."""
        self.association = self.normaliser = None

    def repeat(self, n: int) -> None:
        """Each memory of the batch n times, one after the other; of a single one there are views."""
        if self.association is None or self.normaliser is None:
            return
        memories = self.association, self.normaliser
        self.association, self.normaliser = (
            m.expand(n, *m.shape[1:]) if len(m) == 1 else m.repeat_interleave(n, 0) for m in memories
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Reads, runs the layer, writes: f[B, T + M, D] -> whatever the layer gives."""
        hidden_states = self.read(hidden_states)
        out = self.layer(hidden_states, *args, **kwargs)
        if self.writes:
            states = out[0] if isinstance(out, tuple) else out
            self.write(states[:, -self.num_mem_tokens :])
        return out

    def read(self, x: Tensor) -> Tensor:
        """x: f[B, N, D] plus what the memory knows about it: f[B, N, D]."""
        if self.association is None or self.normaliser is None:
            return x
        q = self._features(self.W_mq(x))
        return x + self._recall(q, self.association, self.normaliser)[0].transpose(1, 2).flatten(2)

    def write(self, m: Tensor) -> None:
        """Writes the memory tokens m: f[B, M, D] with the delta rule."""
        k = self._features(self.W_mk(m))
        v = self._heads(self.W_mv(m))
        b = self._heads(torch.sigmoid(self.W_mb(m)))
        if self.association is None or self.normaliser is None:
            self.association = k.mT @ (b * v)
            self.normaliser = k.sum(-2)
            return
        known, weight = self._recall(k, self.association, self.normaliser)
        gamma = torch.ones_like(weight)
        if self.correction:
            gamma = (1 - weight / k.square().sum(-1, keepdim=True)).clamp(0, 1).detach()
        self.association = self.association + k.mT @ (b * (v - known))
        self.normaliser = self.normaliser + (gamma * k).sum(-2)

    def _heads(self, x: Tensor) -> Tensor:
        """f[B, N, H * d] -> f[B, H, N, d]."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def _features(self, x: Tensor) -> Tensor:
        """f[B, N, d_mem] -> unit features f[B, H, N, 2 * NU * d_mem / H]."""
        return F.normalize(dpfp(self._heads(x)), dim=-1)

    @staticmethod
    def _recall(features: Tensor, association: Tensor, normaliser: Tensor) -> tuple[Tensor, Tensor]:
        """What A holds for the features, f[B, H, N, D / H], and their weights features @ z, f[B, H, N, 1]."""
        weight = features @ normaliser.unsqueeze(-1) + EPSILON
        return (features @ association) / weight, weight
