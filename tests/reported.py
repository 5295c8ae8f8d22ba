"""Small recurrent models for the tests of what is shown: they are captured in about a second."""

from __future__ import annotations

import torch
from torch import nn

WIDTH, SEGMENT = 8, 4


class Layer(nn.Module):
    """A residual layer whose memory is a decaying sum."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.memory: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.memory is not None:
            x = x + self.memory
        x = x + torch.relu(self.up(x))
        new = x.mean(1, keepdim=True)
        self.memory = new if self.memory is None else 0.5 * self.memory + new
        return x


class Own(nn.Module):
    """Each layer reads its own memory."""

    def __init__(self, n_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(n_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            layer.memory = None
        outputs = []
        for piece in x.split(SEGMENT, dim=1):
            piece = piece * torch.arange(1, WIDTH + 1).to(x.dtype).rsqrt()
            for layer in self.layers:
                piece = layer(piece)
            outputs.append(piece)
        return torch.cat(outputs, dim=1)


class Plain(nn.Module):
    """A layer without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.memory: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.up(x))


class Mixed(Own):
    """Layers of two kinds, of which one remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1] = Plain()


class Classic(nn.Module):
    """What the top layer makes of the memory is what the bottom layer reads next."""

    def __init__(self, n_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(n_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = torch.zeros_like(x[:, :1])
        outputs = []
        for piece in x.split(SEGMENT, dim=1):
            h = piece + memory
            for layer in self.layers:
                h = torch.tanh(layer(h))
            memory = h.mean(1, keepdim=True)
            outputs.append(h)
        return torch.cat(outputs, dim=1)


class ByValue(Own):
    """Branches on the values of a tensor, which cannot be captured."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = x.split(SEGMENT, dim=1)
        if (pieces[0] > 0).all():
            return x
        return super().forward(x)


class Whole(nn.Module):
    """No segments at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def own() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Own(), (torch.randn(1, 5 * SEGMENT, WIDTH),)


def classic() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Classic(), (torch.randn(1, 5 * SEGMENT, WIDTH),)


def whole() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Whole(), (torch.randn(1, 5 * SEGMENT, WIDTH),)


def wrong() -> int:
    return 3


def needs(size: int, *, depth: int = 2) -> int:
    return size * depth


def failing() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    raise RuntimeError("the weights are not here")
