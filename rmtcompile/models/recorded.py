"""Recorded: reading one token of an open segment as a CUDA graph.

    token          i64[B, 1]  ->  logits f[B, V]
    keys, values   [ .  .  .  x              ]    of a segment's full size from the beginning, filled up to a
                                                  counter on the device
    A, z           of each layer                  copied to a place of their own whenever a segment begins

Launching the operations of one token takes the host longer than computing them takes the GPU.  A graph is
recorded by each call of `generate`, and not kept: nothing that happens to the model between two calls can be
missed.  Its first two tokens are computed without it, too, and have to be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from transformers import cache_utils

if TYPE_CHECKING:
    from .armt import MemoryCell

WORTH = 16
"""Tokens still to come from which on recording takes less time than it saves: it costs about four."""

COMPARED = 2
"""Tokens of each graph that are computed without it as well: two, as a position could be written into it."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""How far logits with room for a whole segment may be from those without, relative to the largest: kernels of
attention differ. 0.1 for other dtypes."""

Step = Callable[[], Tensor]


class NotRecordedError(RuntimeError):
    """Why the tokens of a model cannot be read by a CUDA graph."""


def hindrance(cell: MemoryCell) -> str | None:
    """Why its tokens cannot be recorded, as far as that shows before; None where they can."""
    devices = {tensor.device for tensor in (*cell.parameters(), *cell.buffers())}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        return f"CUDA graphs need one CUDA device, and the model is on {', '.join(map(str, devices))}"
    if torch.is_autocast_enabled("cuda"):
        return "autocast keeps casted weights, which a CUDA graph would hold"
    if not counts_on_device():
        return "this transformers counts the tokens of a static cache on the host"
    hooked = [name or "the cell" for name, module in cell.named_modules() if _has_hooks(module)]
    everywhere = global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks
    if hooked or everywhere:
        return f"a CUDA graph calls no hooks, and there are some of {', '.join(hooked[:3]) or 'all modules'}"
    return None


def counts_on_device() -> bool:
    """Whether a static cache of this transformers counts its tokens on the device."""
    return isinstance(getattr(_static_layer(1), "cumulative_length", None), Tensor)


def recorded(body: Step) -> Step:
    """A function as a CUDA graph: each call computes the same from what is in memory then."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = body()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class FixedSegment:
    """An open segment whose tensors stay where they are, so that reading a token of it can be recorded.

    Args:
        cache: keys and values of its tokens so far.
        mask: a mask of tokens like those that are given with them, or None.

    Attributes:
        cache: with room for a whole segment.

    Raises:
        NotRecordedError: the decoder's cache holds other things than keys and values.
    """

    def __init__(self, cell: MemoryCell, cache: Any, mask: Tensor | None) -> None:
        if any(type(layer) is not cache_utils.DynamicLayer for layer in cache.layers):
            raise NotRecordedError("the decoder keeps more than keys and values of all tokens")
        self._cell = cell
        room = cell.config.segment_size + cell.config.num_mem_tokens
        self.cache = cache_utils.Cache(layers=[_static_layer(room) for _ in cache.layers])
        for i, layer in enumerate(cache.layers):
            self.cache.update(layer.keys, layer.values, i)
        rows, device = cache.layers[0].keys.shape[0], cache.layers[0].keys.device
        self._token = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._mask = None if mask is None else torch.ones(rows, room, dtype=mask.dtype, device=device)
        self._filled = int(cache.layers[0].keys.shape[2])
        self._graph: Step | None = None
        self._memories: list[Tensor] | None = None
        self._compared = 0

    def agree(self, ids: Tensor, mask: Tensor | None, expected: Tensor) -> None:
        """Read a token whose logits f[B, V] are known, with nothing recorded; else as `read`.

        Raises:
            NotRecordedError: these are others.
        """
        self._take(ids, mask)
        difference = _difference(self._launched(), expected)
        self._filled += 1
        if difference > TOLERANCE.get(expected.dtype, 0.1):
            raise NotRecordedError(
                f"logits with room for a whole segment differ from those without by {difference:.1e}"
            )

    def read(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Read the next token of each text.

        Args:
            ids: i64[B, 1].
            mask: i64[B, tokens of the segment with this one], 0 for padding, or None.

        Returns:
            f[B, V], the logits of what follows.

        Raises:
            NotRecordedError: recording failed, or the graph computes something else; the token is not read,
                and no other one is to be read in this way.
        """
        self._take(ids, mask)
        expected = None
        if self._graph is None or self._compared < COMPARED:  # CUDA wants it launched before, too
            expected = self._launched().clone()
            self._forget()
        if self._graph is None:
            self._settle()
            try:
                self._graph = recorded(self._launched)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                raise NotRecordedError(f"recording failed: {error}".splitlines()[0]) from error
            self._compared = 0
        logits = self._graph().clone()
        if expected is not None:
            difference = _difference(logits, expected)
            if difference > 0.01 * TOLERANCE.get(expected.dtype, 0.1):
                self._forget()
                self._graph = None
                raise NotRecordedError(f"logits of a graph differ from launched ones by {difference:.1e}")
            self._compared += 1
        self._filled += 1
        return logits

    def begin(self) -> None:
        """The segment was written to memory, and the next one begins."""
        self.cache.reset()
        self._filled = 0
        if self._mask is not None:
            self._mask.fill_(1)
        if self._graph is not None:
            self._settle()

    def release(self) -> None:
        """Leave the model memories of its own."""
        for layer in self._cell.layers:
            for name in ("association", "normaliser"):
                memory = getattr(layer, name)
                if memory is not None:
                    setattr(layer, name, _own(memory).clone().expand_as(memory))

    def _take(self, ids: Tensor, mask: Tensor | None) -> None:
        self._token.copy_(ids)
        if self._mask is not None and mask is not None:
            self._mask[:, : mask.shape[1]] = mask

    def _launched(self) -> Tensor:
        embeds = self._cell.model.get_input_embeddings()(self._token)
        return self._cell.decode(embeds, self.cache, self._mask)[:, -1]

    def _forget(self) -> None:
        """Forget the token of this call."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self._filled)

    def _settle(self) -> None:
        """Have the layers read their memories where the graph does; where these are others, it is recorded
        again: there are none yet in the first segment, and continuations of one text share one."""
        layers = [layer for layer in self._cell.layers if layer.association is not None]
        now = [memory for layer in layers for memory in (layer.association, layer.normaliser)]
        known = self._memories
        if known is None or [_form(m) for m in known] != [_form(m) for m in now]:
            self._memories = known = [_copied(m) for m in now]
            self._graph = None
        for place, memory in zip(known, now):
            _own(place).copy_(_own(memory))
        for layer, association, normaliser in zip(layers, known[::2], known[1::2]):
            layer.association, layer.normaliser = association, normaliser


def _static_layer(room: int) -> Any:
    """Room for keys and values of so many tokens; None where this transformers has no such thing (4.51)."""
    kind = getattr(cache_utils, "StaticLayer", None)
    return None if kind is None else kind(max_cache_len=room)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _form(memory: Tensor) -> tuple[torch.Size, bool]:
    """Of one form are memories of one size which rows share, or do not."""
    return memory.shape, _own(memory).shape != memory.shape


def _own(memory: Tensor) -> Tensor:
    """The memory itself, or that of one row where all share it."""
    return memory[:1] if memory.shape[0] > 1 and memory.stride(0) == 0 else memory


def _copied(memory: Tensor) -> Tensor:
    return torch.empty_like(_own(memory), memory_format=torch.contiguous_format).expand_as(memory)


def _difference(x: Tensor, y: Tensor) -> float:
    """The largest difference, relative to the largest of y; infinite for NaN in one of them."""
    wide = torch.promote_types(y.dtype, torch.float32)
    x, y = x.to(wide), y.to(wide)
    if not torch.equal(x.isnan(), y.isnan()):
        return float("inf")
    return float((x - y).abs().nan_to_num().max() / y.abs().nan_to_num().max().clamp(min=1e-30))


__all__ = ["WORTH", "FixedSegment", "NotRecordedError", "hindrance", "recorded"]
