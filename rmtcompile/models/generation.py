"""Generation: what follows a text, token by token.

    text      |  segment 0  |  segment 1  |  open ...          closed segments are in the memory: one forward
                                             ^ next token      reads the keys and values of the open segment

A token costs one position, whatever the length of the text. When the open segment is full, its memory tokens
are read and written to memory, and a new one begins.  On CUDA these tokens are read by a CUDA graph
(`recorded.py`).  What to take of the logits (`choices.py`), when to stop and where tokens are shown to is
decided by classes of transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .choices import choices
from .recorded import WORTH, FixedSegment, NotRecordedError, hindrance

if TYPE_CHECKING:
    from .armt import ARMT, MemoryCell

_LOGGER = logging.getLogger("rmtcompile")


class OpenSegment:
    """The segment of each text of a batch that has not been written to memory yet.

    Attributes:
        rows: B.
        filled: tokens that it holds.
        cache: keys and values of these; None where they are computed again with each token.
        records: whether single tokens are read by a CUDA graph; "auto": where that can be.
    """

    records: bool | str = False

    def __init__(self, cell: MemoryCell, use_cache: bool = True) -> None:
        self.cell = cell
        self.use_cache = use_cache
        self.rows = 0
        self._fixed: FixedSegment | None = None
        self._begin()

    def _begin(self) -> None:
        self.filled = 0
        if self._fixed is None:
            self.cache: Any = DynamicCache() if self.use_cache else None
        else:
            self._fixed.begin()
        self.embeds: Tensor | None = None  # where there is no cache
        self.mask: Tensor | None = None

    def read(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read tokens, which may fill several segments.

        Args:
            ids: i64[B, n], n >= 1.
            mask: i64[B, n], 0 for padding; given in all calls, or in none.

        Returns:
            f[B, V], the logits of what follows the last token.
        """
        self.rows, size = ids.shape[0], self.cell.config.segment_size
        while ids.shape[1]:
            if self.filled == size:
                self._close()
            n = min(size - self.filled, ids.shape[1])
            logits = self._extended(ids[:, :n], None if mask is None else mask[:, :n])
            ids, mask = ids[:, n:], None if mask is None else mask[:, n:]
        return logits

    def _extended(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        self.filled += ids.shape[1]
        if mask is not None:
            self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)
        if self.cache is not None:
            return self._decoded(ids)
        embeds = self.cell.model.get_input_embeddings()(ids)
        self.embeds = embeds if self.embeds is None else torch.cat([self.embeds, embeds], 1)
        logits = self.cell(self.embeds, self.mask, write=False).logits
        assert logits is not None
        return logits[:, -1]

    def _decoded(self, ids: Tensor) -> Tensor:
        """The logits of what follows these tokens, whose keys and values are added."""
        is_recorded, fixed = bool(self.records) and ids.shape[1] == 1, self._fixed
        if is_recorded and fixed is not None:
            with self._recording():
                return fixed.read(ids, self.mask)
        elif is_recorded and self.filled > 1:
            with self._recording():
                fixed = FixedSegment(self.cell, self.cache, self.mask)
        logits = self.cell.decode(self.cell.model.get_input_embeddings()(ids), self.cache, self.mask)[:, -1]
        if fixed is not None and self._fixed is None:
            with self._recording():
                fixed.agree(ids, self.mask, logits)
                self._fixed, self.cache = fixed, fixed.cache
        return logits

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """What cannot be recorded is launched from then on."""
        try:
            yield
        except NotRecordedError as error:
            if self.records is True:
                raise
            self.records = False
            _LOGGER.warning("tokens are launched one operation after the other: %s", error)

    def release(self) -> None:
        """Leave the model memories of its own."""
        if self._fixed is not None:
            self._fixed.release()

    def _close(self) -> None:
        """Write the full segment to memory, and begin the next one."""
        if self.cache is None:
            assert self.embeds is not None
            self.cell(self.embeds, self.mask)
        else:
            self.cell.close(self.cache, self.mask, self.rows)
        self._begin()

    def repeat(self, n: int) -> None:
        """Each text n times, one after the other; the memory of one text is held once until it is written.

        Raises:
            ValueError: tokens were read by a CUDA graph, which is for so many texts.
        """
        if self._fixed is not None:
            raise ValueError("texts are repeated before single tokens are read by a CUDA graph")
        for layer in self.cell.layers:
            layer.repeat(n)
        if self.cache is not None:
            self.cache.batch_repeat_interleave(n)
        self.embeds = None if self.embeds is None else self.embeds.repeat_interleave(n, 0)
        self.mask = None if self.mask is None else self.mask.repeat_interleave(n, 0)


