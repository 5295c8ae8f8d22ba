"""stream: parts of a value are taken before row-wise operations; what somebody needs whole stays whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from traced import StrictRun

from rmtcompile.passes.flat.functionalise import functionalise, overload_name
from rmtcompile.passes.flat.store_forwarding import forward_stores
from rmtcompile.passes.flat.stream import row_wise, stream

S, T, D, V = 4, 5, 6, 10
"""Segments, positions in one, features, words."""


def captured(f: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    """What the pass gets; each node's source is its operation."""
    traced = make_fx(f, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(*args)
    for node in traced.graph.nodes:
        node.meta["source"] = overload_name(node)
    return forward_stores(functionalise(traced).module)


def run(
    f: Callable[..., Any], *args: Tensor, inside: Callable[[fx.Node], bool] = lambda n: False
) -> fx.GraphModule:
    """The pass on a capture, compared with the callable; a second walk finds nothing to do."""
    before = captured(copy.deepcopy(f), *args)
    after = stream(before, inside)
    after.graph.lint()
    for mine, theirs in zip(tree_leaves(StrictRun(after).run(*args)), tree_leaves(f(*args)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert stream(after, inside) is after
    return after


def sizes(gm: fx.GraphModule, *names: str) -> set[tuple[int, ...]]:
    """Shapes of all results of operations of these names; of every operation if there are none."""
    found = [n for n in gm.graph.nodes if overload_name(n) and (not names or overload_name(n) in names)]
    return {tuple(n.meta["val"].shape) for n in found if isinstance(n.meta["val"], Tensor)}


def whole(gm: fx.GraphModule) -> list[str]:
    """Operations on all segments at once."""
    return [
        overload_name(n)
        for n in gm.graph.nodes
        if isinstance(val := n.meta.get("val"), Tensor) and S * T in val.shape and overload_name(n)
    ]


IDS = torch.arange(2 * S * T).view(2, S * T) % V
X = torch.randn(2, S * T, D, dtype=torch.float64)
TABLE, PLACES = (torch.randn(n, D, dtype=torch.float64) for n in (V, S * T))
LINEAR, NORM = nn.Linear(D, D).double(), nn.LayerNorm(D).double()

CUTS: dict[str, Callable[[Tensor], Any]] = {
    "slices": lambda x: [x[:, s * T : (s + 1) * T] for s in range(S)],
    "split": lambda x: x.split(T, 1),
    "chunk": lambda x: x.chunk(S, dim=1),
    "segments": lambda x: x.unflatten(1, (S, T)).unbind(1),
    "indexed": lambda x: [x.reshape(2, S, T, -1)[:, s] for s in range(S)],
    "stacked in front": lambda x: list(x.view(2, S, T, -1).transpose(0, 1)),
    "rows": lambda x: x.unbind(1),
    "narrow": lambda x: [x.narrow(1, s * T, T) for s in range(S)],
    "within": lambda x: [p[:, 1:3] for p in x.split(T, 1)],
    "overlapping": lambda x: [x[:, max(0, s * T - 1) : (s + 1) * T] for s in range(S)],
    "one": lambda x: x[:, -1],
}


def used(pieces: Any) -> list[Tensor]:
    """Something that each piece is needed for as a whole."""
    return [piece.flatten(1).cumsum(1) for piece in pieces]


@pytest.mark.parametrize("cut", CUTS)
def test_whatever_cuts_an_embedding(cut: str) -> None:
    got = CUTS[cut]
    pieces = lambda e: [got(e)] if cut == "one" else got(e)  # noqa: E731
    assert not whole(run(lambda ids: used(pieces(F.embedding(ids, TABLE) * 2)), IDS))


def manual_norm(x: Tensor) -> Tensor:
    return (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


ROW_WISE: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": LINEAR,
    "layer norm": NORM,
    "rms norm": lambda x: F.rms_norm(x, (D,)),
    "manual norm": manual_norm,
    "residual": lambda x: x + LINEAR(NORM(x)),
    "matmul": lambda x: x @ torch.ones(D, 2, dtype=x.dtype),
    "cast": lambda x: x.float().double(),
    "softmax": lambda x: x.softmax(-1),
    "positions": lambda x: x + PLACES,
    "counted positions": lambda x: x + F.embedding(torch.arange(S * T), PLACES),
    "a column": lambda x: x * torch.arange(S * T)[:, None] + torch.ones(1, S * T, 1, dtype=x.dtype),
    "heads": lambda x: LINEAR(x).view(2, S * T, 2, D // 2).relu().flatten(2),
    "transposed": lambda x: x.transpose(0, 1).tanh().transpose(0, 1),
    "halves": lambda x: torch.mul(*LINEAR(x).chunk(2, -1)),
    "joined": lambda x: torch.cat([x, -x], -1),
    "padded": lambda x: F.pad(x.sin(), (0, 2)),
    "argmax": lambda x: x.argmax(-1, keepdim=True).double(),
    "picked": lambda x: x.log_softmax(-1).gather(-1, IDS[..., None] % D),
    "masked": lambda x: x.masked_fill((IDS == 0)[..., None], 0.0),
    "dropout": lambda x: F.dropout(x, 0.5, training=False) * 3,
}


@pytest.mark.parametrize("name", ROW_WISE)
def test_row_wise_operations(name: str) -> None:
    """Nothing of S * T positions is computed but the constants that the model computes so."""
    gm = run(lambda x: used(ROW_WISE[name](x * 2).split(T, 1)), X)
    assert not set(whole(gm)) - {"lift_fresh", "detach", "eq", "unsqueeze", "remainder"}, whole(gm)


@pytest.mark.parametrize(
    "mixes",
    [
        lambda x: x.softmax(1),
        lambda x: x.cumsum(1),
        lambda x: F.layer_norm(x, (S * T, D)),
        lambda x: x + x.mean(1, keepdim=True),
        lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1].exp(),
        lambda x: x @ (x.transpose(1, 2) @ x),
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: x.flip(1).exp() + x,
    ],
)
def test_what_mixes_positions_is_computed_whole(mixes: Callable[[Tensor], Tensor]) -> None:
    assert whole(run(lambda x: used(mixes(x.exp()).split(T, 1)), X))


def test_a_value_that_is_needed_whole_is_computed_once() -> None:
    gm = run(lambda ids: (e := F.embedding(ids, TABLE), *used(e.split(T, 1))), IDS)
    assert sizes(gm, "embedding") == {(2, S * T, D)}
    gm = run(lambda x: (y := LINEAR(x), y.sum(), *used((y * 2).split(T, 1))), X)
    assert sizes(gm, "linear") == {(2, S * T, D)}


def test_loads_along_two_dimensions_leave_the_value_whole() -> None:
    gm = run(lambda x: (y := LINEAR(x), *used(y.split(T, 1)), y[:1].cumsum(1))[1:], X)
    assert sizes(gm, "linear") == {(2, S * T, D)}


def test_a_chain_with_a_second_user_is_cut_there() -> None:
    """The norm is needed whole; the linear after it is not."""
    gm = run(lambda x: (n := NORM(x), n.sum(1), *used(LINEAR(n).split(T, 1)))[1:], X)
    assert sizes(gm, "layer_norm") == {(2, S * T, D)}
    assert sizes(gm, "linear") == {(2, T, D)}


def test_a_head_runs_on_the_positions_that_are_used() -> None:
    """... and the other segments' hidden states are not read at all."""

    def f(x: Tensor) -> Tensor:
        hidden = torch.cat([part.cumsum(1) for part in x.split(T, 1)], 1)
        return F.linear(NORM(hidden), TABLE)[:, -1]

    gm = run(f, X)
    assert sizes(gm, "linear") == {(2, 1, V)}
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cumsum.default)) == 1
    assert sizes(run(lambda x: f(x)[:, :3].exp(), X), "linear") == {(2, 1, V)}


def test_a_head_of_each_segment() -> None:
    """Logits a segment, memory tokens dropped, joined, and the last one taken."""
    heads = lambda x: [F.linear(p.cumsum(1), TABLE)[:, : T - 1] for p in x.split(T, 1)]  # noqa: E731
    assert sizes(run(lambda x: torch.cat(heads(x), 1)[:, -1].float(), X), "linear") == {(2, 1, V)}
    assert sizes(run(lambda x: torch.cat(heads(x), 1), X), "linear") == {(2, T - 1, V)}


def test_the_inside_of_layers_stays_as_it_is() -> None:
    f = lambda x: [y.cumsum(1) for y in LINEAR(x).split(T, 1)]  # noqa: E731
    gm = run(f, X, inside=lambda n: overload_name(n) == "linear")
    assert sizes(gm, "linear") == {(2, S * T, D)}
    gm = run(f, X, inside=lambda n: overload_name(n) in ("split", "getitem"))
    assert sizes(gm, "linear") == {(2, S * T, D)}


def test_random_numbers_are_drawn_whole() -> None:
    before = captured(lambda x: F.dropout(x, 0.5).split(T, 1)[0] + 1, X)
    assert stream(before, lambda n: False) is before


def test_new_nodes_keep_their_place_in_the_users_code() -> None:
    gm = stream(captured(lambda x: LINEAR(x).split(T, 1)[1].cumsum(1), X), lambda n: False)
    (linear,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert linear.meta["source"] == "linear"


def test_row_wise_says_which_operands_are_read_in_part() -> None:
    graph = make_fx(lambda x, y: x + y, tracing_mode="fake")(X, X[0, :, :1]).graph
    x, y, add = list(graph.nodes)[:3]
    assert [row_wise(add, d) for d in range(3)] == [{x: 0}, {x: 1, y: 0}, {x: 2}]
