"""trees.py: what a forward leaves behind is taken apart and made again, with all its aliases."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from typing import Any

import pytest
import torch
from test_objects import Frozen, Pair, Slotted, tagged

from rmtcompile.binding.trees import Flattener, flat
from rmtcompile.compiler.results import Aligner, value_of
from rmtcompile.errors import CaptureError


def rebuilt(*values: Any, knows: Any = lambda value: False) -> list[Any]:
    """The values made again by rules."""
    flatten, aligner = Flattener(values, knows), Aligner((2, 3))
    rules = [aligner.align(tree, tree, "it") for tree in (flatten(value, "it") for value in values)]
    made: dict[int, Any] = {}
    return [value_of(rule, (), 2, made=made) for rule in rules]


ZERO = torch.zeros(1)


def closing(value: Any) -> Any:
    """A function with a value in its closure."""
    return lambda: value


VALUES: dict[str, Any] = {
    "nested": lambda: {"a": [1, (2, Pair(3, "x"))], "b": OrderedDict(c=None)},
    "default dict": lambda: defaultdict(list, {"a": [1]}),
    "deque": lambda: deque([1, 2], maxlen=2),
    "set": lambda: {1, (2, 3)},
    "frozen dataclass": lambda: Frozen((1, 2)),
    "slots": lambda: Slotted([1]),
    "list with attributes": lambda: tagged(2),
}


@pytest.mark.parametrize("name", VALUES)
def test_equal_and_new(name: str) -> None:
    value = VALUES[name]()
    (made,) = rebuilt(value)
    assert made == value and type(made) is type(value) and made is not value
    assert flat(made) == flat(value)
    if name == "default dict":
        assert made["new"] == []
    if name == "deque":
        assert made.maxlen == 2
    if name == "list with attributes":
        assert made.tag == "x"


def test_an_object_in_several_places_is_one() -> None:
    shared = [1]
    a, b = rebuilt((shared, 2), {"s": shared})
    assert a[0] is b["s"] and a[0] is not shared


def test_an_object_that_holds_itself() -> None:
    ring = Slotted(None)
    ring.a = [ring]
    (made,) = rebuilt(ring)
    assert made is not ring and made.a[0] is made


def test_what_was_there_before_is_itself() -> None:
    before = [1]
    ((made,),) = rebuilt((before,), knows=lambda value: value is before)
    assert made is before


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({torch.zeros(1)}, "is a set of tensors"),
        (iter([1]), "is an iterator"),
        ((x for x in [1]), "is an iterator"),
        (torch.nn.Linear(1, 1), "is a module that was not there"),
        ({torch.zeros(1): 1}, "has tensors for keys"),
        ([lambda: ZERO, closing(ZERO)], "holds tensors where they cannot be followed"),
    ],
)
def test_what_cannot_be_made_again_is_refused(value: Any, why: str) -> None:
    with pytest.raises(CaptureError, match=f"what the forward leaves in layer.state {why}") as caught:
        Flattener([value])(value, "layer.state")
    lines = str(caught.value).splitlines()
    assert lines[1].startswith("  layer.state: ") and lines[2].startswith("  help: keep state in tensors")


def test_nesting_has_a_limit_that_is_said() -> None:
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    with pytest.raises(CaptureError, match="nested more than 100 deep"):
        Flattener([deep])(deep, "state")
