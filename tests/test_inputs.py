"""What callers pass and what they get back: masks, labels, embeddings, positions, structure and keys."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, make_dataclass
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from test_end_to_end import CELL, SHAPE, ids
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from toys import SEGMENT, WIDTH, Layer, assert_same, features, made
from transformers.utils import ModelOutput

import rmtcompile
from rmtcompile.models import build

SEGMENTS = (3, 1, 2, 5)
"""Compiled on the first; with three layers these are S = L, S = 1, S < L and S > L."""


def armt(head: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A small ARMT.  With masks, sdpa of transformers 4 branches on values, and eager of 5 gives nan for a
    token that attends to nothing."""
    attention = "eager" if transformers.__version__.startswith("4.") else "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SHAPE)
        model = build(
            config, segment_size=CELL, num_mem_tokens=2, d_mem=4, head=head, dtype=dtype,
            attn_implementation=attention,
        ).eval()  # fmt: skip
        for layer in model.memory_cell.layers:
            nn.init.normal_(layer.W_mv.weight, std=0.5)
    return model


@torch.no_grad()
def assert_equal_calls(f: Callable[..., Any], calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> Any:
    """The optimized callable gives what the callable gives; returns the optimized one."""
    fast = rmtcompile.optimize(copy.deepcopy(f))
    for args, kwargs in calls:
        expected, got = f(*args, **kwargs), fast(*args, **kwargs)
        assert type(expected) is type(got)
        if isinstance(expected, dict):
            assert list(expected) == list(got)
            expected, got = dict(expected), dict(got)
        assert not any(x.isnan().any() for x in pytree.tree_leaves(expected) if isinstance(x, Tensor))
        assert_same(expected, got)
    return fast


def mask(segments: int, left: int = 0, right: int = 0) -> Tensor:
    """i64[2, T]: the first row is padded, the second is not."""
    found = torch.ones(2, segments * CELL, dtype=torch.long)
    found[0, :left] = 0
    found[0, segments * CELL - right :] = 0
    return found


def labels(segments: int) -> Tensor:
    found = ids(segments).roll(1, 1)
    found[:, 3::5] = -100
    return found


# --- the reference ARMT -------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[int], dict[str, Any]]] = {
    "hidden states": lambda n: {"input_ids": ids(n), "output_hidden_states": True},
    "labels, some ignored": lambda n: {"input_ids": ids(n), "labels": labels(n)},
    "padded left": lambda n: {"input_ids": ids(n), "attention_mask": mask(n, left=CELL // 2)},
    "padded right": lambda n: {"input_ids": ids(n), "attention_mask": mask(n, right=3)},
    "padded by a segment": lambda n: {"input_ids": ids(n), "attention_mask": mask(n, left=CELL + 1)},
    "embeddings": lambda n: {"inputs_embeds": features(n, d=16).repeat_interleave(CELL, 1)[:, : n * CELL]},
    "all at once": lambda n: {**CALLS["labels, some ignored"](n), **CALLS["padded right"](n), **WANTED},
}
WANTED = {"output_hidden_states": True}
SEES_NOTHING = ("padded left", "padded by a segment")
"""On transformers 4 this model gives nan for tokens that see nothing."""


@pytest.mark.parametrize(
    "names",
    [("hidden states",), ("embeddings",), ("padded right", *SEES_NOTHING), ("all at once",)],
    ids=", ".join,
)
def test_arguments_of_an_armt(names: tuple[str, ...]) -> None:
    """What differs in values alone runs on one program."""
    names = tuple(name for name in names if name not in SEES_NOTHING or transformers.__version__ >= "5")
    fast = assert_equal_calls(armt(), [((), CALLS[name](n)) for name in names for n in SEGMENTS])
    assert fast.captures == 1
    assert fast.schedule.width == 3, "whatever is asked for, cells run on diagonals"


@torch.no_grad()
def test_a_register_of_classes_of_a_library_may_grow() -> None:
    """Results of other classes, made elsewhere, are no part of the forward, though the library notes all."""
    model = armt()
    fast = rmtcompile.optimize(model)
    fast(input_ids=ids(3))
    another = make_dataclass("Another", [("x", Any, None)], bases=(ModelOutput,))
    assert another(x=torch.ones(())).x == 1
    transformers.MistralModel(transformers.MistralConfig(**SHAPE))
    assert_same(model(input_ids=ids(3)).logits, fast(input_ids=ids(3)).logits)
    assert fast.captures == 1


def test_labels() -> None:
    """Some are ignored; where all are, the loss is nan, as torch has it."""
    model = armt()
    fast = assert_equal_calls(model, [((), CALLS["labels, some ignored"](n)) for n in SEGMENTS])
    assert fast.schedule.width == 3
    ignored = torch.full((2, 3 * CELL), -100)
    with torch.no_grad():
        assert model(input_ids=ids(3), labels=ignored).loss.isnan()
        assert fast(input_ids=ids(3), labels=ignored).loss.isnan()
    assert fast.captures == 1


def test_arguments_of_an_armt_without_a_head() -> None:
    assert_equal_calls(armt(head=False), [((), {**CALLS["padded right"](n), **WANTED}) for n in SEGMENTS])


def test_a_short_last_segment_with_everything() -> None:
    def call(n: int) -> dict[str, Any]:
        return {k: v[:, :-5] if isinstance(v, Tensor) else v for k, v in CALLS["all at once"](n).items()}

    assert_equal_calls(armt(), [((), call(n)) for n in (4, 2, 1)])


# --- structures ---------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Output(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    states: Any = None


class Structured(nn.Module):
    """Returns what `build` makes of all there is: hidden states by segment and layer, states, the whole."""

    def __init__(self, structure: Callable[..., Any], n_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(n_layers))
        self.structure = structure

    def forward(
        self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None, ids: Tensor | None = None
    ) -> Any:
        states = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        grid: list[list[Tensor]] = []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            if ids is not None:
                h = h + torch.sin(ids[:, s * SEGMENT : (s + 1) * SEGMENT, None] / 7)
            grid.append([h * scale if shift is None else h * scale + shift])
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(grid[s][-1], states[l])
                grid[s].append(h)
        return self.structure(grid, states)


def last(grid: list[list[Tensor]]) -> list[Tensor]:
    return [row[-1] for row in grid]


STRUCTURES: dict[str, Callable[[Any, Any], Any]] = {
    "tuple in dict in list": lambda g, m: [{"all": (torch.cat(last(g), 1), m[0]), "none": None}, 3, "text"],
    "named tuple": lambda g, m: Pair(torch.cat(last(g), 1), Pair(m[-1], None)),
    "model output": lambda g, m: Output(logits=torch.cat(last(g), 1), states=tuple(m)),
    "numbered keys": lambda g, m: {f"logits_{s}": h for s, h in enumerate(last(g))},
    "numbered keys, two kinds": lambda g, m: {
        **{f"logits_{s + 1}": h for s, h in enumerate(last(g))},
        **{f"mean_{s}": h.mean(1) for s, h in enumerate(last(g))},
        "last": g[-1][-1],
    },
    "a list over segments": lambda g, m: (tuple(last(g)), m[1]),
    "a cat of each layer": lambda g, m: tuple(torch.cat([row[l] for row in g], 1) for l in range(len(g[0]))),
    "a stack over segments": lambda g, m: torch.stack([h.mean(1) for h in last(g)], 1),
    "segments of layers": lambda g, m: tuple(tuple(row) for row in g),
    "layers of segments": lambda g, m: tuple(tuple(row[l] for row in g) for l in range(len(g[0]))),
    "a dict a segment": lambda g, m: [{"in": row[0], "out": row[-1]} for row in g],
    "numbered dicts": lambda g, m: {f"segment_{s}": {"out": row[-1], "n": 1} for s, row in enumerate(g)},
    "layers but the last": lambda g, m: {
        "hidden": [torch.cat([r[l] for r in g], 1) for l in range(2)],
        "m": m,
    },
    "one layer in the middle": lambda g, m: torch.cat([row[1] for row in g], 1),
    "first and last": lambda g, m: (g[0][-1], g[-1][-1]),
    "second to last": lambda g, m: g[-2 if len(g) > 1 else -1][-1].sum(),
    "number of segments": lambda g, m: {"n": len(g), "tokens": len(g) * SEGMENT, "x": g[-1][-1]},
    "a sum over all": lambda g, m: sum(h.mean() for h in last(g)) / len(g),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name: str) -> None:
    model = made(functools.partial(Structured, STRUCTURES[name]))
    assert_equal_calls(model, [((features(n),), {}) for n in SEGMENTS])


# --- arguments of a toy -------------------------------------------------------------------------------------


def test_keywords_and_defaults() -> None:
    model = made(functools.partial(Structured, STRUCTURES["model output"]))
    shift = torch.randn(WIDTH, dtype=torch.float64)
    calls = [
        ((features(3),), {}),
        ((features(3), 1.0), {}),
        ((), {"x": features(4), "scale": 0.5}),
        ((features(4), 0.5), {"shift": shift}),
        ((features(2),), {"shift": -shift}),
    ]
    fast = assert_equal_calls(model, calls)
    assert "shift" not in fast.code.split("def forward")[0] or fast.captures > 1


def test_positions() -> None:
    """Positions of the whole input, cut with it; two rows differ."""
    model = made(functools.partial(Structured, STRUCTURES["tuple in dict in list"]))

    def call(n: int) -> dict[str, Tensor]:
        return {"ids": torch.stack([torch.arange(n * SEGMENT), 5 + torch.arange(n * SEGMENT)])}

    assert assert_equal_calls(model, [((features(n),), call(n)) for n in SEGMENTS]).captures == 1