def generate(
    model: ARMT,
    input_ids: Tensor,
    max_new_tokens: int | None = None,
    *,
    attention_mask: Tensor | None = None,
    generation_config: Any = None,
    logits_processor: Iterable[Any] = (),
    stopping_criteria: Iterable[Any] = (),
    streamer: Any = None,
    cuda_graphs: bool | str = "auto",
    **options: Any,
) -> Tensor:
    """See `ARMT.generate`."""
    options["max_new_tokens"] = max_new_tokens
    chosen = choices(
        input_ids, attention_mask, generation_config, options, logits_processor, stopping_criteria
    )
    if streamer is not None:
        streamer.put(input_ids.cpu())
    records = _records(model, chosen.most, cuda_graphs, chosen.use_cache)
    segment, logits = prefilled(model, input_ids, attention_mask, chosen.use_cache)
    segment.records = records
    if chosen.rows > 1:
        segment.repeat(chosen.rows)
        logits, input_ids = (x.repeat_interleave(chosen.rows, 0) for x in (logits, input_ids))
    going = torch.ones_like(input_ids[:, 0])
    mask = torch.ones_like(input_ids[:, :1]) if attention_mask is not None else None
    for i in range(chosen.most):
        if i:
            logits = segment.read(input_ids[:, -1:], mask)
        scores = chosen.takes(input_ids, logits.to(torch.promote_types(logits.dtype, torch.float32)))
        tokens = _drawn(scores) if chosen.draws else scores.argmax(-1)
        tokens = torch.where(going.bool(), tokens, chosen.pad)
        input_ids = torch.cat([input_ids, tokens[:, None]], 1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        going = going & ~chosen.stops(input_ids, scores)
        if not going.any():
            break
    segment.release()
    if streamer is not None:
        streamer.end()
    return input_ids


def prefilled(
    model: ARMT, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool | None = None
) -> tuple[OpenSegment, Tensor]:
    """A text read to its end: its open segment, and the logits f[B, V] of what follows. Closed segments are
    read by one call of the model."""
    can_cache = takes_cache(model.memory_cell.model)
    if use_cache and not can_cache:
        kind = type(model.memory_cell.model).__name__
        raise ValueError(
            f"this transformers has another cache for {kind}: leave use_cache out, or use another"
        )
    closed = (input_ids.shape[1] - 1) // model.config.segment_size * model.config.segment_size
    if closed:
        given = {} if attention_mask is None else {"attention_mask": attention_mask[:, :closed]}
        model(input_ids[:, :closed], **given, logits_to_keep=1)
    else:
        model.memory_cell.reset()
    segment = OpenSegment(model.memory_cell, can_cache and use_cache is not False)
    mask = None if attention_mask is None else attention_mask[:, closed:]
    return segment, segment.read(input_ids[:, closed:], mask)


def _records(model: ARMT, new: int, cuda_graphs: bool | str, use_cache: bool | None) -> bool | str:
    """Whether single tokens are read by a CUDA graph; see `OpenSegment.records`.

    Raises:
        ValueError: they have to be, and cannot, or no such choice.
    """
    if cuda_graphs not in (True, False, "auto"):
        raise ValueError(f"cuda_graphs has to be True, False or 'auto', not {cuda_graphs!r}")
    if cuda_graphs is False or (cuda_graphs == "auto" and new <= WORTH):
        return False
    cell = model.memory_cell
    is_cached = use_cache is not False and takes_cache(cell.model)
    reason = hindrance(cell) if is_cached else "tokens are read without a cache"
    if reason is None:
        return cuda_graphs
    if cuda_graphs is True:
        raise ValueError(f"cuda_graphs=True: {reason}")
    if next(model.parameters()).is_cuda:
        _LOGGER.info("tokens are launched one operation after the other: %s", reason)
    return False


def takes_cache(decoder: Any) -> bool:
    """Whether a decoder keeps keys and values in a `DynamicCache`: all in transformers 5, most in 4."""
    other = getattr(decoder.config, "cache_implementation", None)
    return other is None and bool(getattr(decoder, "_supports_cache_class", True))


def _drawn(scores: Tensor) -> Tensor:
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


__all__ = ["OpenSegment", "generate", "prefilled", "takes_cache"]
