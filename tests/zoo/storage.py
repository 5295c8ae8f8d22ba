"""One recurrence, many hiding places: state in slices, stacks, buffers, caches, and views that alias.

Every model maps tokens i64[B, S * segment] to logits f[B, S * segment, VOCAB].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import VOCAB, Block, MemoryBlock, Writer


class SlicedState(nn.Module):
    """One tensor [B, M, D, L] holds the state of all layers; each writes its slice in place."""

    def __init__(
        self, d: int = 16, heads: int = 2, n_layers: int = 4, segment: int = 4, n_mem: int = 2
    ) -> None:
        super().__init__()
        self.segment, self.n_mem = segment, n_mem
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(MemoryBlock(d, heads) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x_all = self.embed(ids)
        state = x_all.new_zeros(x_all.shape[0], self.n_mem, x_all.shape[2], len(self.layers))
        out = []
        for x in x_all.split(self.segment, 1):
            for i, layer in enumerate(self.layers):
                x, state[..., i] = layer(x, state[..., i])
            out.append(x)
        return self.head(torch.cat(out, 1))


class StackedMemories(nn.Module):
    """All memories [L, B, M, D] are stacked after each segment and, if asked, rolled over the layers.

    With `roll = -1` layer l gets the memory that layer l + 1 wrote, and the last layer that of the first:
    offsets (1, -1) and (1, L - 1).  With `roll = 1` layer 0 waits for layer L - 1 of the segment before:
    nothing runs together.
    """

    def __init__(
        self, d: int = 16, heads: int = 2, n_layers: int = 4, segment: int = 4, n_mem: int = 2, roll: int = 0
    ) -> None:
        super().__init__()
        self.segment, self.roll = segment, roll
        self.embed = nn.Embedding(VOCAB, d)
        self.start = nn.Parameter(torch.randn(n_layers, 1, n_mem, d))
        self.layers = nn.ModuleList(MemoryBlock(d, heads) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        memories = self.start.repeat(1, ids.shape[0], 1, 1)
        out = []
        for chunk in ids.split(self.segment, 1):
            x, written = self.embed(chunk), []
            for memory, layer in zip(memories, self.layers):
                x, new = layer(x, memory)
                written.append(new)
            memories = torch.stack(written)
            if self.roll:
                memories = torch.roll(memories, self.roll, dims=0)
            out.append(self.head(x))
        return torch.cat(out, 1)


class BufferLayer(nn.Module):
    """A block whose memory, shared by the batch, is a registered buffer [1, M, D] that forward overwrites."""

    memory: Tensor

    def __init__(self, d: int, heads: int, n_mem: int) -> None:
        super().__init__()
        self.block, self.writer = Block(d, heads), Writer(d)
        self.register_buffer("memory", torch.zeros(1, n_mem, d))

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory.expand(x.shape[0], -1, -1)
        x = self.block(x, memory)
        self.memory.copy_(self.writer(memory, x).mean(0, keepdim=True).detach())
        return x


class BufferCopy(nn.Module):
    """State in buffers, zeroed at the start of forward and updated with `copy_`."""

    def __init__(
        self, d: int = 16, heads: int = 2, n_layers: int = 4, segment: int = 4, n_mem: int = 2
    ) -> None:
        super().__init__()
        self.segment = segment
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(BufferLayer(d, heads, n_mem) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        for layer in self.layers:
            layer.memory.zero_()
        out = []
        for x in self.embed(ids).split(self.segment, 1):
            for layer in self.layers:
                x = layer(x)
            out.append(x)
        return self.head(torch.cat(out, 1))


class InPlaceLayer(nn.Module):
    """A block that updates its memory in place: decays all slots, adds to all, and replaces some."""

    def __init__(self, d: int, heads: int, slots: tuple[int, ...]) -> None:
        super().__init__()
        self.slots = slots
        self.block, self.new, self.decay = Block(d, heads), nn.Linear(d, d), nn.Linear(d, 1)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.block(x, memory.clone())
        memory.mul_(torch.sigmoid(self.decay(x[:, -1:])))
        memory.add_(x.mean(1, keepdim=True), alpha=0.1)
        rows = torch.tensor(self.slots, device=x.device)
        memory.index_put_((torch.arange(len(x))[:, None], rows), torch.tanh(self.new(x[:, -len(rows) :])))
        memory[:, 0] += x[:, 0]
        return x


class InPlace(nn.Module):
    """Memories [B, M, D] made once a forward, updated by `mul_`, `add_`, `index_put_` and `+=` on a slice."""

    def __init__(
        self, d: int = 16, heads: int = 2, n_layers: int = 4, segment: int = 4, n_mem: int = 3
    ) -> None:
        super().__init__()
        self.segment, self.n_mem = segment, n_mem
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(InPlaceLayer(d, heads, (2, 1)) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x_all = self.embed(ids)
        memories = [x_all.new_zeros(x_all.shape[0], self.n_mem, x_all.shape[2]) for _ in self.layers]
        out = []
        for x in x_all.split(self.segment, 1):
            for layer, memory in zip(self.layers, memories):
                x = layer(x, memory)
            out.append(x)
        return self.head(torch.cat(out, 1))


class SegmentCache:
    """Tensors allocated once for each layer and overwritten by `update`, the way decoding caches work."""

    def __init__(self, n_layers: int, like: Tensor) -> None:
        self.values = [torch.zeros_like(like) for _ in range(n_layers)]

    def update(self, index: int, value: Tensor) -> None:
        self.values[index].copy_(value)

    def get(self, index: int) -> Tensor:
        return self.values[index].clone()


class CacheObject(nn.Module):
    """Each layer keeps its last outputs in a cache object that is handed through the layers."""

    def __init__(self, d: int = 16, heads: int = 2, n_layers: int = 4, segment: int = 4) -> None:
        super().__init__()
        self.segment = segment
        self.embed = nn.Embedding(VOCAB, d)
        self.h = nn.ModuleList(CachedLayer(d, heads, i) for i in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x_all = self.embed(ids)
        cache = SegmentCache(len(self.h), x_all[:, : self.segment])
        out = []
        for x in x_all.split(self.segment, 1):
            for layer in self.h:
                (x,) = layer(x, cache=cache)
            out.append(x)
        return self.head(torch.cat(out, 1))


class CachedLayer(nn.Module):
    """A block that knows its index in the cache; gives a tuple of one."""

    def __init__(self, d: int, heads: int, index: int) -> None:
        super().__init__()
        self.index, self.block = index, Block(d, heads)

    def forward(self, x: Tensor, cache: SegmentCache) -> tuple[Tensor]:
        x = self.block(x, cache.get(self.index))
        cache.update(self.index, x)
        return (x,)


class AliasTrap(nn.Module):
    """Looks like "layer l reads its own memory"; in truth layer l reads what layer l + 1 wrote over it.

    Layer l leaves its memory as a *view* of row l of a scratch tensor [L, B, M, D].  Later in the same
    segment layer l + 1 writes rows l and l + 1 in place, so the view changes before the next segment
    reads it.  Only the last layer keeps its own.  Dependences: (1, -1) for layers below the last, (1, 0)
    for the last.
    """

    def __init__(
        self, d: int = 16, heads: int = 2, n_layers: int = 4, segment: int = 4, n_mem: int = 2
    ) -> None:
        super().__init__()
        self.segment, self.n_mem = segment, n_mem
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(MemoryBlock(d, heads) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x_all = self.embed(ids)
        scratch = x_all.new_zeros(len(self.layers), x_all.shape[0], self.n_mem, x_all.shape[2])
        memory = [scratch[i] for i in range(len(self.layers))]
        out = []
        for x in x_all.split(self.segment, 1):
            for i, layer in enumerate(self.layers):
                x, new = layer(x, memory[i])
                scratch[max(i - 1, 0) : i + 1] = new
                memory[i] = scratch[i]
            out.append(x)
        return self.head(torch.cat(out, 1))


class SharedScratch(nn.Module):
    """Every layer's memory is the same scratch tensor: each layer reads what the layer before it left there.

    Reads like (1, 0); in truth layer l reads layer l - 1 of its own segment, and layer 0 reads the last
    layer of the segment before: (1, 1 - L), and nothing runs together.
    """

    def __init__(
        self, d: int = 16, heads: int = 2, n_layers: int = 3, segment: int = 4, n_mem: int = 2
    ) -> None:
        super().__init__()
        self.segment, self.n_mem = segment, n_mem
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(MemoryBlock(d, heads) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x_all = self.embed(ids)
        scratch = x_all.new_zeros(x_all.shape[0], self.n_mem, x_all.shape[2])
        memory = [scratch for _ in self.layers]
        out = []
        for x in x_all.split(self.segment, 1):
            for i, layer in enumerate(self.layers):
                x, new = layer(x, memory[i])
                memory[i].copy_(new)
            out.append(x)
        return self.head(torch.cat(out, 1))
