"""Your own recurrent model: plain PyTorch, no base class, no adapter.

Two models that differ in one line.  In the first each layer reads the memory that it wrote itself; in the
second it reads what the layer above wrote.  The compiler finds the difference in the graph, not in a name.

    python examples/03_your_own_recurrent_model.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import rmtcompile


class Block(nn.Module):
    """Attention over the segment and a few memory slots, and a gate that decides what the slots become."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.o, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.norm(x)
        q = self._split(self.q(h))
        k, v = map(self._split, self.kv(torch.cat([memory, h], dim=1)).chunk(2, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        new = x[:, -memory.shape[1] :]
        gate = torch.sigmoid(self.gate(new))
        return x, gate * memory + (1 - gate) * new

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Reader(nn.Module):
    """Reads tokens in segments.

    Args:
        shift: which layer's memory a layer reads: 0 its own, 1 that of the layer above.
    """

    def __init__(self, shift: int = 0, n_layers: int = 4, width: int = 32, segment: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(n_layers))
        self.head = nn.Linear(width, 256)
        self.slots = nn.Parameter(torch.randn(4, width))
        self.shift, self.segment = shift, segment

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(tokens)
        memories = [self.slots.expand(x.shape[0], -1, -1)] * (len(self.blocks) + self.shift)
        logits = []
        for start in range(0, x.shape[1], self.segment):
            h = x[:, start : start + self.segment]
            written = list(memories)
            for i, block in enumerate(self.blocks):
                h, written[i] = block(h, memories[i + self.shift])  # the one line
            memories = written
            logits.append(self.head(h))
        return {"logits": torch.cat(logits, dim=1)}


def main() -> None:
    tokens = torch.randint(0, 256, (2, 6 * 16))
    for shift, words in ((0, "each layer reads its own memory"), (1, "each layer reads the layer above")):
        torch.manual_seed(0)
        model = Reader(shift).eval()
        fast = rmtcompile.optimize(model)
        with torch.no_grad():
            difference = (fast(tokens)["logits"] - model(tokens)["logits"]).abs().max()
        schedule = fast.schedule
        print(f"{words}")
        print(f"  offsets {sorted(schedule.offsets)}, level {schedule.level_rule}")
        print(f"  {schedule.n_cells} cells in {schedule.n_levels} levels, difference {difference:.0e}")
        for offset in fast.explain().offsets:
            print(f"  {offset.offset}: {offset.consumer}")
            print(f"          reads {offset.producer}")


if __name__ == "__main__":
    main()
