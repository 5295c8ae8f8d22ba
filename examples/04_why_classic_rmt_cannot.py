"""Why classic RMT cannot run on diagonals, and what memory in each layer changes.

In the Recurrent Memory Transformer the memory tokens come out of the top layer and go into the bottom
layer of the next segment.  Layer 0 of segment s + 1 so waits for the last layer of segment s, and no two
cells can overlap.  A model whose layers carry memory of their own has no such edge.

    python examples/04_why_classic_rmt_cannot.py
    rmtcompile explain examples/04_why_classic_rmt_cannot.py:classic
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

import rmtcompile


class Classic(nn.Module):
    """Memory tokens before each segment; what the top layer makes of them is the next segment's memory."""

    def __init__(self, n_layers: int = 4, width: int = 32, segment: int = 16, slots: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
            for _ in range(n_layers)
        )
        self.memory = nn.Parameter(torch.randn(1, slots, width))
        self.segment = segment

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = self.memory.expand(x.shape[0], -1, -1)
        slots, outputs = memory.shape[1], []
        for piece in x.split(self.segment, dim=1):
            h = torch.cat([memory, piece], dim=1)
            for layer in self.layers:
                h = layer(h)
            memory = h[:, :slots]
            outputs.append(h[:, slots:])
        return torch.cat(outputs, dim=1)


class InEachLayer(Classic):
    """The same layers, but each keeps its own memory tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memories = [self.memory.expand(x.shape[0], -1, -1)] * len(self.layers)
        slots, outputs = self.memory.shape[1], []
        for piece in x.split(self.segment, dim=1):
            for i, layer in enumerate(self.layers):
                h = layer(torch.cat([memories[i], piece], dim=1))
                memories[i], piece = h[:, :slots], h[:, slots:]
            outputs.append(piece)
        return torch.cat(outputs, dim=1)


def classic() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """For the command line: a model and its arguments."""
    torch.manual_seed(0)
    return Classic().train(), (torch.randn(1, 6 * 16, 32),)


def in_each_layer() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """For the command line: a model and its arguments."""
    torch.manual_seed(0)
    return InEachLayer().train(), (torch.randn(1, 6 * 16, 32),)


def main() -> None:
    model, args = classic()
    print("classic RMT")
    fast = rmtcompile.optimize(model)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always", rmtcompile.SequentialScheduleWarning)
        out = fast(*args)
        difference = (out - model(*args)).abs().max()
    said = next(w for w in caught if w.category is rmtcompile.SequentialScheduleWarning)
    found = fast.explain()
    print(f"  warning {str(said.message).partition(':')[0]}")
    print(f"  offsets {[offset.offset for offset in found.offsets]}")
    print(f"  plan    {found.plan}: {found.why}")
    print(f"  it still runs, with the same result: difference {difference:.0e}")
    try:
        rmtcompile.optimize(model, plan="diagonal")(*args)
    except rmtcompile.UnsupportedError as error:
        print(f"  plan='diagonal' is refused: {error.remedy}")

    model, args = in_each_layer()
    found = rmtcompile.explain(model, *args)
    print("memory in each layer")
    print(f"  offsets {[offset.offset for offset in found.offsets]}")
    print(f"  plan    {found.plan}: {found.why}")


if __name__ == "__main__":
    main()
