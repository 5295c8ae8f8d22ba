"""Stacked recurrent cells looped over in Python: a segment is one time step.

Every model maps features f[B, T, D] to features f[B, T, D].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TimeMajorGRU(nn.Module):
    """For each step, all cells: the order in which segment loops are usually written."""

    def __init__(self, d: int = 8, n_layers: int = 4) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.GRUCell(d, d) for _ in range(n_layers))
        self.out = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        h = [x.new_zeros(x.shape[0], x.shape[2]) for _ in self.cells]
        out = []
        for t in range(x.shape[1]):
            step = x[:, t]
            for i, cell in enumerate(self.cells):
                h[i] = cell(step, h[i])
                step = h[i]
            out.append(self.out(step))
        return torch.stack(out, 1)


class LayerMajorLSTM(nn.Module):
    """For each cell, all steps: the same dependences, walked the other way round."""

    def __init__(self, d: int = 8, n_layers: int = 4) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.LSTMCell(d, d) for _ in range(n_layers))
        self.out = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        steps = list(x.unbind(1))
        for cell in self.cells:
            h = c = torch.zeros_like(steps[0])
            for t, step in enumerate(steps):
                h, c = cell(step, (h, c))
                steps[t] = h
        return self.out(torch.stack(steps, 1))


class ResidualGRU(nn.Module):
    """Time-major with residual connections and a norm, one learned start for each cell."""

    def __init__(self, d: int = 8, n_layers: int = 5) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(n_layers))
        self.cells = nn.ModuleList(nn.GRUCell(d, d) for _ in range(n_layers))
        self.start = nn.Parameter(torch.randn(n_layers, d))

    def forward(self, x: Tensor) -> Tensor:
        h = list(self.start[:, None].expand(-1, x.shape[0], -1))
        out = []
        for step in x.unbind(1):
            for i, (norm, cell) in enumerate(zip(self.norms, self.cells)):
                h[i] = cell(norm(step), h[i])
                step = step + h[i]
            out.append(step)
        return torch.stack(out, 1)
