"""Carries that grow: caches of the keys and values of all earlier segments, and lists of memories."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, Layer, assert_same, features, made

import rmtcompile
from rmtcompile import RerollError
from rmtcompile.passes.cell.lift import grouped_attention
from rmtcompile.passes.cell.lift.growing import _closed

HEADS = 2
Cache = tuple[Tensor, Tensor] | None


class Attention(nn.Module):
    """A layer over a segment and the keys and values of all earlier ones: (x, cache) -> (x', cache').

    Grouped-query attention with rotary positions counted from the start of the text.
    """

    def __init__(self, d: int = WIDTH) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(d, 2 * HEADS * d), nn.Linear(d, HEADS * d), nn.Linear(d, HEADS * d)
        self.out, self.mlp = nn.Linear(2 * HEADS * d, d), nn.Linear(d, d)

    def forward(self, x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        past = 0 if cache is None else cache[0].shape[2]
        q, k, v = (m(x).unflatten(-1, (-1, x.shape[-1])).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = self.turned(q, past), self.turned(k, past)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        y = self.attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + torch.tanh(self.mlp(x)), (k, v)

    def turned(self, x: Tensor, past: int) -> Tensor:
        angle = 0.1 * torch.arange(past, past + x.shape[2], dtype=x.dtype, device=x.device)[:, None]
        (one, other), c, s = x.chunk(2, -1), angle.cos(), angle.sin()
        return torch.cat([one * c - other * s, other * c + one * s], -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, m = q.shape[2], k.shape[2]
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        return F.scaled_dot_product_attention(q, k, v, mask)


class Compared(Attention):
    """Its mask compares positions."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, m = q.shape[2], k.shape[2]
        columns = torch.arange(m, device=q.device)
        return F.scaled_dot_product_attention(q, k, v, (columns <= columns[m - n :, None])[None, None])


class Added(Attention):
    """Its mask is added to the scores."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, m = q.shape[2], k.shape[2]
        mask = torch.full((n, m), -math.inf, dtype=q.dtype, device=q.device).triu(m - n + 1)
        return F.scaled_dot_product_attention(q, k, v, mask)


class Open(Attention):
    """Without a mask, each position sees the whole segment."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Written(Attention):
    """Attention written out, over a view of the cache whose sizes the code says."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, n, m = *q.shape[:3], k.shape[2]
        scores = q @ k.reshape(b, h, m, -1).transpose(-1, -2) / math.sqrt(q.shape[-1])
        columns = torch.arange(m, device=q.device)
        later = columns > torch.arange(m - n, m, device=q.device)[:, None]
        return scores.masked_fill(later, -math.inf).softmax(-1) @ v.view(b, h, m, -1)


class Memories(nn.Module):
    """A layer that attends to a list of memories, one of each earlier segment."""

    def __init__(self, d: int = WIDTH) -> None:
        super().__init__()
        self.q, self.m, self.mlp = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: Tensor, memories: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        memories = memories or []
        if memories:
            kept = torch.stack(memories, 1)
            x = x + F.scaled_dot_product_attention(self.q(x), kept, kept)
        x = x + torch.tanh(self.mlp(x))
        return x, [*memories, self.m(x.mean(1))]


class Lists(Attention):
    """Keys and values in lists, joined whenever they are read."""

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        keys, values = cache or ([], [])
        q, k, v = (m(x).unflatten(-1, (-1, x.shape[-1])).transpose(1, 2) for m in (self.q, self.k, self.v))
        keys, values = [*keys, k], [*values, v]
        k, v = torch.cat(keys, 2), torch.cat(values, 2)
        y = self.attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        return x + self.out(y.transpose(1, 2).flatten(2)), (keys, values)


class Mean(nn.Module):
    """A layer that reads the mean of all it has seen: no attention."""

    def __init__(self, d: int = WIDTH) -> None:
        super().__init__()
        self.inner = Layer(d)

    def forward(self, x: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        seen = x if seen is None else torch.cat([seen, x], 1)
        return self.inner(x, seen.mean(1))[0], seen


class Recurrent(nn.Module):
    """A layer with a state of a fixed size."""

    def __init__(self, d: int = WIDTH) -> None:
        super().__init__()
        self.inner = Layer(d)

    def forward(self, x: Tensor, m: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.inner(x, x.new_zeros(x.shape[0], x.shape[2]) if m is None else m)


class Both(nn.Module):
    """A state of a fixed size and a cache in one layer."""

    def __init__(self, d: int = WIDTH) -> None:
        super().__init__()
        self.attention, self.recurrent = Compared(d), Recurrent(d)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        cache, m = state or (None, None)
        x, cache = self.attention(x, cache)
        x, m = self.recurrent(x, m)
        return x, (cache, m)


class Walk(nn.Module):
    """Layers over segments, their states in a list."""

    def __init__(self, *kinds: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for kind in kinds)

    def forward(self, x: Tensor) -> Tensor:
        states: list[Any] = [None] * len(self.layers)
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h, states[l])
            out.append(h)
        return torch.cat(out, 1)


class Attribute(nn.Module):
    """A cache in attributes of the layers' modules, which the model empties before it reads."""

    class Layer(Compared):
        cache: Cache = None

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            x, self.cache = super().forward(x, self.cache)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            layer.cache = None
        return torch.cat([self.read(h) for h in x.split(SEGMENT, 1)], 1)

    def read(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h)
        return h


