"""Whatever a forward collects over layers and segments (auxiliary losses, statistics), and however it cuts
its input, it runs on diagonals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, assert_same, features, made

import rmtcompile
from rmtcompile.errors import RerollError


class Collecting(nn.Module):
    """Two lists of modules called in turn, the small one first; a number of each cell leaves the model."""

    def __init__(self, collect: Callable[[list[list[Tensor]]], Tensor]) -> None:
        super().__init__()
        self.collect = collect
        self.mixers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.writers = nn.ModuleList(nn.GRUCell(4, 4) for _ in range(3))

    def cut(self, x: Tensor) -> Sequence[Tensor]:
        return x.split(SEGMENT, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memories = [x.new_zeros(x.shape[0], 4) for _ in self.writers]
        out, found = [], list[list[Tensor]]()
        for h in self.cut(x):
            found.append([])
            for l, (mix, write) in enumerate(zip(self.mixers, self.writers, strict=True)):
                h = h + torch.tanh(mix(h + memories[l][:, None]))
                memories[l] = write(h.mean(1), memories[l])
                found[-1].append(h.square().mean())
            out.append(h)
        return torch.cat(out, 1), self.collect(found)


def running(found: list[list[Tensor]]) -> Tensor:
    total = found[0][0]
    for value in [v for row in found for v in row][1:]:
        total = total + value
    return total


def by_segment(found: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row).sum() for row in found])


def stacked(found: list[list[Tensor]]) -> Tensor:
    return torch.stack([v for row in found for v in row])


def joined(found: list[list[Tensor]]) -> Tensor:
    return torch.cat([v.view(1, 1) for row in found for v in row], dim=-1).logsumexp(-1)


def by_layer(found: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(column).mean() for column in zip(*found, strict=True)])


@pytest.mark.parametrize("collect", [running, by_segment, stacked, joined, by_layer])
def test_a_number_of_each_cell(collect: Callable[[list[list[Tensor]]], Tensor]) -> None:
    model = made(lambda: Collecting(collect))
    fast = rmtcompile.optimize(model)
    for segments in (5, 3, 7, 1):
        x = features(segments)
        assert_same(model(x), fast(x))
        assert (fast.schedule.width, fast.schedule.level_rule) == (min(segments, 3), "s + l")
    assert fast.captures <= 2  # one more where a single segment has nothing to add up
    x = features(4).requires_grad_()
    gradients = [torch.autograd.grad(f(x)[1].sum(), [x, *model.parameters()], allow_unused=True)
                 for f in (model, fast)]  # fmt: skip
    assert_same(*gradients)


def per_value(found: list[list[Tensor]]) -> Tensor:
    return running(found) / (7 * len(found) + 2)  # a step that is no length of a segment


def squared(found: list[list[Tensor]]) -> Tensor:
    return running(found) / len(found) ** 2


@pytest.mark.parametrize(("collect", "is_even"), [(per_value, True), (squared, False)])
def test_a_number_of_the_segments(collect: Callable[[list[list[Tensor]]], Tensor], is_even: bool) -> None:
    model = made(lambda: Collecting(collect))
    fast = rmtcompile.optimize(model)
    if not is_even:
        with pytest.raises(RerollError, match="an integer in epilogue"):
            fast.run(features(6))
    for segments in (6, 3, 9):
        assert_same(model(features(segments)), fast(features(segments)))


def listed(x: Tensor) -> Sequence[Tensor]:
    whole, rest = divmod(x.shape[1], SEGMENT)
    return x.split([SEGMENT] * whole + [rest] * (rest > 0), 1)


def at_indices(x: Tensor) -> Sequence[Tensor]:
    return x.tensor_split(list(range(SEGMENT, x.shape[1], SEGMENT)), -2)


def by_name(x: Tensor) -> Sequence[Tensor]:
    return torch.hsplit(x, list(range(SEGMENT, x.shape[1], SEGMENT)))


def into_sections(x: Tensor) -> Sequence[Tensor]:
    return torch.tensor_split(x, -(-x.shape[1] // SEGMENT), 1)


def in_chunks(x: Tensor) -> Sequence[Tensor]:
    return x.chunk(-(-x.shape[1] // SEGMENT), 1)


def as_view(x: Tensor) -> Sequence[Tensor]:
    return x.unflatten(1, (-1, SEGMENT)).unbind(1)


def eaten_up(x: Tensor) -> Sequence[Tensor]:
    pieces = []
    while x.shape[1]:
        pieces.append(x[:, :SEGMENT])
        x = x[:, SEGMENT:]
    return pieces


@pytest.mark.parametrize("cut", [listed, at_indices, by_name, into_sections, in_chunks, as_view, eaten_up])
@pytest.mark.parametrize("first", [5, 2])
def test_ways_to_cut(cut: Callable[[Tensor], Sequence[Tensor]], first: int) -> None:
    model = made(lambda: Collecting(stacked))
    model.cut = cut
    fast = rmtcompile.optimize(model)
    for segments in (first, 1, 3, 7):
        assert_same(model(features(segments)), fast(features(segments)))
    assert fast.captures == 1
    # A shorter last segment has a program of its own, whatever came first. These two have pieces as equal as
    # they can be, and whole segments alone.
    if first == 5 and cut not in (into_sections, as_view):
        for segments in (2, 4):
            x = features(segments)[:, :-1]
            assert_same(model(x), fast(x))


class Bank(nn.Module):
    """The last two summaries of each layer in one tensor that is rolled once a segment. What the layer above
    asks the bank with is dead code in the top layer, what goes into it in the last segment."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bank, out = x.new_zeros(3, x.shape[0], 2, 4), []
        for h in x.split(SEGMENT, 1):
            new = []
            for l, layer in enumerate(self.layers):
                found = torch.softmax(h.mean(1, keepdim=True) @ bank[l].mT, -1) @ bank[l]
                h = h + torch.tanh(layer(h) + found)
                new.append(h.mean(1))
            bank = bank.roll(-1, 2)
            bank[:, :, -1] = torch.stack(new)
            out.append(h)
        return torch.cat(out, 1), bank


