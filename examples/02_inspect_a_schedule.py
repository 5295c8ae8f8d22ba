"""Inspect a schedule: print it, draw it, question it, and see what other dependences would allow.

python examples/02_inspect_a_schedule.py [folder]
"""

from __future__ import annotations

import sys
from pathlib import Path

import networkx as nx
import torch
from torch import nn

import rmtcompile
from rmtcompile.passes.grid.wavefront import wavefront


class Layer(nn.Module):
    """One layer with a memory of its own: a decaying sum of what it has seen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.memory: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.memory is not None:
            x = x + self.memory
        x = x + self.down(torch.relu(self.up(x)))
        new = x.mean(1, keepdim=True)
        self.memory = new if self.memory is None else 0.9 * self.memory + new
        return x


class Model(nn.Module):
    """Walks segments in order and, in each segment, layers in order."""

    def __init__(self, n_layers: int = 4, width: int = 32, segment: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(n_layers))
        self.segment = segment

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            layer.memory = None
        outputs = []
        for piece in x.split(self.segment, dim=1):
            for layer in self.layers:
                piece = layer(piece)
            outputs.append(piece)
        return torch.cat(outputs, dim=1)


def main(folder: str | None = None) -> None:
    torch.manual_seed(0)
    fast = rmtcompile.optimize(Model())
    with torch.no_grad():
        fast(torch.randn(1, 6 * 8, 32))
    schedule = fast.schedule
    print(schedule)

    print(f"\ncell (2, 1) runs on level {schedule.level_of((2, 1))}, with {schedule.levels[3]}")
    print(f"it waits for {schedule.producers((2, 1))} and feeds {schedule.consumers((2, 1))}")
    for carry in schedule.carries:
        print(f"carried from segment to segment: {carry}")

    longest = nx.dag_longest_path_length(schedule.to_networkx()) + 1
    print(f"no order can be shorter: the longest dependence path has {longest} cells")

    print("\nwhat other dependences would allow, for 4 layers and 6 segments:")
    for offsets, words in (
        ({(0, 1), (1, 0)}, "each layer reads its own memory"),
        ({(0, 1), (1, -1)}, "each layer reads the memory of the layer above"),
        ({(0, 1), (2, 0)}, "memory is two segments old"),
        ({(0, 1), (1, -3)}, "layer 0 reads the memory of the top layer"),
    ):
        other = wavefront(offsets, 4, 6)
        print(f"  {words:<48} level {other.level_rule:<6} {other.n_levels:>2} levels, width {other.width}")

    if folder is not None:
        for name in ("schedule.svg", "schedule.json", "schedule.trace.json", "schedule.dot"):
            print(f"wrote {schedule.save(Path(folder) / name)}")
        print(f"wrote {fast.view(Path(folder) / 'viewer.html')}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
