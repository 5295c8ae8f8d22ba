"""passes/cell/padded, runtime/padded.py: last blocks with cells at the size of a whole segment. Recordings
are played by hand here; those of CUDA are tested in test_cuda.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import toys
from test_blocks import LONG, Player, blocks_for
from test_end_to_end import armt, ids
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Toy, assert_same, features, made

import rmtcompile
from rmtcompile.compiler.free_sizes import instance
from rmtcompile.compiler.results import value_of
from rmtcompile.runtime import recorded
from rmtcompile.runtime.engine import Engine
from rmtcompile.runtime.padded import PaddedBlocks

pytestmark = pytest.mark.filterwarnings("ignore::rmtcompile.SequentialScheduleWarning")


def padded_for(fast: Any, whole: int, x: Tensor) -> tuple[Any, PaddedBlocks]:
    """Recordings of the program of rules that has run last, and of its last blocks."""
    entry = fast._last[0]
    padding = entry.compiled.emitted.padding
    assert not padding.obstacle, padding.obstacle
    owner, blocks = blocks_for(fast, x, Player(), has_ends=False)
    compiled = instance(entry.trial.rules.compiled, {**entry.compiled.sizes, padding.rest: whole})
    engine = Engine(compiled.program, "eager", keeps_buffers=True)
    engine.share_buffers(blocks.engine)  # type: ignore[arg-type]
    padded = PaddedBlocks(blocks, compiled, engine)
    padded.warm_up()
    padded.record_all()
    blocks.padded = padded
    return owner, padded


def ending_of(executor: Any, blocks: Any) -> recorded.Ending:
    engine = Engine(executor.program, "eager", keeps_buffers=False)
    engine.share_buffers(blocks.engine)
    compiled = executor.compiled
    return recorded.Ending(executor.program, compiled.namespace, engine, compiled.sizes)


def check(
    model: nn.Module,
    whole: int,
    input_of: Callable[[int, int], Tensor],
    learnt: tuple[int, int] = (3, 2),
    rests: tuple[int, ...] = (5, 4, 1, 5),
    segments: tuple[int, ...] = (1, 2, 3, 6, 7, 19, 27),
) -> Any:
    """Rules of two rests; texts of other rests and of all lengths are replayed as the model runs them."""
    fast = rmtcompile.optimize(model)
    for rest in learnt:
        fast(input_of(8, rest))
    owner, padded = padded_for(fast, whole, input_of(8, learnt[-1]))
    before = padded.device.recorded  # type: ignore[attr-defined]
    for rest in rests:
        fast(input_of(8, rest))
        executor = fast._last[0].executor
        assert executor.compiled.emitted is owner.compiled.emitted
        ending = ending_of(executor, padded)
        for count in segments:
            x = input_of(count, rest)
            for place in padded.places.values():  # what stands behind a rest is of no use, whatever it is
                place.fill_(torch.nan if place.is_floating_point() else 1)
            outputs = padded.others.run(count + 1, {fast.compiled.input_names[0]: x}, ending)
            if count + 1 < executor.program.rolled.minimum:
                continue
            assert outputs is not None, (rest, count)
            expected = value_of(fast.compiled.result, outputs, count + 1)
            assert_same(model(x), expected)
    assert padded.device.recorded == before  # type: ignore[attr-defined]
    return fast


@pytest.mark.parametrize("build", [Toy, lambda: Toy(3, up=-1), lambda: Toy(2, back=2)])
@torch.no_grad()
def test_any_rest_is_replayed(build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toys, "SEGMENT", LONG)
    text = features(LONG * 28)
    check(made(build), LONG, lambda segments, rest: text[:, : segments * LONG + rest])


@torch.no_grad()
def test_an_armt() -> None:
    model = armt("llama", torch.float64, n_layers=3)
    text = ids(28)
    length = text.shape[1] // 28
    fast = check(
        model, length, lambda segments, rest: text[:, : segments * length + rest], rests=(length - 1, 1, 4)
    )
    assert "run.remainder" in fast.code


class Layer(nn.Module):
    """A layer with one operation along the positions of a segment, and a memory of sums."""

    def __init__(self, mix: Callable[[Any, Tensor], Tensor], width: int = 4) -> None:
        super().__init__()
        self.mix, self.out = mix, nn.Linear(width, width)
        self.conv = nn.Conv1d(width, width, 3, padding=2)
        self.register_buffer("prompt", torch.linspace(-1, 1, 2 * width).view(1, 2, width))

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self.mix(self, x + memory[:, None])
        x = torch.tanh(self.out(mixed.expand_as(x))) + x
        return x, memory + 0.1 * x.sum(1)


def _attend(self: Any, x: Tensor, **options: Any) -> Tensor:
    q = x[:, None]
    return F.scaled_dot_product_attention(q, q, q * 2, **options)[:, 0]


def _with_prompt(self: Any, x: Tensor, *, behind: bool) -> Tensor:
    prompt = self.prompt.expand(x.shape[0], -1, -1)
    y = torch.cat([x, prompt] if behind else [prompt, x], 1)
    y = F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None], is_causal=True)[:, 0]
    return y[:, -2:].mean(1, keepdim=True) + (y[:, :-2] if behind else y[:, 2:])


def _twice(self: Any, x: Tensor) -> Tensor:
    y = torch.cat([x, self.prompt.expand(x.shape[0], -1, -1), x * 2], 1)
    return torch.softmax(y, 1)[:, : x.shape[1]] + y[:, -x.shape[1] :]


MIXES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mean": lambda self, x: x.mean(1, keepdim=True),
    "mean of all": lambda self, x: x.mean((1, 2), keepdim=True),
    "sum by hand": lambda self, x: x.sum(1, keepdim=True) / x.shape[1],
    "largest": lambda self, x: x.amax(1, keepdim=True) + x.min(1, keepdim=True).values,
    "softmax": lambda self, x: torch.softmax(x, 1) * x + x.logsumexp(1, keepdim=True),
    "norm": lambda self, x: F.normalize(x, dim=1) + x.norm(dim=1, keepdim=True),
    "any, all": lambda self, x: x * (x > 2).any(1, keepdim=True) - (x > -3).all(1, keepdim=True) * x,
    "cumsum": lambda self, x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None],
    "last": lambda self, x: x[:, -1:] + x[:, 0, None] + x[:, -1, None],
    "tail": lambda self, x: x - x[:, -1:].mean(1, keepdim=True),
    "scores": lambda self, x: torch.softmax(x @ x.mT, -1) @ x,
    "linear attention": lambda self, x: x @ (x.mT @ x),
    "einsum": lambda self, x: torch.einsum("btd,bsd->bts", x, x) @ x + torch.einsum("btd->bd", x)[:, None],
    "attention": _attend,
    "causal attention": partial(_attend, is_causal=True),
    "prompt behind": partial(_with_prompt, behind=True),
    "prompt in front": partial(_with_prompt, behind=False),
    "twice": _twice,
    "triangle": lambda self, x: (x @ x.mT).tril() @ x,
    "convolution": lambda self, x: self.conv(x.mT)[..., : x.shape[1]].mT,
    "shifted": lambda self, x: F.pad(x, (0, 0, 1, 0))[:, :-1] - x,
    "padded": lambda self, x: F.pad(x, (0, 0, 1, 1))[:, 1:-1] + x,
    "lookup": lambda self, x: F.embedding(x.argmax(-1), self.out.weight) + x.argmax(1, keepdim=True),
    "indexed": lambda self, x: x[:, torch.tensor([-1, 0, -1])].sum(1, keepdim=True),
    "gathered": lambda self, x: x.gather(1, x.argmax(1, keepdim=True)) + x.gather(2, x.argsort(-1)),
}


class Mixing(nn.Module):
    def __init__(self, mix: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(mix) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        memories, out = [x.new_zeros(x.shape[0], x.shape[2])] * len(self.layers), []
        for h in x.split(LONG, 1):
            for i, layer in enumerate(self.layers):
                h, memories[i] = layer(h, memories[i])
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", MIXES)
@torch.no_grad()
def test_operations_along_a_rest(name: str, batch: int) -> None:
    text = torch.randn(batch, LONG * 28, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check(
        made(lambda: Mixing(MIXES[name])), LONG, lambda segments, rest: text[:, : segments * LONG + rest],
        rests=(5, 4, 1), segments=(1, 3, 9),
    )  # fmt: skip


@torch.no_grad()
def test_a_rest_with_fewer_positions_than_are_read_is_launched() -> None:
    """The last three of two are two: such a rest is another program by shape, and runs launched."""
    model = made(lambda: Mixing(lambda self, x: x[:, -3:].mean(1, keepdim=True) + x[:, :2].sum(1)[:, None]))
    text = features(LONG * 10)
    fast = rmtcompile.optimize(model)
    for rest in (4, 5):
        fast(text[:, : 8 * LONG + rest])
    _, padded = padded_for(fast, LONG, text[:, : 8 * LONG + 5])
    assert padded.padding.least == 3
    for rest in (1, 2, 3, 4, 5):
        x = text[:, : 8 * LONG + rest]
        assert_same(model(x), fast(x))
        executor = fast._last[0].executor  # type: ignore[index]
        if executor.compiled.emitted is padded.compiled.emitted:
            ending = ending_of(executor, padded)
            assert padded.has(padded._cut(9)[-1], ending) == (rest >= 3)
            outputs = padded.others.run(9, {fast.compiled.input_names[0]: x}, ending)
            assert_same(model(x), value_of(fast.compiled.result, outputs, 9))


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "flip": (lambda self, x: x.flip(1), "works along a dim that depends on the rest: flip"),
    "roll": (lambda self, x: x.roll(1, 1), "works along a dim that depends on the rest: roll"),
    "sort": (lambda self, x: x.sort(1).values, "works along a dim that depends on the rest: sort"),
    "joined": (lambda self, x: x.flatten(1).cumsum(1).view(x.shape), "is joined with another one, or split"),
    "second": (lambda self, x: x + x[:, ::2].mean(1, keepdim=True), "a dim that depends on the rest"),
    "reflected": (lambda self, x: F.pad(x.mT, (1, 1), mode="reflect")[..., 1:-1].mT, "is no rule for it"),
    "variance": (lambda self, x: x / x.var(1, keepdim=True), "along a dim that depends on the rest: var"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_what_has_no_padded_form_is_said(name: str) -> None:
    """And runs as it did."""
    mix, wanted = REFUSED[name]
    model = made(lambda: Mixing(mix))
    fast = rmtcompile.optimize(model)
    text = features(LONG * 6)
    for rest in (4, 2, 5):
        x = text[:, : 4 * LONG + rest]
        assert_same(model(x), fast(x))
    padding = fast._last[0].compiled.emitted.padding  # type: ignore[index]
    assert wanted in padding.obstacle and "test_padded.py:" in padding.obstacle, padding.obstacle
    assert "run.remainder" not in fast.code
