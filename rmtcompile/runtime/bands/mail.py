"""Mail: how values get from band to band between processes, and from one rank to all.

    rank 0  level t ── value ──> rank 1  level t + 1
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from rmtcompile.ir.bands import Cut, Sent
from rmtcompile.ir.program import Program
from rmtcompile.runtime.bands.control import told, words_of

_PARCEL = 64 << 20
"""Bytes that are sent to all ranks at once, if they are of several tensors."""

_AHEAD = 4
"""Levels whose messages may be on their way before a rank waits for the oldest ones to be received."""


class Mail:
    """The messages of one rank.

    Args:
        group: of processes; band p is run by rank p of it. What is no tensor goes over `words_of` it.
        cut: the program cut into bands.
        program: the whole program.
        device: where values are.
    """

    def __init__(self, group: Any, cut: Cut, program: Program, device: torch.device) -> None:
        self.group, self.words = group, words_of(group)
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self.device = device
        # Of a group of two torch warns that NCCL keeps an order between messages, which these have anyway.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
        self._lanes = {lane.name: lane for lane in program.lanes}
        self._sources = {sent: band.index for band in cut.bands for sent in band.sends}
        self._underway: list[list[tuple[Any, torch.Tensor]]] = []

    # ---- values --------------------------------------------------------------------------------------------

    def send(self, sent: Sent, value: Any, level: int) -> Any:
        """Start to send a value; zeros or nothing where there is none. Gives what is sent."""
        if self._is_open(sent):
            with self.told(f"rank {sent.target}", level):
                kinds = pytree.tree_map(_kind, value)
                dist.send_object_list([kinds], self._global(sent.target), group=self.words.group)
            for part in pytree.tree_leaves(value):
                if isinstance(part, torch.Tensor):
                    self._start(_plain(part), sent.target, level)
        else:
            value = self._room(sent).zero_() if value is None else value
            self._start(_plain(value), sent.target, level)
        return value

    def receive(self, sent: Sent, level: int) -> Any:
        """A value that another rank has sent."""
        source = self.source(sent)
        with self.told(f"rank {source}", level):
            if self._is_open(sent):
                told: list[Any] = [None]
                dist.recv_object_list(told, self._global(source), group=self.words.group)
                return pytree.tree_map_only(_Kind, lambda k: self._received(self._made(k), source), told[0])
            return self._received(self._room(sent), source)

    def _is_open(self, sent: Sent) -> bool:
        """Whether the shape of a value is not known before it is there."""
        return sent.is_tap or bool(self._lanes[sent.name].grows)

    def source(self, sent: Sent) -> int:
        """The rank that sends it."""
        return self._sources[sent]

    def send_tensors(self, sent: Sent, parts: Sequence[torch.Tensor], level: int) -> None:
        """Start to send tensors whose shapes are known there; copies, where they may be written again."""
        for part in parts:
            plain = _plain(part)
            self._start(plain.clone() if plain.data_ptr() == part.data_ptr() else plain, sent.target, level)

    def expect(self, sent: Sent, rooms: Sequence[torch.Tensor], level: int) -> Callable[[], None]:
        """Start to receive tensors of known shapes; gives what waits for them."""
        source = self.source(sent)
        with self.told(f"rank {source}", level):
            works = [dist.irecv(_bytes(room), self._global(source), group=self.group) for room in rooms]

        def wait() -> None:
            with self.told(f"rank {source}", level):
                while works:
                    work = works.pop()
                    if work is not None:
                        work.wait()

        return wait

    def wait(self, level: int, all_of_them: bool = False) -> None:
        """Wait until no more than a few levels' messages are on their way; to be called once a level."""
        while len(self._underway) > (0 if all_of_them else _AHEAD):
            for work, _ in self._underway.pop(0):
                with self.told("another rank", level):
                    work.wait()
        self._underway.append([])

    def send_part(self, value: torch.Tensor, target: int, level: int) -> None:
        """Start to send a copy of a tensor whose shape is known there."""
        self._start(_plain(value).clone(), target, level)

    def receive_part(self, like: torch.Tensor, source: int, level: int) -> torch.Tensor:
        """One tensor of a shape that is known."""
        with self.told(f"rank {source}", level):
            return self._received(torch.empty_like(like, memory_format=torch.contiguous_format), source)

    def _start(self, value: torch.Tensor, target: int, level: int) -> None:
        if not self._underway:
            self._underway.append([])
        sent = _bytes(value)
        with self.told(f"rank {target}", level):
            work = dist.isend(sent, self._global(target), group=self.group)
        self._underway[-1].append((work, value))

    def _received(self, room: torch.Tensor, source: int) -> torch.Tensor:
        work = dist.irecv(_bytes(room), self._global(source), group=self.group)
        if work is not None:
            work.wait()
        return room

    def _room(self, sent: Sent) -> torch.Tensor:
        lane = self._lanes[sent.name]
        return torch.empty(lane.shape, dtype=lane.dtype, device=self.device)

    def _made(self, kind: _Kind) -> torch.Tensor:
        return torch.empty(kind.shape, dtype=kind.dtype, device=self.device)

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank) if self.group is not None else rank

    # ---- all ranks -----------------------------------------------------------------------------------------

    def gathered(self, about: str, mine: Any) -> list[Any]:
        """See `Words`."""
        return self.words.gathered(about, mine)

    def spread(self, rank: int, values: Mapping[Any, Any], kinds: Mapping[Any, Any]) -> dict[Any, Any]:
        """Tensors (and others) by key, from one rank to all; several at once, where they are small.

        Args:
            values: those of this rank, if they are its own.
            kinds: what `kinds_of` says of them on the rank that has them.
        """
        found = {
            key: values[key] if key in values else self._made(kind) if isinstance(kind, _Kind) else kind
            for key, kind in kinds.items()
        }
        wanted = [(key, kind) for key, kind in kinds.items() if isinstance(kind, _Kind)]
        for keys in _parcels(wanted):
            own = [_plain(found[key]) if rank == self.rank else found[key] for key in keys]
            flat = own[0] if len(own) == 1 else torch.cat([x.view(-1) for x in own])
            sent = _bytes(flat)
            with self.told(f"rank {rank}"):
                dist.broadcast(sent, self._global(rank), group=self.group)
            if rank != self.rank and len(own) > 1:
                parts = flat.split([x.numel() for x in own])
                torch._foreach_copy_([x.view(-1) for x in own], parts)
        return found

    def summed(
        self,
        values: Sequence[torch.Tensor | None],
        everyone: Sequence[Sequence[bool]],
        like: Sequence[torch.Tensor],
    ) -> list[torch.Tensor | None]:
        """The sums of all ranks' tensors, in memory of their own; None where no rank has one.

        Args:
            everyone: of each rank, which ones it has.
        """
        found: list[torch.Tensor | None] = [None] * len(values)
        wanted = [(i, _kind(x)) for i, x in enumerate(like) if any(has[i] for has in everyone)]
        for keys in _parcels(wanted):
            mine = [torch.zeros_like(like[i]) if (x := values[i]) is None else x for i in keys]
            flat = torch.cat([x.detach().reshape(-1) for x in mine])
            with self.told("another rank"):
                dist.all_reduce(flat, group=self.group)
            for i, part in zip(keys, flat.split([x.numel() for x in mine]), strict=True):
                found[i] = part.view(like[i].shape)
        for i, kind in wanted:
            found[i] = self._made(kind) if found[i] is None else found[i]  # of no elements
        return found

    def told(self, who: str, level: int | None = None) -> AbstractContextManager[None]:
        """Where another rank does not answer, an error that says which."""
        where = f"rank {self.rank}" + (f", level {level}" if level is not None else "")
        return told(f"{where}: {who} does not answer any more")


