"""Published kinds of recurrence, each in its own style: memory tokens, compressive matrices, caches, gates.

Every model maps tokens i64[B, S * segment] to logits f[B, S * segment, VOCAB], unless its docstring says
otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import VOCAB, Attention, Block, FeedForward, MemoryBlock, Writer


class ParallelRMT(nn.Module):
    """Memory tokens of its own in each layer: before the segment to read, after it to write (2506.05229)."""

    def __init__(
        self, d: int = 16, heads: int = 2, n_layers: int = 4, segment: int = 4, n_mem: int = 2
    ) -> None:
        super().__init__()
        self.segment, self.n_mem = segment, n_mem
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(Block(d, heads) for _ in range(n_layers))
        self.start = nn.ParameterList(nn.Parameter(torch.randn(n_mem, d)) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        memories = [start.expand(ids.shape[0], -1, -1) for start in self.start]
        logits = []
        for piece in ids.split(self.segment, dim=1):
            x = self.embed(piece)
            for index, layer in enumerate(self.layers):
                y = layer(torch.cat([memories[index], x, memories[index]], dim=1))
                x, memories[index] = y[:, self.n_mem : -self.n_mem], y[:, -self.n_mem :]
            logits.append(self.head(x))
        return torch.cat(logits, dim=1)


class ClassicRMT(nn.Module):
    """The top layer's memory enters the bottom of the next segment (2207.06881): nothing can run together."""

    def __init__(
        self, d: int = 16, heads: int = 2, n_layers: int = 4, segment: int = 4, n_mem: int = 2
    ) -> None:
        super().__init__()
        self.segment, self.n_mem = segment, n_mem
        self.embed = nn.Embedding(VOCAB, d)
        self.memory = nn.Parameter(torch.randn(n_mem, d))
        self.layers = nn.ModuleList(Block(d, heads) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        n = self.n_mem
        memory = self.memory.unsqueeze(0).repeat(ids.size(0), 1, 1)
        out = []
        for s in range(0, ids.size(1), self.segment):
            h = torch.cat((memory, self.embed(ids[:, s : s + self.segment]), memory), 1)
            for layer in self.layers:
                h = layer(h)
            memory = h[:, -n:]
            out.append(self.head(h[:, n:-n]))
        return torch.cat(out, 1)


class InfiniAttention(nn.Module):
    """One Infini-attention layer (2404.07143, eqs 3 to 10): local attention gated with a compressive memory.

    `forward(x: f[B, T, D], memory: f[B, H, K, K], z: f[B, H, K]) -> (x', memory', z')`.
    """

    def __init__(self, d: int, heads: int, delta: bool = True) -> None:
        super().__init__()
        self.heads, self.delta = heads, delta
        self.norm, self.mlp_norm = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.beta = nn.Parameter(torch.randn(heads))
        self.mlp = FeedForward(d)

    def forward(self, x: Tensor, memory: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        local = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        sq, sk = F.elu(q) + 1, F.elu(k) + 1
        read = (sq @ memory) / (sq @ z.unsqueeze(-1) + 1e-6)
        known = (sk @ memory) / (sk @ z.unsqueeze(-1) + 1e-6) if self.delta else torch.zeros_like(v)
        memory = memory + sk.transpose(-2, -1) @ (v - known)
        z = z + sk.sum(-2)
        gate = torch.sigmoid(self.beta).view(1, -1, 1, 1)
        mixed = gate * read + (1 - gate) * local
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.mlp_norm(x)), memory, z


class InfiniTransformer(nn.Module):
    """Infini-attention layers; their states are a list of pairs."""

    def __init__(self, d: int = 16, heads: int = 2, n_layers: int = 4, segment: int = 4) -> None:
        super().__init__()
        self.segment, self.heads, self.key = segment, heads, d // heads
        self.embed = nn.Embedding(VOCAB, d)
        self.blocks = nn.ModuleList(InfiniAttention(d, heads) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        zero = x.new_zeros(x.shape[0], self.heads, self.key)
        states = [(zero.unsqueeze(-1).expand(-1, -1, -1, self.key), zero) for _ in self.blocks]
        out = []
        for h in torch.split(x, self.segment, 1):
            for i, block in enumerate(self.blocks):
                h, memory, z = block(h, *states[i])
                states[i] = (memory, z)
            out.append(h)
        return self.head(torch.cat(out, 1))


class BlockRecurrent(nn.Module):
    """Only some layers are recurrent (2203.07852): gated state vectors, read by cross attention."""

    def __init__(
        self,
        d: int = 16,
        heads: int = 2,
        n_layers: int = 4,
        segment: int = 4,
        n_state: int = 3,
        recurrent: tuple[int, ...] = (1, 3),
    ) -> None:
        super().__init__()
        self.segment, self.recurrent = segment, recurrent
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(Block(d, heads) for _ in range(n_layers))
        self.writers = nn.ModuleDict({str(i): Writer(d) for i in recurrent})
        self.start = nn.ParameterDict({str(i): nn.Parameter(torch.randn(1, n_state, d)) for i in recurrent})
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        state = {i: self.start[str(i)].expand(ids.shape[0], -1, -1) for i in self.recurrent}
        out = []
        for chunk in ids.split(self.segment, 1):
            x = self.embed(chunk)
            for i, layer in enumerate(self.layers):
                if i in self.recurrent:
                    x = layer(x, state[i])
                    state[i] = self.writers[str(i)](state[i], x)
                else:
                    x = layer(x)
            out.append(self.head(x))
        return torch.cat(out, 1)


class TransformerXL(nn.Module):
    """Each layer sees what entered it one segment earlier (1901.02860, detached); absolute positions.

    What enters layer l is what layer l - 1 gave: the offset is (1, 1), and the first segment has no
    context at all.
    """

    def __init__(self, d: int = 16, heads: int = 2, n_layers: int = 4, segment: int = 4) -> None:
        super().__init__()
        self.segment = segment
        self.embed, self.position = nn.Embedding(VOCAB, d), nn.Embedding(256, d)
        self.layers = nn.ModuleList(Block(d, heads) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        previous: list[Tensor] | None = None
        out = []
        for start in range(0, ids.shape[1], self.segment):
            piece = ids[:, start : start + self.segment]
            x = self.embed(piece) + self.position(
                torch.arange(start, start + piece.shape[1], device=ids.device)
            )
            entered = []
            for i, layer in enumerate(self.layers):
                entered.append(x.detach())
                x = layer(x, previous[i] if previous is not None else None)
            previous = entered
            out.append(self.head(x))
        return torch.cat(out, 1)


class Skewed(nn.Module):
    """One state: written from what layer `write` gave, read by layer `read` below it in the next segment."""

    def __init__(
        self,
        d: int = 16,
        heads: int = 2,
        n_layers: int = 5,
        segment: int = 4,
        n_mem: int = 2,
        write: int = 3,
        read: int = 1,
    ) -> None:
        super().__init__()
        self.segment, self.n_mem, self.write, self.read = segment, n_mem, write, read
        self.embed = nn.Embedding(VOCAB, d)
        self.start = nn.Parameter(torch.randn(1, n_mem, d))
        self.layers = nn.ModuleList(Block(d, heads) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        memory = self.start.expand(ids.shape[0], -1, -1)
        out = []
        for chunk in ids.split(self.segment, 1):
            x, written = self.embed(chunk), memory
            for i, layer in enumerate(self.layers):
                x = layer(x, memory if i == self.read else None)
                if i == self.write:
                    written = torch.tanh(x[:, -self.n_mem :])
            memory = written
            out.append(self.head(x))
        return torch.cat(out, 1)


class CompressedOlder(nn.Module):
    """Each layer sees its outputs of the last segment and, compressed, of the one before (1911.05507)."""

    def __init__(self, d: int = 16, heads: int = 2, n_layers: int = 4, segment: int = 4) -> None:
        super().__init__()
        self.segment, self.d = segment, d
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(Block(d, heads) for _ in range(n_layers))
        self.compress = nn.ModuleList(nn.Conv1d(d, d, 2, stride=2) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        empty = torch.zeros(
            ids.shape[0], self.segment, self.d, dtype=self.head.weight.dtype, device=ids.device
        )
        history: list[list[Tensor]] = [[empty, empty] for _ in self.layers]
        out = []
        for chunk in ids.split(self.segment, 1):
            x = self.embed(chunk)
            for i, layer in enumerate(self.layers):
                older = self.compress[i](history[i][-2].mT).mT
                x = layer(x, torch.cat((older, history[i][-1]), 1))
                history[i].append(x)
            out.append(self.head(x))
        return torch.cat(out, 1)


class Universal(nn.Module):
    """One shared block, called `depth` times for each segment, with a memory for each depth (1807.03819)."""

    def __init__(self, d: int = 16, heads: int = 2, depth: int = 4, segment: int = 4, n_mem: int = 2) -> None:
        super().__init__()
        self.segment, self.depth, self.n_mem = segment, depth, n_mem
        self.embed = nn.Embedding(VOCAB, d)
        self.depth_signal = nn.Parameter(torch.randn(depth, d))
        self.block = MemoryBlock(d, heads)
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        state = [x.new_zeros(x.shape[0], self.n_mem, x.shape[2]) for _ in range(self.depth)]
        done = []
        for h in x.split(self.segment, 1):
            for i in range(self.depth):
                h, state[i] = self.block(h + self.depth_signal[i], state[i])
            done.append(h)
        return self.head(torch.cat(done, 1))


class WindowLayer(nn.Module):
    """Attention whose window and gain are constants of the layer; sees its memory and writes it."""

    def __init__(self, d: int, heads: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.norm, self.attention, self.writer = nn.LayerNorm(d), Attention(d, heads), Writer(d)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.gain * self.attention(self.norm(x), memory)
        return x, self.writer(memory, x)


class Alternating(nn.Module):
    """Even layers are attention with memory and their own constant, odd layers are MLPs without state."""

    def __init__(
        self, d: int = 16, heads: int = 2, n_layers: int = 6, segment: int = 4, n_mem: int = 2
    ) -> None:
        super().__init__()
        self.segment, self.n_mem = segment, n_mem
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(
            FeedForward(d) if i % 2 else WindowLayer(d, heads, 0.5 + 0.25 * i) for i in range(n_layers)
        )
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        memory: dict[nn.Module, Tensor] = {}
        out = []
        for chunk in ids.chunk(ids.shape[1] // self.segment, 1):
            x = self.embed(chunk)
            for layer in self.layers:
                if isinstance(layer, WindowLayer):
                    before = memory.get(layer, x.new_zeros(x.shape[0], self.n_mem, x.shape[2]))
                    x, memory[layer] = layer(x, before)
                else:
                    x = x + layer(x)
            out.append(self.head(x))
        return torch.cat(out, 1)


class LocalGlobal(nn.Module):
    """Local layers without state, global ones that see earlier segments, too; rotary tables are made once a
    segment and given to every layer."""

    def __init__(
        self, d: int = 16, heads: int = 2, n_layers: int = 6, segment: int = 4, every: int = 3
    ) -> None:
        super().__init__()
        self.segment, self.every = segment, every
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(RotaryAttention(d, heads) for _ in range(n_layers))
        self.register_buffer("freqs", 1 / 100 ** torch.linspace(0, 1, d // heads // 2))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        past: list[tuple[Tensor, Tensor] | None] = [None] * len(self.layers)
        out, offset = [], 0
        for chunk in ids.split(self.segment, 1):
            x = self.embed(chunk)
            angles = torch.outer(torch.arange(offset, offset + chunk.shape[1]).to(self.freqs), self.freqs)
            rotary = (angles.cos(), angles.sin())
            for i, layer in enumerate(self.layers):
                x, seen = layer(x, rotary, past[i])
                if i % self.every == self.every - 1:
                    past[i] = seen
            out.append(x)
            offset += chunk.shape[1]
        return self.head(torch.cat(out, 1))


class RotaryAttention(nn.Module):
    """Attention over a segment, and over faded keys and values of earlier ones if there are any."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
        q, k = self.turned(q, *rotary), self.turned(k, *rotary)
        seen = (k, v)
        if past is not None:
            seen = (k + 0.5 * past[0], v + 0.5 * past[1])
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(mixed), seen

    @staticmethod
    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class GlueUpdate(nn.Module):
    """The segment loop itself reads and updates the memories; the layers know nothing of memory."""

    def __init__(self, d: int = 16, heads: int = 2, n_layers: int = 4, segment: int = 4) -> None:
        super().__init__()
        self.segment = segment
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(Block(d, heads) for _ in range(n_layers))
        self.decay = nn.Parameter(torch.randn(n_layers, d))
        self.read = nn.Parameter(torch.randn(n_layers, d, d) / d**0.5)
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x_all = self.embed(ids)
        memory = [torch.zeros_like(x_all[:, 0]) for _ in self.layers]
        out = []
        for x in x_all.split(self.segment, 1):
            for i, layer in enumerate(self.layers):
                x = x + (memory[i] @ self.read[i])[:, None]
                x = layer(x)
                keep = torch.sigmoid(self.decay[i])
                memory[i] = keep * memory[i] + (1 - keep) * x.mean(1)
            out.append(x)
        return self.head(torch.cat(out, 1))


class RunningMean(nn.Module):
    """The memory is a mean over all segments so far: its constants s / (s + 1) are not affine in s."""

    def __init__(self, d: int = 16, heads: int = 2, n_layers: int = 3, segment: int = 4) -> None:
        super().__init__()
        self.segment = segment
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(Block(d, heads) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x_all = self.embed(ids)
        memory = [x_all.new_zeros(x_all.shape[0], 1, x_all.shape[2]) for _ in self.layers]
        out = []
        for s, x in enumerate(x_all.split(self.segment, 1)):
            for i, layer in enumerate(self.layers):
                x = layer(x, memory[i])
                memory[i] = memory[i] * (s / (s + 1)) + x.mean(1, keepdim=True) * (1 / (s + 1))
            out.append(x)
        return self.head(torch.cat(out, 1))


class SkipConnections(nn.Module):
    """Layer l also gets what layer l - 2 gave: an edge (0, 2) beside the usual ones."""

    def __init__(
        self, d: int = 16, heads: int = 2, n_layers: int = 5, segment: int = 4, n_mem: int = 2
    ) -> None:
        super().__init__()
        self.segment, self.n_mem = segment, n_mem
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(MemoryBlock(d, heads) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x_all = self.embed(ids)
        memory = [x_all.new_zeros(x_all.shape[0], self.n_mem, x_all.shape[2]) for _ in self.layers]
        out = []
        for x in x_all.split(self.segment, 1):
            trail = [x]
            for i, layer in enumerate(self.layers):
                enter = trail[-1] + 0.5 * trail[-2] if i >= 2 else trail[-1]
                x, memory[i] = layer(enter, memory[i])
                trail.append(x)
            out.append(x)
        return self.head(torch.cat(out, 1))


class NoCarry(nn.Module):
    """Segments that know nothing of each other: only (0, 1), so each layer may take all of them at once."""

    def __init__(self, d: int = 16, heads: int = 2, n_layers: int = 3, segment: int = 4) -> None:
        super().__init__()
        self.segment = segment
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.Sequential(*(Block(d, heads) for _ in range(n_layers)))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat(
            [self.head(self.layers(self.embed(piece))) for piece in ids.split(self.segment, 1)], 1
        )


class NamedOutputs(nn.Module):
    """Gives a dictionary: `logits_0`, ... f[B, segment, VOCAB], and `last`: (hidden f[B, D], memories)."""

    def __init__(
        self, d: int = 16, heads: int = 2, n_layers: int = 3, segment: int = 4, n_mem: int = 2
    ) -> None:
        super().__init__()
        self.segment, self.n_mem = segment, n_mem
        self.embed = nn.Embedding(VOCAB, d)
        self.layers = nn.ModuleList(MemoryBlock(d, heads) for _ in range(n_layers))
        self.head = nn.Linear(d, VOCAB)

    def forward(self, ids: Tensor) -> dict[str, object]:
        memory = [
            torch.zeros(
                ids.shape[0],
                self.n_mem,
                self.head.in_features,
                device=ids.device,
                dtype=self.head.weight.dtype,
            )
            for _ in self.layers
        ]
        result: dict[str, object] = {}
        x = embedded = self.embed(ids)
        for s, x in enumerate(embedded.split(self.segment, 1)):
            for i, layer in enumerate(self.layers):
                x, memory[i] = layer(x, memory[i])
            result[f"logits_{s}"] = self.head(x)
        result["last"] = (x[:, -1], tuple(memory))
        return result
