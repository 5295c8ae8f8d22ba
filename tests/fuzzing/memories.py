"""What a layer keeps from segment to segment: a dict of tensors, read into x and written from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fuzzing.operations import WIDTH

State = dict[str, Tensor]


class Vector(nn.Module):
    """A mean that fades: f[B, D]. The others override what is theirs."""

    fixed = True
    """Whether the shapes are the same in all segments."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.start = nn.Parameter(torch.randn(WIDTH))

    def zeros(self, x: Tensor) -> State:
        return {"m": x.new_zeros(x.shape[0], WIDTH)}

    def learned(self, x: Tensor) -> State:
        return {name: value + self.start for name, value in self.zeros(x).items()}

    def read(self, x: Tensor, state: State) -> Tensor:
        return x + torch.tanh(self.q(state["m"]))[:, None]

    def write(self, x: Tensor, state: State) -> State:
        return {"m": 0.5 * state["m"] + torch.tanh(self.k(x)).mean(1)}


class Gated(Vector):
    """A gated recurrence over segments."""

    def write(self, x: Tensor, state: State) -> State:
        new, gate = self.k(x).mean(1).tanh(), torch.sigmoid(self.v(state["m"]) + x[:, -1])
        return {"m": gate * state["m"] + (1 - gate) * new}


class Largest(Vector):
    """The largest value so far."""

    def write(self, x: Tensor, state: State) -> State:
        return {"m": torch.maximum(state["m"], self.k(x).amax(1))}


class Counting(Vector):
    """A mean over all segments, and how many there were."""

    def zeros(self, x: Tensor) -> State:
        return {"m": x.new_zeros(x.shape[0], WIDTH), "n": x.new_zeros(x.shape[0], 1)}

    def write(self, x: Tensor, state: State) -> State:
        n = state["n"] + 1
        return {"m": state["m"] + (torch.tanh(x).mean(1) - state["m"]) / n, "n": n}

    def learned(self, x: Tensor) -> State:
        return self.zeros(x)


class Positions(Vector):
    """Walks the positions of the segment one by one."""

    def write(self, x: Tensor, state: State) -> State:
        m = state["m"]
        for t in range(x.shape[1]):
            m = torch.tanh(self.k(x[:, t]) + self.v(m))
        return {"m": m}


class Associative(Vector):
    """ARMT's: a matrix f[B, D, D] and its normaliser f[B, 1, D]."""

    def zeros(self, x: Tensor) -> State:
        return {"A": x.new_zeros(x.shape[0], WIDTH, WIDTH), "z": x.new_zeros(x.shape[0], 1, WIDTH)}

    def read(self, x: Tensor, state: State) -> Tensor:
        q = self.q(x).softmax(-1)
        return x + q @ state["A"] / (1 + (q * state["z"]).sum(-1, keepdim=True))

    def write(self, x: Tensor, state: State) -> State:
        k = self.k(x[:, -2:]).softmax(-1)
        value = self.v(x[:, -2:]) - k @ state["A"]
        return {"A": state["A"] + k.mT @ value, "z": state["z"] + k.sum(1, keepdim=True)}


class Tokens(Vector):
    """The last two positions of the segment before: f[B, 2, D]."""

    def zeros(self, x: Tensor) -> State:
        return {"t": x.new_zeros(x.shape[0], 2, WIDTH)}

    def read(self, x: Tensor, state: State) -> Tensor:
        keys = torch.cat([state["t"], self.k(x)], 1)
        return x + (self.q(x) @ keys.mT).softmax(-1) @ keys

    def write(self, x: Tensor, state: State) -> State:
        return {"t": torch.tanh(self.k(x[:, -2:]))}


class Window(Tokens):
    """The last four positions, of this and earlier segments."""

    def zeros(self, x: Tensor) -> State:
        return {"t": x.new_zeros(x.shape[0], 4, WIDTH)}

    def write(self, x: Tensor, state: State) -> State:
        return {"t": torch.cat([state["t"], torch.tanh(self.k(x))], 1)[:, -4:]}


class Cache(Tokens):
    """Keys of all earlier segments: it grows."""

    fixed = False

    def zeros(self, x: Tensor) -> State:
        return {"t": x.new_zeros(x.shape[0], 0, WIDTH)}

    def write(self, x: Tensor, state: State) -> State:
        return {"t": torch.cat([state["t"], torch.tanh(self.k(x))], 1)}


class Summaries(Cache):
    """One vector of each earlier segment: it grows by one."""

    def write(self, x: Tensor, state: State) -> State:
        return {"t": torch.cat([state["t"], torch.tanh(self.k(x)).mean(1, keepdim=True)], 1)}


MEMORIES: dict[str, type[Vector]] = {
    "vector": Vector,
    "gated": Gated,
    "largest": Largest,
    "counting": Counting,
    "positions": Positions,
    "associative": Associative,
    "tokens": Tokens,
    "window": Window,
    "cache": Cache,
    "summaries": Summaries,
}