def test_a_bank_of_summaries() -> None:
    model = made(Bank)
    fast = rmtcompile.optimize(model)
    for segments in (5, 2, 8):
        x = features(segments)
        assert_same(model(x), fast(x))
        assert fast.schedule.level_rule == "s + l"


class Counting(nn.Module):
    """A tensor that counts segments, in one of several ways, and divides what a layer remembers."""

    def __init__(self, count: Callable[[Tensor, int, Tensor], Tensor], before: bool) -> None:
        super().__init__()
        self.count, self.before = count, before
        self.rate = nn.Parameter(torch.rand(()))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memories = [x.new_zeros(x.shape[0], 4) for _ in self.layers]
        n, out = torch.ones((), dtype=x.dtype), []
        for h in x.split(SEGMENT, 1):
            if self.before:
                n = self.count(n, h.shape[1], self.rate)
            for l, layer in enumerate(self.layers):
                h = torch.tanh(layer(h) + (memories[l] / n)[:, None])
                memories[l] = memories[l] + h.mean(1)
            if not self.before:
                n = self.count(n, h.shape[1], self.rate)
            out.append(h)
        return torch.cat(out, 1), n


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "count",
    [lambda n, t, rate: n + t, lambda n, t, rate: 0.9 * n + 0.1 * t, lambda n, t, rate: n * rate],
    ids=["tokens", "average", "learnt"],
)
def test_counters(count: Callable[[Tensor, int, Tensor], Tensor], before: bool) -> None:
    model = made(lambda: Counting(count, before))
    fast = rmtcompile.optimize(model)
    for segments in (5, 2, 8):
        x = features(segments)
        assert_same(model(x), fast(x))
        assert_same(model(x[:, :-1]), fast(x[:, :-1]))
    assert fast.schedule.level_rule == "s + l"


class Ends(nn.Module):
    """What writes the memory is dead in the last segment, whose cells end before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.writers = nn.ModuleList(nn.GRUCell(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        memories, out = [x.new_zeros(x.shape[0], 4) for _ in self.layers], []
        for first in x.split(SEGMENT, 1):
            h = first
            for l, (layer, write) in enumerate(zip(self.layers, self.writers, strict=True)):
                m = memories[l]
                h = h + torch.softmax(layer(h) @ m[:, :, None], 1) * m[:, None]
                memories[l] = write(h.mean(1), torch.tanh(layer(m)))
                h = h + 0.1 * first
            out.append(h)
        return torch.cat(out, 1)


class Unread(nn.Module):
    """A memory that nothing reads, written by layers that are called once more for it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        unread, out = x.new_zeros(x.shape[0], 4), []
        for h in x.split(SEGMENT, 1):
            for layer in self.layers:
                h = h + torch.tanh(layer(h))
                unread = unread + layer(h).amax(1)
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize("build", [Ends, Unread])
def test_dead_cells(build: Callable[[], nn.Module]) -> None:
    model = made(build)
    fast = rmtcompile.optimize(model)
    for segments in (4, 1, 2, 7):
        x = features(segments)
        assert_same(model(x), fast(x))
        assert_same(model(x[:, :-1]), fast(x[:, :-1]))


class DeltaLayer(nn.Module):
    """What the last segment would leave is dead code there, and has products like the one that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.queries, self.values = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, h: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        k = self.keys(h).softmax(-1)
        return h + self.queries(h) @ memory, memory + k.mT @ (self.values(h) - k @ memory)


class DeltaRule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeltaLayer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        memory = [x.new_zeros(x.shape[0], WIDTH, WIDTH) for _ in self.layers]
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, memory[l] = layer(h, memory[l])
            out.append(h)
        return torch.cat(out, 1)


@torch.no_grad()
def test_dead_writes_are_told_apart_by_their_weights() -> None:
    """The last segment is one like the others: a text in parts waits for nothing."""
    model = made(DeltaRule)
    fast = rmtcompile.optimize(model)
    x = features(4)
    first, state = fast.run(x[:, : 2 * SEGMENT])
    assert state.pending_tokens == 0
    second, _ = fast.run(x[:, 2 * SEGMENT :], state=state)
    assert_same(model(x), torch.cat([first, second], 1))