@dataclass(frozen=True)
class _Kind:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def _kind(value: Any) -> Any:
    """What another rank has to know of a value to make room for it; others are told as they are."""
    return _Kind(tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value


def kinds_of(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """What other ranks have to know of values by key, before they are sent to all; see `Mail.spread`."""
    return {key: _kind(value) for key, value in values.items()}


def _parcels(wanted: Sequence[tuple[Any, _Kind]]) -> Iterator[list[Any]]:
    """Keys of one dtype each, in their order, as many as one message holds."""
    for dtype in dict.fromkeys(kind.dtype for _, kind in wanted):
        keys: list[Any] = []
        size = 0
        for key, kind in wanted:
            if kind.dtype != dtype or not kind.numel:
                continue
            nbytes = kind.numel * dtype.itemsize
            if keys and size + nbytes > _PARCEL:
                yield keys
                keys, size = [], 0
            keys.append(key)
            size += nbytes
        if keys:
            yield keys


def _plain(value: torch.Tensor) -> torch.Tensor:
    """The same values, one after the other in memory: neither conjugated nor negated when they are read."""
    return value.detach().resolve_conj().resolve_neg().contiguous()


def _bytes(value: torch.Tensor) -> torch.Tensor:
    """The memory of a plain tensor: backends do not know all types."""
    return value.view(-1).view(torch.uint8)


__all__ = ["Mail", "kinds_of"]