MODELS: dict[str, Any] = {
    "triangle": lambda: Walk(*[Attention] * 3),
    "forms": lambda: Walk(Added, Compared, Open, Compared),
    "written": lambda: Walk(*[Written] * 2),
    "attribute": Attribute,
    "hybrid": lambda: Walk(Recurrent, Attention, Recurrent, Attention),
    "both": lambda: Walk(*[Both] * 2),
    "memories": lambda: Walk(*[Memories] * 2),
    "lists": lambda: Walk(*[Lists] * 2),
    "mean": lambda: Walk(*[Mean] * 2),
}
GROUPED = {"triangle", "forms", "attribute", "hybrid", "both", "lists"}


def model_of(name: str) -> nn.Module:
    return made(MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_equal_on_diagonals(name: str) -> None:
    model = model_of(name)
    fast = rmtcompile.optimize(model)
    with torch.no_grad():
        for count in (5, 1, 2, 3, 12, 5):
            assert_same(model(features(count)), fast(features(count)))
    assert fast.schedule.level_rule == "s + l" and fast.schedule.width == len(model.layers)
    assert ("grouped_attention(" in fast.code) == (name in GROUPED)


@pytest.mark.parametrize("name", ["forms", "written", "both", "memories"])
def test_gradients(name: str) -> None:
    model = model_of(name)
    fast = rmtcompile.optimize(model)
    x, weights = features(5).requires_grad_(), list(model.parameters())
    wanted = torch.autograd.grad(model(x).square().mean(), [x, *weights])
    found = torch.autograd.grad(fast(x).square().mean(), [x, *weights])
    assert_same(wanted, found, 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_in_bands(name: str) -> None:
    """Caches stay with their layers; masks that grow with them go from band to band."""
    model = model_of(name)
    other = copy.deepcopy(model)
    fast = rmtcompile.optimize(other, devices=["cpu", "cpu"])
    with torch.no_grad():
        for length in (15, 3, 8, 36, 16):
            x = features(12)[:, :length]
            assert_same(model(x), fast(x))
    x = features(5).requires_grad_()
    wanted, found = (
        torch.autograd.grad(call(x).square().mean(), [x, *one.parameters()], allow_unused=True)
        for call, one in ((model, model), (fast, other))
    )
    flat = (torch.cat([g.flatten() for g in grads if g is not None]) for grads in (wanted, found))
    assert_same(*flat, 1e-9)  # those of keys' biases are nothing but rounding
    assert len(fast.explain().bands) > 2 and "larger" in fast._last[0].executor.replays._found_obstacle()


@torch.no_grad()
def test_ragged_ends_and_batches() -> None:
    model = model_of("hybrid")
    fast = rmtcompile.optimize(model)
    for batch, length in ((2, 13), (2, 16), (2, 2), (3, 15), (4, 12)):
        x = features(6, batch)[:, :length]
        assert_same(model(x), fast(x))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_ragged_ends_have_rules(name: str) -> None:
    """One program for any number of segments and any rest: no length is captured by itself."""
    model = model_of(name)
    fast = rmtcompile.optimize(model)
    text = features(13)
    for length in (13, 17):
        assert_same(model(text[:, :length]), fast(text[:, :length]))
    captures = fast.captures
    for length in (10, 22, 20, 37, 16):
        assert_same(model(text[:, :length]), fast(text[:, :length]))
    assert fast.compiled.rolled.fixed is None
    assert fast.captures == captures


@torch.no_grad()
def test_with_compiled_cells() -> None:
    """Cells that work on what grows run as they are, those of the first segment are compiled."""
    model = model_of("hybrid")
    fast = rmtcompile.optimize(model, backend="aot_eager")
    assert_same(model(features(5)), fast(features(5)))


@pytest.mark.parametrize("options", [{"plan": "sequential"}, {"recompute": "level"}])
def test_options(options: dict[str, Any]) -> None:
    model = model_of("hybrid")
    fast = rmtcompile.optimize(model, **options)
    x, weights = features(5), list(model.parameters())
    result, wanted = fast(x), model(x)
    assert_same(wanted, result)
    gradients = (torch.autograd.grad(y.square().mean(), weights) for y in (wanted, result))
    assert_same(*gradients, 1e-9)


@torch.no_grad()
def test_chunked_prefill_of_a_decoder_with_its_cache() -> None:
    """A cache object of transformers, which it makes itself."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Prefill(transformers.LlamaForCausalLM(config)).double().eval()
    fast = rmtcompile.optimize(model)
    for length in (32, 4, 20):
        ids = torch.randint(32, (2, length))
        assert_same(model(ids), fast(ids))
    assert fast.schedule.level_rule == "s + l" and fast.schedule.width == 2
    assert "grouped_attention(" in fast.code


class Prefill(nn.Module):
    """A decoder that reads four tokens at a time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        cache, out = transformers.DynamicCache(), []
        for piece in ids.split(4, 1):
            result = self.model(piece, past_key_values=cache, use_cache=True)
            out.append(result.logits)
        return torch.cat(out, 1)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["hybrid", "forms", "written"])
@torch.no_grad()
def test_on_cuda(name: str, backend: str) -> None:
    """Run, recorded and replayed."""
    model = model_of(name).cuda()
    fast = rmtcompile.optimize(model, backend=backend)
    for seed in range(4):
        for count in (5, 9, 2):
            x = features(count).cuda() + seed
            assert_same(model(x), fast(x), 1e-7)


@torch.no_grad()
def test_it_is_said_what_runs_cell_by_cell() -> None:
    said = str(rmtcompile.explain(model_of("hybrid"), features(4)))
    assert "aten.cat at tests/test_growing_carries.py:" in said.replace("../", "")
    assert "on what grows with the segments" in said


@torch.no_grad()
def test_a_text_in_parts() -> None:
    model = model_of("hybrid")
    fast = rmtcompile.optimize(model)
    x = features(9)
    wanted = model(x)
    for borders in ((4, 9), (1, 3, 9)):
        state, results, start = None, [], 0
        for border in borders:
            result, state = fast.run(x[:, start * SEGMENT : border * SEGMENT], state=state)
            results.append(result)
            start = border
        assert_same(wanted, torch.cat(results, 1))


@torch.no_grad()
def test_parts_that_end_within_a_segment() -> None:
    model = model_of("hybrid")
    fast = rmtcompile.optimize(model)
    x = features(8)
    first, state = fast.run(x[:, :13])
    second, state = fast.run(x[:, 13:], state=state)
    assert_same(model(x), torch.cat([first[:, :12], second], 1))


class Numbered(nn.Module):
    """A model whose layers are told the number of the segment, and add it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        states, out = [x.new_zeros(x.shape[0], x.shape[2])] * 2, []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h, states[l] + s)
            out.append(h)
        return torch.cat(out, 1)


class Inside(Numbered):
    """The same inside of the layers."""

    class Layer(Layer):
        def forward(self, x: Tensor, m: Tensor, s: int = 0) -> tuple[Tensor, Tensor]:
            x, m = super().forward(x, m)
            return x * (2 * s + 1), m - s

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        states, out = [x.new_zeros(x.shape[0], x.shape[2])] * 2, []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h, states[l], s)
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize("kind", [Numbered, Inside])
@torch.no_grad()
def test_integers_of_the_segment(kind: type[nn.Module]) -> None:
    """An integer that counts segments is that of each cell's own segment."""
    model = made(kind)
    fast = rmtcompile.optimize(model)
    for count in (5, 9, 2):
        assert_same(model(features(count)), fast(features(count)))
    assert fast.schedule.level_rule == "s + l"
    first, state = fast.run(features(9)[:, : 4 * SEGMENT])
    second, _ = fast.run(features(9)[:, 4 * SEGMENT :], state=state)
    done = 4 * SEGMENT - state.pending_tokens
    assert_same(model(features(9)), torch.cat([first[:, :done], second], 1))


class Doubles(Mean):
    """What it keeps doubles with every segment."""

    def forward(self, x: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        seen = x if seen is None else torch.cat([seen, seen], 1)
        return self.inner(x, seen.mean(1))[0], seen


class Squared(Mean):
    """The code says a size that grows with the square of the segment."""

    def forward(self, x: Tensor, seen: Any) -> tuple[Tensor, Any]:
        seen = x if seen is None else torch.cat([seen, x], 1)
        table = seen.repeat(1, seen.shape[1], 1)
        return self.inner(x, table.narrow(1, 0, seen.shape[1] ** 2).mean(1))[0], seen


@pytest.mark.parametrize("kind", [Doubles, Squared])
@torch.no_grad()
def test_what_does_not_grow_evenly_has_no_rules(kind: type[nn.Module]) -> None:
    model = made(lambda: Walk(kind, kind))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    with pytest.raises(RerollError) as caught:
        fast.run(features(5))
    assert "test_growing_carries.py:" in str(caught.value)
    assert_same(model(features(5)), fast(features(5)))


class Reversed(Attention):
    """What was read first stands last: the cache grows at its front."""

    def forward(self, x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        q, k, v = (m(x).unflatten(-1, (-1, x.shape[-1])).transpose(1, 2) for m in (self.q, self.k, self.v))
        if cache is not None:
            k, v = torch.cat([k, cache[0]], 2), torch.cat([v, cache[1]], 2)
        n, m = q.shape[2], k.shape[2]
        weights = torch.arange(m, dtype=x.dtype)[None] - torch.arange(n, dtype=x.dtype)[:, None]
        y = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), weights)
        return x + self.out(y.transpose(1, 2).flatten(2)), (k, v)


@torch.no_grad()
def test_what_grows_at_its_front() -> None:
    """Each cell's operations run at its own size, wherever that grows."""
    model = made(lambda: Walk(Reversed, Reversed))
    fast = rmtcompile.optimize(model)
    for count in (5, 9):
        assert_same(model(features(count)), fast(features(count)))


@torch.no_grad()
def test_carries_of_one_size_are_none() -> None:
    fast = rmtcompile.optimize(made(lambda: Walk(Recurrent, Recurrent)))
    fast(features(5))
    assert "each_cell" not in fast.code and not any(lane.grows for lane in lanes_of(fast))


@torch.no_grad()
def test_the_dims_that_grow_are_known() -> None:
    fast = rmtcompile.optimize(model_of("hybrid"))
    fast(features(5))
    grown = {(lane.grows, len(lane.shape)) for lane in lanes_of(fast) if lane.grows}
    assert grown == {((2,), 4), ((1,), 2)}  # keys and values along positions, masks along columns


def lanes_of(fast: Any) -> Any:
    return fast._last[0].compiled.program.lanes


def test_masks_are_closed_behind_the_columns_that_there_are() -> None:
    assert _closed(torch.ones(2, 3, dtype=torch.bool), 3, 5).tolist() == [[True] * 3 + [False] * 2] * 2
    assert _closed(torch.zeros(2, 1), 3, 4)[0].tolist() == [0, 0, 0, -math.inf]


@pytest.mark.parametrize("counts", [(3, 3, 3), (2, 5, 7), (8, 4, 6), (5,)])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "added", "one column"])
def test_grouped_attention_of_any_counts(kind: str, counts: tuple[int, ...]) -> None:
    """As cell by cell, also where there are fewer keys than queries."""
    causal = kind == "causal"
    torch.manual_seed(0)
    query = torch.randn(len(counts), 2, 4, 4, 8, dtype=torch.float64)
    keys, values = (
        tuple(torch.randn(2, 2, count, 8, dtype=torch.float64) for count in counts) for _ in range(2)
    )
    masks: Any = None
    if kind == "bool":
        masks = tuple(torch.rand(4, 4, count) > 0.3 for count in counts)
        masks = tuple(mask | (torch.arange(mask.shape[-1]) == 0) for mask in masks)
    elif kind == "added":
        masks = tuple(torch.randn(2, 1, 4, count, dtype=torch.float64) for count in counts)
    elif kind == "one column":
        masks = torch.randn(len(counts), 4, 1, dtype=torch.float64)
    got = grouped_attention(query, keys, values, masks, is_causal=causal, enable_gqa=True)
    for i in range(len(counts)):
        mask = None if masks is None else masks[i]
        expected = F.scaled_dot_product_attention(
            query[i], keys[i], values[i], mask, is_causal=causal, enable_gqa=True
        )
        assert_same(expected, got[i], 1e-12)
