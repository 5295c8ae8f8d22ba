"""spread: a head over a concatenation runs on its parts, where less is left of each than came in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_stream import IDS, NORM, TABLE, D, S, T, V, X, captured, sizes
from torch import Tensor, fx

from rmtcompile.passes.flat.functionalise import overload_name
from rmtcompile.passes.flat.spread import spread
from rmtcompile.passes.flat.stream import stream


def hidden(x: Tensor) -> Tensor:
    return torch.cat([part.cumsum(1) for part in x.split(T, 1)], 1)


def run(
    f: Callable[..., Tensor], *args: Tensor, inside: Callable[[fx.Node], bool] = lambda n: False
) -> fx.GraphModule:
    before = stream(captured(f, *args), inside)
    after = spread(before, inside)
    after.graph.lint()
    expected, got = f(*args), after(*args)
    torch.testing.assert_close(
        got[0] if isinstance(got, (tuple, list)) else got, expected, rtol=1e-12, atol=1e-12
    )
    assert spread(after, inside) is after
    return after


SMALLER: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda x: F.linear(NORM(hidden(x)), TABLE).argmax(-1),
    "a few logits": lambda x: F.linear(hidden(x), TABLE)[..., :2],
    "two results": lambda x: torch.stack([(y := F.linear(hidden(x), TABLE)).amax(-1), y.logsumexp(-1)], -1),
    "log probabilities": lambda x: (
        F.linear(hidden(x), TABLE).log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
    ),
}


@pytest.mark.parametrize("name", SMALLER)
def test_what_shrinks_is_computed_part_by_part(name: str) -> None:
    gm = run(SMALLER[name], X)
    assert sizes(gm, "linear") == {(2, T, V)}
    assert (2, S * T, D) not in sizes(gm)


@pytest.mark.parametrize(
    "keeps",
    [
        lambda x: F.linear(hidden(x), TABLE),
        lambda x: NORM(hidden(x)),
        lambda x: F.linear(hidden(x), TABLE).cumsum(1).sum(-1),
        lambda x: torch.cat([hidden(x), F.linear(hidden(x), TABLE)[..., :1]], -1),
    ],
)
def test_what_stays_as_large_stays_whole(keeps: Callable[[Tensor], Tensor]) -> None:
    before = stream(captured(keeps, X), lambda n: False)
    assert spread(before, lambda n: False) is before


@pytest.mark.parametrize(
    "f",
    [
        lambda x: F.linear((y := hidden(x)) / y.norm(), TABLE).argmax(-1),
        lambda x: F.linear((y := hidden(x)) - y.mean(1, keepdim=True), TABLE).argmax(-1),
        lambda x: ((y := hidden(x)) @ y.transpose(1, 2)).amax(-1),
        lambda x: F.linear((y := hidden(x)) + y.cumsum(1), TABLE).argmax(-1),
        lambda x: F.linear((y := hidden(x)) + y.flip(1), TABLE).argmax(-1),
    ],
)
def test_what_reads_the_whole_at_each_position_stays_whole(f: Callable[[Tensor], Tensor]) -> None:
    before = stream(captured(f, X), lambda n: False)
    assert spread(before, lambda n: False) is before


def test_a_value_that_comes_by_two_ways_is_computed_part_by_part() -> None:
    gm = run(lambda x: (F.linear((y := hidden(x)).exp(), TABLE) + F.linear(y, TABLE)).argmax(-1), X)
    assert sizes(gm, "linear") == {(2, T, V)}


def several(x: Tensor) -> list[Tensor]:
    """What a segment gives is a join itself."""
    return [torch.cat([part.cumsum(1), part[:, :1].sin()], 1) for part in x.split(T, 1)]


NESTED: dict[str, Callable[[Tensor], Tensor]] = {
    "a join of joins": lambda x: F.linear(torch.cat(several(x), 1), TABLE).argmax(-1),
    "joined with more": lambda x: F.linear(torch.cat([hidden(x), x[:, :2]], 1), TABLE).argmax(-1),
    "joined with itself": lambda x: F.linear(torch.cat([y := hidden(x), y], 1), TABLE).argmax(-1),
    "an empty part": lambda x: F.linear(torch.cat([x[:, :0].sin(), *several(x)], 1), TABLE).argmax(-1),
    "cut into segments": lambda x: F.linear(hidden(x).unflatten(1, (S, T)), TABLE).argmax(-1),
    "batches in one axis": lambda x: F.linear(hidden(x).transpose(0, 1).flatten(0, 1), TABLE).argmax(-1),
}


@pytest.mark.parametrize("name", NESTED)
def test_a_region_ends_where_its_rows_are_joined_or_cut_again(name: str) -> None:
    f, found = NESTED[name], captured(NESTED[name], X)
    for _ in range(2):  # what is left of a join inside may be spread again
        found = spread(stream(found, lambda n: False), lambda n: False)
        found.graph.lint()
        assert torch.equal(found(X), f(X))


def test_the_inside_of_layers_stays_as_it_is() -> None:
    gm = run(SMALLER["tokens"], X, inside=lambda n: overload_name(n) == "linear")
    assert sizes(gm, "linear") == {(2, S * T, V)}
