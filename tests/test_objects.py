"""rmtcompile/binding/objects.py: one way through Python objects, whatever they are nested in."""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rmtcompile.binding import objects
from rmtcompile.binding.objects import (
    DELETED,
    contains_tensor,
    get,
    is_iterator,
    now,
    parts,
    path_name,
    put,
    walk,
)
from rmtcompile.errors import CaptureError

Pair = namedtuple("Pair", "a b")


@dataclass(frozen=True)
class Frozen:
    a: Any


@dataclass(slots=True)
class Slotted:
    a: Any


class Tagged(list[Any]):
    """A list with attributes."""


def tagged(value: Any) -> Tagged:
    made = Tagged([1, value])
    made.tag = "x"  # type: ignore[attr-defined]
    return made


HOLDERS: dict[str, Any] = {
    "list": lambda x: [0, x],
    "tuple": lambda x: (0, x),
    "named tuple": lambda x: Pair(0, x),
    "dict": lambda x: {"a": x},
    "ordered dict": lambda x: OrderedDict(a=x),
    "default dict": lambda x: defaultdict(list, {"a": x}),
    "deque": lambda x: deque([x], maxlen=3),
    "set": lambda x: {x},
    "frozen dataclass": Frozen,
    "slots": Slotted,
    "namespace": lambda x: types.SimpleNamespace(a=x),
    "list with attributes": tagged,
    "partial": lambda x: functools.partial(print, x),
    "mapping proxy": lambda x: types.MappingProxyType({"a": x}),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_what_is_inside_is_found(name: str) -> None:
    tensor = torch.zeros(2)
    holder = HOLDERS[name](tensor)
    (path,) = [path for path, value in walk(holder) if value is tensor]
    value = holder
    for step in path:
        value = get(value, step)
    assert value is tensor
    assert contains_tensor(holder) and not contains_tensor(HOLDERS[name]("no tensor"))


def test_any_depth_and_cycles() -> None:
    tensor = torch.zeros(1)
    deep: Any = functools.reduce(lambda inner, _: {"k": [inner]}, range(5000), tensor)
    assert contains_tensor(deep)
    ring: list[Any] = [1]
    ring.append(ring)
    assert [path for path, _ in walk(ring)] == [(), (("item", 0),)]
    assert not contains_tensor(ring)


def test_weak_references_and_proxies() -> None:
    held = Frozen(torch.zeros(1))
    assert contains_tensor(weakref.ref(held)) and contains_tensor(weakref.proxy(held))
    reference = weakref.ref(held)
    del held
    assert parts(reference) == {} and now(reference, ("referent", None)) is DELETED


def test_what_only_c_code_can_see() -> None:
    tensor = torch.zeros(1)
    assert contains_tensor(iter([tensor])) and contains_tensor(x for x in [tensor])
    assert contains_tensor(lambda: tensor) and not contains_tensor(lambda: 1)
    assert is_iterator(iter([1])) and not is_iterator([1]) and not is_iterator(types.SimpleNamespace())


@pytest.mark.parametrize(
    ("holder", "step"),
    [([1], ("item", 0)), ({"a": 1}, ("item", "a")), (Slotted(1), ("slot", "a")), (Frozen(1), ("attr", "a"))],
)
def test_put(holder: Any, step: Any) -> None:
    put(holder, step, 5)
    assert get(holder, step) == 5
    if not isinstance(holder, list):
        put(holder, step, DELETED)
        assert now(holder, step) is DELETED


def test_a_default_dict_gets_no_entry() -> None:
    table: defaultdict[str, list[int]] = defaultdict(list)
    assert now(table, ("item", "a")) is DELETED and not table


def test_a_set_has_no_history() -> None:
    """Sets of the same members give them in one order, whatever was put in first."""
    one, other = set[int](), set[int]()
    one.update((16, 8, 0, 24))
    other.update((0, 24, 8, 16))
    assert list(one) != list(other), "or nothing is tested"
    assert list(objects.parts(one).items()) == list(objects.parts(other).items())


def test_too_many_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "LIMIT", 100)
    with pytest.raises(CaptureError, match="too many to look into") as caught:
        contains_tensor({"rows": [[i] for i in range(200)]})
    assert str(caught.value).splitlines()[1].startswith("  at rows[")


def test_paths() -> None:
    assert path_name((("module", "a.b"), ("attr", "_buffers"), ("item", "state"))) == "a.b.state"
    assert path_name((("module", "a"), ("attr", "rows"), ("item", 3), ("slot", "m"))) == "a.rows[3].m"
