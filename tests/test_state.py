"""rmtcompile/binding/state.py: what a forward changes is found, put back, and left again."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import Toy, features, made

import rmtcompile
from rmtcompile.binding.objects import DELETED, contains_tensor, path_name
from rmtcompile.binding.state import Snapshot, roots_of


class Cache:
    """A plain object that keeps tensors."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.seen = 0


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("buffer", torch.zeros(2))
        self.flag, self.count = True, 0
        self.memory = torch.zeros(1)
        self.table: dict[str, Any] = {"a": torch.zeros(1), "n": 1}
        self.rows = [torch.zeros(1), torch.ones(1)]
        self.cache = Cache()


def change_everything(m: Stateful) -> None:
    m.flag, m.count = False, 7
    m.memory = torch.ones(3)
    m.buffer = torch.ones(2)
    m.table["a"] = torch.ones(1)
    m.table["new"] = 5
    m.rows[1] = torch.zeros(1)
    m.cache.values.append(torch.ones(1))
    m.cache.seen += 1
    m.extra = "x"
    m.inner.weight = nn.Parameter(torch.ones(2, 2))


def test_nothing_changed() -> None:
    assert Snapshot({"": Stateful()}).changes() == []


def test_changes_are_named() -> None:
    m = Stateful()
    snapshot = Snapshot({"": m})
    change_everything(m)
    names = {change.name for change in snapshot.changes()}
    assert {"flag", "count", "memory", "buffer", "table.a", "table.new", "rows[1]", "extra"} <= names
    assert any(name.startswith("cache") for name in names)


def test_restore_puts_the_very_objects_back() -> None:
    m = Stateful()
    before, table, rows = dict(m.__dict__), dict(m.table), list(m.rows)
    weight, buffer = m.inner.weight, m.buffer
    snapshot = Snapshot({"": m})
    change_everything(m)
    snapshot.restore()
    assert before.keys() == m.__dict__.keys() and all(before[key] is m.__dict__[key] for key in before)
    assert m.table.keys() == table.keys() and all(m.table[key] is table[key] for key in table)
    assert all(a is b for a, b in zip(m.rows, rows, strict=True))
    assert m.inner.weight is weight and m.buffer is buffer
    assert m.cache.values == [] and m.cache.seen == 0
    assert snapshot.changes() == []


def test_changes_can_be_left_again() -> None:
    m = Stateful()
    snapshot = Snapshot({"": m})
    change_everything(m)
    changes, after = snapshot.changes(), (m.memory, m.count, m.rows[1], m.table["new"])
    snapshot.restore()
    for change in changes:
        change.apply(change.value)
    assert (
        m.memory is after[0] and (m.count, m.table["new"]) == (after[1], after[3]) and m.rows[1] is after[2]
    )


def test_what_is_deleted_is_deleted_again() -> None:
    m = Stateful()
    m.temporary = 1
    snapshot = Snapshot({"": m})
    del m.temporary
    (change,) = snapshot.changes()
    assert change.name == "temporary" and change.value is DELETED
    snapshot.restore()
    assert m.temporary == 1


def test_assigning_the_same_value_counts_where_it_was_written() -> None:
    m = Stateful()
    snapshot = Snapshot({"": m})
    m.count = 0
    assert snapshot.changes() == []
    assert [change.name for change in snapshot.changes({(id(m), "count")})] == ["count"]


def test_types_are_values() -> None:
    m = Stateful()
    snapshot = Snapshot({"": m})
    m.count = False
    assert [change.name for change in snapshot.changes()] == ["count"]


def test_a_module_that_holds_itself() -> None:
    m = Stateful()
    m.__dict__["me"] = m
    m.rows.append(m.rows)  # type: ignore[arg-type]
    snapshot = Snapshot({"": m})
    m.count = 3
    assert [change.name for change in snapshot.changes()] == ["count"]
    snapshot.restore()
    assert m.count == 0


@given(st.lists(st.tuples(st.sampled_from(["flag", "count", "memory", "other"]), st.integers(0, 3))))
def test_restore_undoes_any_assignments(assignments: list[tuple[str, int]]) -> None:
    m = Stateful()
    before = dict(m.__dict__)
    snapshot = Snapshot({"": m})
    for name, value in assignments:
        setattr(m, name, value)
    snapshot.restore()
    assert before.keys() == m.__dict__.keys() and all(before[key] is m.__dict__[key] for key in before)


@pytest.mark.parametrize(
    ("value", "holds"),
    [
        (torch.zeros(1), True),
        ([1, (2, {"a": torch.zeros(1)})], True),
        (Cache(), False),
        ({"a": 1}, False),
        (nn.Linear(1, 1), False),
        (None, False),
    ],
)
def test_contains_tensor(value: object, holds: bool) -> None:
    assert contains_tensor(value) is holds


def test_contains_tensor_in_objects() -> None:
    cache = Cache()
    cache.values.append(torch.zeros(1))
    assert contains_tensor(cache)


def test_roots() -> None:
    m = Stateful()

    class Holder:
        def __init__(self) -> None:
            self.model = m

        def run(self, x: torch.Tensor) -> torch.Tensor:
            return self.model.inner(x)

    def default(x: torch.Tensor, model: nn.Module = m) -> torch.Tensor:
        return model(x)

    assert roots_of(m) == {"": m}
    for fn in (lambda x: m.inner(x) + 1, Holder().run, default, functools.partial(default, model=m)):
        assert list(roots_of(fn).values()) == [m]
    assert roots_of(torch.sin) == {}


def test_paths() -> None:
    assert path_name((("module", "a.b"), ("attr", "_buffers"), ("item", "state"))) == "a.b.state"
    assert path_name((("module", "a"), ("attr", "rows"), ("item", 3))) == "a.rows[3]"


class Counting(Toy):
    """Counts its calls in a buffer and clears a large one: writes that read no input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("large", torch.ones(1 << 17))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.large.zero_()
        return super().forward(x)


@torch.no_grad()
def test_writes_are_not_made_while_preparing() -> None:
    model = made(Counting)
    fast = rmtcompile.optimize(model).prepare(features(3))
    assert model.calls == 0 and model.large.all()
    for calls in (1, 2):
        fast(features(3))
        assert model.calls == calls and not model.large.any()
