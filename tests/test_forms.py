"""Forms of cell functions that are kept: called without being traced, and compiled where they do not fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from toys import Toy, assert_same, features, made

import rmtcompile
from rmtcompile.compiler.loading import load
from rmtcompile.runtime import forms
from rmtcompile.runtime.forms import Form, Marks
from rmtcompile.saved import whole_forms

MODULE = """
import torch

def cell(x, w, place):
    h = torch.tanh(x @ w)
    return h, h.sum(-1)
"""


@pytest.fixture(autouse=True)
def nothing_offered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(forms, "_READY", {})
    monkeypatch.setattr(forms, "_CACHES", [])
    GIVEN.clear()
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def emitted() -> Any:
    return vars(load(MODULE))["cell"]


def form(about: int = 0, function: Any = None, marks: Marks = ((0,), (), (0,))) -> Form:
    """A form whose number of cells is open, and that stores its first result."""
    cell = function or emitted()

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        results = cell(*args)
        args[2].copy_(results[0])
        return results[1:]

    return Form(run, (about,), marks, backend="inductor", fullgraph=True)


def arguments(cells: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(cells)
    x = torch.randn(cells, 3, 4, generator=generator, dtype=torch.float64)
    return x, torch.nn.Parameter(torch.eye(4, dtype=torch.float64).flip(0)), torch.empty_like(x)


def assert_right(one: Form, cells: int) -> None:
    x, w, place = arguments(cells)
    (total,) = one(x, w, place)
    assert_same([torch.tanh(x @ w), torch.tanh(x @ w).sum(-1)], [place, total])


def caches() -> None:
    """What torch has compiled before is asked for when something is to be compiled."""
    GIVEN.append(True)


GIVEN: list[bool] = []


def kept(one: Form) -> tuple[str, bytes]:
    key, content = one.key, one.content()
    assert key is not None and content is not None
    return key, content


def traced() -> int:
    return int(counters["stats"]["unique_graphs"])


@torch.no_grad()
def test_a_kept_form_is_not_traced() -> None:
    one = form()
    assert one.key is None and one.content() is None, "it was not called yet"
    assert_right(one, 5)
    key, content = kept(one)
    torch.compiler.reset()
    forms.offer({key: lambda: content}, caches)
    before, other = traced(), form()
    for cells in (2, 5, 7):
        assert_right(other, cells)
    assert traced() == before
    assert not GIVEN
    assert kept(other) == (key, content)
    assert_right(other, 1)  # its guards want two cells or more
    assert GIVEN == [True]
    assert traced() == before + 1


@torch.no_grad()
def test_what_does_not_fit_is_compiled() -> None:
    one = form()
    assert_right(one, 5)
    key, content = kept(one)
    torch.compiler.reset()
    for ready, about in (({key: lambda: content}, 1), ({key: lambda: b"no form"}, 0)):
        forms.offer(ready, caches)
        before, other = traced(), form(about)
        assert_right(other, 5)
        assert traced() == before + 1
        torch.compiler.reset()


def test_gradients_are_those_of_a_compiled_form() -> None:
    one = form()
    with torch.no_grad():
        assert_right(one, 5)
        key, content = kept(one)
    forms.offer({key: lambda: content}, caches)
    other = form()
    x, w, place = arguments(5)
    with torch.no_grad():
        other(x, w, place)
    (total,) = other(x, w, torch.empty_like(place))
    (gradient,) = torch.autograd.grad(total.sum(), [w])
    (wanted,) = torch.autograd.grad(torch.tanh(x @ w).sum(), [w])
    assert_same(wanted, gradient)


@torch.no_grad()
def test_a_folder_that_was_asked_for_holds_forms(tmp_path: Path) -> None:
    """`cache=` writes none: its first call would take twice as long; `save` writes them there, too, and
    again where one is damaged."""
    fast = rmtcompile.optimize(made(lambda: Toy(2)), backend="inductor", cache=tmp_path)
    fast(features(4))
    assert not list(tmp_path.glob("*/*.form"))
    fast.save(tmp_path)
    first, *others = sorted(tmp_path.glob("*/*.form"))
    assert len(others) >= 2
    keys = {path.stem for path in (first, *others)}
    assert whole_forms(tmp_path, first.parent.name) == keys
    times = {path: path.stat().st_mtime_ns for path in others}
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    assert whole_forms(tmp_path, first.parent.name) == keys - {first.stem}
    first.write_bytes(others[0].read_bytes())  # whole, but of another name
    assert whole_forms(tmp_path, first.parent.name) == keys - {first.stem}
    fast.save(tmp_path)
    assert first.read_bytes() == whole
    assert {path: path.stat().st_mtime_ns for path in others} == times


@torch.no_grad()
def test_arguments_that_share_memory_are_left_to_the_compiler() -> None:
    x, w, _ = arguments(5)
    one = form(marks=())  # with an open size torch 2.13 makes code that reads a size it has no name for
    wanted = torch.tanh(x @ w)
    one(x, w, x)
    assert_same(wanted, x)
    assert one.key is None and one.content() is None
    rows = torch.arange(12.0).view(4, 3)
    assert forms.are_apart([rows[:2], rows[2:], torch.empty(0)])
    assert not forms.are_apart([rows[:3], rows[2:]])
    assert not forms.are_apart([rows[:, :1], rows[:, 1:]]), "they interleave"


class Reading(Toy):
    """Looks its inputs up first."""

    def __init__(self) -> None:
        super().__init__(2)
        self.table = torch.nn.Embedding(9, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.table(ids))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_table_is_trained_through_compiled_forms() -> None:
    """What follows a look-up is a module of torch.fx there, and no emitted function."""
    model = made(Reading)
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(model, backend="inductor")
    ids = torch.arange(24).view(2, 12) % 9
    for run in (fast, twin):
        run(ids).square().sum().backward()
    theirs, mine = ([p.grad for p in m.parameters() if p.grad is not None] for m in (twin, model))
    assert mine and fast.captures
    assert_same(theirs, mine, 1e-9)


@torch.no_grad()
def test_a_view_of_a_parameter_has_no_form_of_its_own() -> None:
    """It says that it requires a gradient, even one that was taken without; a copy of it does not."""
    weight = torch.nn.Parameter(torch.randn(2, 3))
    form = Form(_doubled, (), backend="eager", fullgraph=True)
    before = counters["stats"]["unique_graphs"]
    for x in (weight.expand(1, -1, -1), weight.detach()[None].clone()):
        assert torch.equal(form(x), 2 * x)
    assert counters["stats"]["unique_graphs"] == before + 1


def _doubled(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.filterwarnings("default")  # torch's own, of a tensor that is no leaf
def test_a_training_step_compiles_what_it_needs_itself() -> None:
    """Two segments of three layers have no level of the full width, whose form waits for a longer text."""
    model = made(lambda: Toy(3))
    fast = rmtcompile.optimize(model, backend="aot_eager")
    fast(features(2)).sum().backward()
    engine = fast._last[0].executor.engine  # type: ignore[index]

    def sizes() -> set[Any]:
        return {form._about[0] for form in engine.forms if form._about and isinstance(form._about[0], int)}

    assert sizes() and 3 not in sizes()
    fast(features(5)).sum().backward()
    assert 3 in sizes()
