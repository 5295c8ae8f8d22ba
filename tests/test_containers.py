"""State in containers of every kind: left as the model leaves it, read as the model reads it, seen when it
changes."""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_objects import Frozen, Pair, Slotted
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, Layer, Toy, assert_same, features, made

import rmtcompile
from rmtcompile.errors import CaptureError

Wrap = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
WRAPS: dict[str, Wrap] = {
    "tuple": (lambda m: (m,), lambda s: s[0]),
    "named tuple in a dict": (lambda m: {"s": Pair(m, 3)}, lambda s: s["s"].a),
    "deque": (lambda m: deque([m], maxlen=1), lambda s: s[-1]),
    "frozen dataclass": (lambda m: Frozen((m,)), lambda s: s.a[0]),
    "slots": (lambda m: [Slotted(m)], lambda s: s[0].a),
    "twenty levels": (
        lambda m: functools.reduce(lambda inner, _: {"k": (inner,)}, range(20), m),
        lambda s: functools.reduce(lambda outer, _: outer["k"][0], range(20), s),
    ),
}


class Wrapped(nn.Module):
    """Leaves each layer's memory in a container, and goes on with it unless it is reset."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers, self.name = nn.ModuleList(Layer() for _ in range(2)), name

    def forward(self, x: Tensor, reset: bool = True) -> Tensor:
        wrap, unwrap = WRAPS[self.name]
        out: list[Tensor] = []
        for h in x.split(SEGMENT, 1):
            for layer in self.layers:
                memory = x.new_zeros(x.shape[0], WIDTH) if reset and not out else unwrap(layer.state)
                h, memory = layer(h, memory)
                layer.state = wrap(memory)
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize("name", WRAPS)
@torch.no_grad()
def test_state_goes_on_in_a_container(name: str) -> None:
    model = made(lambda: Wrapped(name))
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="eager")
    for reset in (True, False, False, True, False):
        assert_same(model(features(2), reset), fast(features(2), reset))
    theirs, mine = (WRAPS[name][1](m.layers[1].state) for m in (model, fast.model))
    assert_same(theirs, mine)
    assert fast.captures == 2


class Odd(Toy):
    """A toy that does something before and after."""

    def __init__(self) -> None:
        super().__init__(n_layers=2)
        self.set_up()

    def set_up(self) -> None:
        pass

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(self.before(x)))


def compared(build: Callable[[], nn.Module], *steps: Callable[[Any], Any] | int) -> Any:
    """Run a model and its optimized twin, with the changes among the steps made to both."""
    model = made(build)
    twin = made(build)
    fast = rmtcompile.optimize(twin, backend="eager")
    with torch.no_grad():
        for step in steps:
            if callable(step):
                step(model)
                step(twin)
            else:
                assert_same(model(features(step)), fast(features(step)))
    return fast


class Deletes(Odd):
    def set_up(self) -> None:
        self.kept = torch.zeros(1)

    def after(self, y: Tensor) -> Tensor:
        if hasattr(self, "kept"):
            del self.kept
            return y + 1
        self.kept = y[0, 0]
        return y


def test_deleted_attributes() -> None:
    fast = compared(Deletes, 2)
    assert not hasattr(fast.model, "kept")
    assert compared(Deletes, 2, 2, 2, 2).captures == 2


class Swaps(Odd):
    """Two buffers of its own change places at each call."""

    def set_up(self) -> None:
        self.a, self.b = [torch.ones(WIDTH).double()], [2 * torch.ones(WIDTH).double()]

    def after(self, y: Tensor) -> Tensor:
        y, self.a[0] = y + self.a[0], self.a[0] * 3
        self.a, self.b = self.b, self.a
        return y


def test_containers_that_change_places() -> None:
    assert compared(Swaps, 3, 3, 4, 3).captures == 2


class Aliased(Odd):
    """Written under one name, read under another: one list until the first call."""

    def set_up(self) -> None:
        self.a = self.b = [torch.ones(WIDTH).double()]

    def after(self, y: Tensor) -> Tensor:
        y = y + self.b[0]
        self.a = [y[0, 0]]
        return y


class LeavesAliases(Odd):
    def after(self, y: Tensor) -> Tensor:
        if hasattr(self.layers[0], "state"):
            y = y + self.layers[1].state[0]
        self.layers[0].state = self.layers[1].state = [y[0, 0]]
        return y


def test_aliases() -> None:
    compared(Aliased, 2, 2, 3)
    fast = compared(LeavesAliases, 2, 2, 3)
    assert fast.model.layers[0].state is fast.model.layers[1].state


class Deep(Odd):
    def set_up(self) -> None:
        self.table: Any = functools.reduce(lambda inner, _: {"k": inner}, range(12), {"n": 2.0})
        self.slotted, self.helper = Slotted((1.0, 2.0)), Helper()

    def before(self, x: Tensor) -> Tensor:
        number = functools.reduce(lambda outer, _: outer["k"], range(12), self.table)["n"]
        return self.helper.apply(x * number * self.slotted.a[1])


class Helper:
    shift = 1.0

    def apply(self, x: Tensor) -> Tensor:
        return x + self.shift * FACTORS["a"][0]


FACTORS = {"a": [1.0]}


def set_deep(m: Any) -> None:
    functools.reduce(lambda outer, _: outer["k"], range(12), m.table)["n"] = 5.0


@pytest.mark.parametrize(
    "change",
    [
        set_deep,
        lambda m: setattr(m.slotted, "a", (1.0, 5.0)),
        lambda m: setattr(m.helper, "shift", 7.0),
        lambda _: setattr(Helper, "shift", 7.0),
        lambda _: FACTORS["a"].__setitem__(0, 9.0),
    ],
)
def test_numbers_in_any_depth_are_seen(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Helper, "shift", 1.0)
    monkeypatch.setitem(FACTORS, "a", [1.0])
    assert compared(Deep, 2, change, 2).captures == 2


CALLS: list[Tensor] = []
COUNT = 0


class OnItsClass(Odd):
    count = 0

    def after(self, y: Tensor) -> Tensor:
        type(self).count += 1
        return y + self.count


class InAGlobalList(Odd):
    def after(self, y: Tensor) -> Tensor:
        CALLS.append(y)
        return y


class InAGlobalNumber(Odd):
    def after(self, y: Tensor) -> Tensor:
        global COUNT  # noqa: PLW0603
        COUNT += 1
        return y + COUNT


class InAHook(Odd):
    def set_up(self) -> None:
        seen: list[Any] = []
        self.layers[0].register_forward_hook(lambda *args: seen.append(args[-1][0]))
        self.look = types.MethodType(lambda _: seen, self)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (OnItsClass, "OnItsClass.count"),
        (InAGlobalList, "CALLS"),
        (InAGlobalNumber, "COUNT"),
        (InAHook, "seen"),
    ],
)
@torch.no_grad()
def test_state_that_no_module_keeps_is_refused(build: Any, name: str) -> None:
    model = made(build)
    with pytest.raises(CaptureError, match="keeps state outside of its modules") as caught:
        rmtcompile.optimize(model)(features(2))
    assert str(caught.value).splitlines()[1] == f"  {name}"
    assert not CALLS and COUNT == 0 and OnItsClass.count == 0
    assert build is not InAHook or model.look() == []


class Iterates(Odd):
    def set_up(self) -> None:
        self.numbers = iter([1.0] * 50)

    def before(self, x: Tensor) -> Tensor:
        return x if self.numbers is None else x + next(self.numbers)


@torch.no_grad()
def test_iterators_are_refused() -> None:
    with pytest.raises(CaptureError, match="reads an object whose state cannot be seen") as caught:
        rmtcompile.optimize(made(Iterates))(features(2))
    assert str(caught.value).splitlines()[1] == "  Iterates.numbers: builtins.list_iterator"


class Resets(Odd):
    """A module that is registered nowhere is reset before it is called."""

    def set_up(self) -> None:
        self.free = [Stateful()]

    def before(self, x: Tensor) -> Tensor:
        self.free[0].seen = 0
        return self.free[0](x)

    def after(self, y: Tensor) -> Tensor:
        return y + self.free[0].seen


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 5

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x * self.seen


def test_unregistered_modules() -> None:
    assert compared(Resets, 2, 2, 3).model.free[0].seen == 1


@functools.lru_cache
def ramp(n: int) -> Tensor:
    return torch.arange(n).double()[:, None] / n


class Caches(Odd):
    def before(self, x: Tensor) -> Tensor:
        return x + ramp(x.shape[1])


def test_tensors_in_a_cache_of_results_are_real() -> None:
    compared(Caches, 2, 3, 2)
    assert type(ramp(2 * SEGMENT)) is Tensor
