"""Whatever changes between two calls is seen: a new capture or a clear refusal, never a wrong answer.

Each change is made to an optimized model that has run; its next result must be that of the model as it is.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from toys import SEGMENT, Toy, assert_same, features, made

import rmtcompile
from rmtcompile.dispatch.told import CHANGES
from rmtcompile.errors import CaptureError, UnsupportedError

D = 4


class Scale:
    """A plain object."""

    def __init__(self, factor: float) -> None:
        self.factor, self.inner = factor, types.SimpleNamespace(shift=1.0)


class Everything(Toy):
    """Reads state of every kind: what is not read is not here."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__(n_layers=2)
        self.flag, self.number, self.word, self.dtype = True, 2.0, "plus", torch.float64
        self.pair, self.names = (1.0, 2.0), {"a"}
        self.numbers, self.table = [1.0, 2.0], {"shift": 1.0, "inner": {"deep": 1.0}}
        self.act, self.scale = torch.tanh, Scale(2.0)
        self.free = [nn.Linear(D, D)]  # not registered
        self.free[0].on = True
        self.state = torch.ones(D)
        self.register_buffer("buffer", torch.ones(D))
        self.register_buffer("missing", None)
        self.register_parameter("bias", None)

    def _apply(self, fn: Any) -> Any:
        self.free[0]._apply(fn)
        self.state = fn(self.state)
        return super()._apply(fn)

    def helper(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.number if self.flag else x
        x = x + 1 if self.word == "plus" else x - 1
        x = x * self.pair[0] + len(self.names) + sum(self.numbers) + self.table["shift"]
        x = self.act(x + self.table["inner"]["deep"]) * self.scale.factor + self.scale.inner.shift
        x = self.free[0](x) if self.free[0].on else x
        x = x * self.factor + self.state + self.buffer
        x = x if self.missing is None else x + self.missing
        x = x if self.bias is None else x + self.bias
        x = x * 3 if hasattr(self, "extra") else x
        x = x.to(self.dtype).to(x.dtype)
        return super().forward(self.helper(x))


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64)


def replace_free(m: Any) -> None:
    m.free[0] = nn.Linear(D, D).double()
    m.free[0].on = True


Change = Callable[[Any], Any]
MODULE: dict[str, Change] = {
    "flag": lambda m: setattr(m, "flag", False),
    "number": lambda m: setattr(m, "number", 3.0),
    "type of a number": lambda m: setattr(m, "number", 2),
    "string": lambda m: setattr(m, "word", "minus"),
    "dtype in an attribute": lambda m: setattr(m, "dtype", torch.float32),
    "tuple": lambda m: setattr(m, "pair", (4.0, 2.0)),
    "set": lambda m: m.names.add("b"),
    "item of a list": lambda m: m.numbers.__setitem__(1, 5.0),
    "length of a list": lambda m: m.numbers.append(5.0),
    "another list": lambda m: setattr(m, "numbers", [7.0]),
    "item of a dict": lambda m: m.table.update(shift=0.0),
    "item of an inner dict": lambda m: m.table["inner"].update(deep=0.0),
    "another inner dict": lambda m: m.table.update(inner={"deep": 3.0}),
    "function": lambda m: setattr(m, "act", torch.sigmoid),
    "another object": lambda m: setattr(m, "scale", Scale(5.0)),
    "field of an object": lambda m: setattr(m.scale, "factor", 5.0),
    "another inner object": lambda m: setattr(m.scale, "inner", types.SimpleNamespace(shift=3.0)),
    "flag of an unregistered module": lambda m: setattr(m.free[0], "on", False),
    "another unregistered module": replace_free,
    "weight of an unregistered module": lambda m: m.free[0].weight.mul_(2),
    "state tensor": lambda m: setattr(m, "state", 3 * ones(D)),
    "shape of a state tensor": lambda m: setattr(m, "state", 3 * ones(1, D)),
    "buffer": lambda m: setattr(m, "buffer", 3 * ones(D)),
    "contents of a buffer": lambda m: m.buffer.fill_(7),
    "dtype of a buffer": lambda m: setattr(m, "buffer", m.buffer.float()),
    "missing buffer": lambda m: setattr(m, "missing", ones(D)),
    "missing parameter": lambda m: setattr(m, "bias", nn.Parameter(ones(D))),
    "new attribute": lambda m: setattr(m, "extra", True),
    "method of the instance": lambda m: setattr(m, "helper", lambda x: 7 * x),
    "child": lambda m: m.layers[0].__setattr__("mix", nn.Linear(D, D).double()),
    "layer": lambda m: m.layers.__setitem__(1, made(lambda: Toy(1), seed=5).layers[0]),
    "one layer more": lambda m: m.layers.append(made(lambda: Toy(1), seed=5).layers[0]),
    "parameter": lambda m: setattr(m.layers[0].mix, "bias", nn.Parameter(3 * ones(D))),
    "data of a parameter": lambda m: setattr(m.layers[0].mix.bias, "data", 3 * ones(D)),
    "contents of a parameter": lambda m: m.layers[0].mix.weight.mul_(2),
    "no parameter any more": lambda m: [setattr(layer.mix, "bias", None) for layer in m.layers],
    "shape of parameters": lambda m: [
        setattr(layer.mix, "bias", nn.Parameter(3 * ones(1))) for layer in m.layers
    ],
    "load_state_dict": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}),
    "load_state_dict(assign=True)": lambda m: m.load_state_dict(
        {k: 2 * v for k, v in m.state_dict().items()}, assign=True
    ),
    "parametrization": lambda m: parametrize.register_parametrization(m.layers[0].mix, "weight", Doubled()),
    "forward hook": lambda m: m.layers[0].mix.register_forward_hook(lambda *args: args[-1] + 1),
    "forward pre-hook": lambda m: m.layers[0].register_forward_pre_hook(lambda _, xs: (xs[0] + 1, *xs[1:])),
    "to another dtype and back": lambda m: m.float().double(),
}


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


WEIGHTS = {
    "weight of an unregistered module", "state tensor", "buffer", "contents of a buffer", "parameter",
    "data of a parameter", "contents of a parameter", "load_state_dict", "load_state_dict(assign=True)",
}  # fmt: skip
"""Changes of values alone: the program stays the same."""


@pytest.mark.parametrize("name", MODULE)
@torch.no_grad()
def test_of_the_model(name: str) -> None:
    model, x = made(Everything), features(2)
    fast = rmtcompile.optimize(model)
    before = fast(x)
    MODULE[name](model)
    expected = copy.deepcopy(model)(x)
    if name not in ("type of a number", "to another dtype and back"):
        assert not torch.equal(before, expected), "this change changes nothing"
    assert_same(expected, fast(x), 1e-5 if "dtype" in name else None)
    again = fast.captures
    assert_same(expected, fast(x), 1e-5 if "dtype" in name else None)
    assert fast.captures == again
    if name in WEIGHTS:
        assert fast.captures == 1


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def hook_for_all() -> Iterator[None]:
    def change(module: nn.Module, _: Any, out: Any) -> Any:
        return out + 1 if isinstance(module, nn.Linear) else out

    handle = nn.modules.module.register_module_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AMBIENT: dict[str, Callable[[], Any]] = {
    "attribute of the class": lambda: attribute(Everything, "factor", 9.0),
    "method of the class": lambda: attribute(Everything, "helper", lambda self, x: 11 * x),
    "method of a layer's class": lambda: attribute(type(made(Toy).layers[0]), "forward", doubled_forward),
    "hook for all modules": hook_for_all,
    "default dtype": lambda: default_dtype(torch.float64),
    "gradients": torch.enable_grad,
}
original_forward = type(Toy().layers[0]).forward


def doubled_forward(self: Any, x: Tensor, m: Tensor) -> Any:
    return original_forward(self, 2 * x, m)


@pytest.mark.parametrize("name", AMBIENT)
@torch.no_grad()
def test_around_the_model(name: str) -> None:
    model, x = made(Everything), features(2)
    fast = rmtcompile.optimize(model)
    before = fast(x)
    with AMBIENT[name]():
        assert_same(model(x), fast(x))
        assert fast.captures == 2
    assert_same(before, fast(x))
    assert fast.captures == 2  # the first program is still there


FACTOR = 2.0


class Runner:
    """A plain object whose method is optimized."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.shift, self.unused = model, 1.0, 0

    def run(self, x: Tensor) -> Tensor:
        return self.model(x) + self.shift


@torch.no_grad()
def test_closures_globals_and_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, x = made(lambda: Toy(2)), made(lambda: Toy(2), seed=1), features(2)
    shift, parts, weight = 1.0, [1.0], ones(D)

    def fn(x: Tensor) -> Tensor:
        return model(x) * FACTOR * weight + shift + sum(parts)

    runner = Runner(model)
    partial = functools.partial(lambda x, scale: model(x) * scale["by"], scale={"by": 2.0})
    fasts = [(f, rmtcompile.optimize(f)) for f in (fn, runner.run, partial)]

    def check() -> None:
        for f, fast in fasts:
            assert_same(f(x), fast(x))

    check()
    shift = 2.0
    check()
    parts.append(3.0)
    check()
    weight = 2 * ones(D)
    check()
    monkeypatch.setitem(globals(), "FACTOR", 5.0)
    check()
    runner.shift, partial.keywords["scale"]["by"] = 7.0, 3.0
    check()
    model = runner.model = other
    check()
    captures = [fast.captures for _, fast in fasts]
    runner.unused += 1
    check()
    assert captures == [fast.captures for _, fast in fasts]


@torch.no_grad()
def test_objects_as_arguments() -> None:
    class WithObject(Toy):
        def forward(self, x: Tensor, scale: Any = None) -> Tensor:
            return super().forward(x * scale.factor + scale.inner.shift)

    model, x = made(WithObject), features(2)
    fast = rmtcompile.optimize(model)
    scale = Scale(2.0)
    assert_same(model(x, scale), fast(x, scale))
    scale.inner.shift = 4.0
    assert_same(model(x, scale), fast(x, scale))
    assert_same(model(x, Scale(3.0)), fast(x, Scale(3.0)))
    scale.factor = ones(D)
    with pytest.raises(UnsupportedError, match="an argument holds tensors inside an object") as caught:
        fast(x, scale)
    assert "help: pass the tensors themselves" in str(caught.value)


class AnySegments(Toy):
    """The length of a segment is an attribute."""

    segment = SEGMENT

    def forward(self, x: Tensor) -> Tensor:
        memory = [x.new_zeros(x.shape[0], x.shape[2]) for _ in self.layers]
        out = []
        for h in x.split(self.segment, 1):
            for l, layer in enumerate(self.layers):
                h, memory[l] = layer(h, memory[l])
            out.append(h)
        return torch.cat(out, 1)


@torch.no_grad()
def test_another_segment_length() -> None:
    model, x = made(AnySegments), features(8)
    fast = rmtcompile.optimize(model)
    for model.segment in (SEGMENT, 2 * SEGMENT, SEGMENT + 2, SEGMENT):
        assert_same(model(x), fast(x))
    assert fast.schedule.n_segments == 8 and fast.captures == 3


class Tied(Toy):
    """Two layers have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2].mix.weight = self.layers[0].mix.weight


@torch.no_grad()
def test_weights_that_are_tied_no_more() -> None:
    model, x = made(Tied), features(3)
    fast = rmtcompile.optimize(model)
    fast(x)
    model.layers[2].mix.weight = nn.Parameter(2 * model.layers[2].mix.weight)
    assert_same(model(x), fast(x))
    assert fast.captures == 2
    model.layers[2].mix.weight = model.layers[0].mix.weight
    assert_same(model(x), fast(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_another_dtype_of_the_weights_alone(dtype: torch.dtype) -> None:
    """The parameters stay the same objects, and the inputs are integers."""

    class Embedded(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, D)

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(self.embed(ids))

    model, ids = made(Embedded), torch.arange(12)[None] % 9
    fast = rmtcompile.optimize(model)
    fast(ids)
    model.to(dtype)
    assert fast(ids).dtype is dtype
    assert_same(model(ids), fast(ids), 0.05 if dtype is torch.bfloat16 else 1e-5)


def test_backward_hooks_are_refused() -> None:
    model, x = made(Toy), features(2)
    fast = rmtcompile.optimize(model)
    fast(x)
    model.layers[1].register_full_backward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match="backward hooks") as caught:
        fast(x)
    lines = str(caught.value).splitlines()
    assert lines[1] == "  layers.1" and lines[-1].startswith("  help: remove them")
    with torch.no_grad():
        assert_same(model(x), fast(x))


def test_hooks_of_parameters_run() -> None:
    model, x, seen = made(Toy), features(2), []
    fast = rmtcompile.optimize(model)
    model.layers[0].mix.weight.register_hook(lambda grad: seen.append(0))
    fast(x).sum().backward()
    assert seen == [0]


class Keeps(Toy):
    """Carries its states from call to call, in a list that each forward replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = [torch.zeros(2, D, dtype=torch.float64) for _ in self.layers]

    def forward(self, x: Tensor) -> Tensor:
        memory, out = list(self.memory), []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, memory[l] = layer(h, memory[l])
            out.append(h)
        self.memory = memory
        return torch.cat(out, 1)


@torch.no_grad()
def test_state_in_a_list_that_is_replaced() -> None:
    model, twin = made(Keeps), made(Keeps)
    fast = rmtcompile.optimize(twin)
    for segments in (3, 2, 3):
        assert_same(model(features(segments)), fast(features(segments)))
        assert_same(model.memory, twin.memory)
    assert fast.captures == 1
    twin.memory[1] = model.memory[1] = ones(2, D)
    assert_same(model(features(3)), fast(features(3)))
    twin.memory.append(ones(2, D))
    fast(features(3))
    assert fast.captures == 2


class FillsOnce(Toy):
    """Makes a table at its first forward and whenever a segment is longer than before."""

    def __init__(self) -> None:
        super().__init__()
        self.length, self.table = 0, torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.length < SEGMENT:
            self.length, self.table = SEGMENT, torch.arange(SEGMENT).to(x)
        return super().forward(x + self.table.repeat(x.shape[1] // SEGMENT)[:, None])


@torch.no_grad()
def test_a_first_call_that_differs() -> None:
    model, twin = made(FillsOnce), made(FillsOnce)
    fast = rmtcompile.optimize(twin)
    for segments in (3, 2, 4):
        assert_same(model(features(segments)), fast(features(segments)))
        assert_same((model.length, model.table), (twin.length, twin.table))
    assert fast.captures == 2  # cold and warm


@torch.no_grad()
def test_state_outside_of_modules_is_refused() -> None:
    model, kept = made(Toy), [ones(1)]

    def fn(x: Tensor) -> Tensor:
        kept[0] = x.mean()
        return model(x)

    with pytest.raises(CaptureError, match="keeps state outside of its modules") as caught:
        rmtcompile.optimize(fn)(features(2))
    assert str(caught.value).splitlines()[1] == "  kept"
    assert torch.equal(kept[0], ones(1))


@torch.no_grad()
def test_a_log_of_calls_is_no_state() -> None:
    model, calls = made(Toy), []

    def fn(x: Tensor) -> Tensor:
        calls.append(len(x))
        return model(x)

    fast = rmtcompile.optimize(fn)
    assert_same(model(features(2)), fast(features(2)))
    calls.clear()
    assert_same(model(features(3)), fast(features(3)))
    assert fast.captures == 1


class Counting(Toy):
    """Counts its calls in a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1 if self.calls >= 0 else 0
        return super().forward(x)


@torch.no_grad()
def test_captures_again_and_again_are_told_once() -> None:
    model = made(Counting)
    fast, x = rmtcompile.optimize(copy.deepcopy(model)), features(3)
    for _ in range(CHANGES):
        assert_same(model(x), fast(x))
    with pytest.warns(rmtcompile.RecaptureWarning, match=r"calls was 7 and is 8"):
        assert_same(model(x), fast(x))
    assert_same(model(x), fast(x))  # warnings are errors
    assert fast.model.calls == model.calls == 10


class Named(Toy):
    """Its attribute has the name of a variable beside it, as in a notebook."""

    def forward(self, x: Tensor) -> Tensor:
        self.latest = x.mean()
        return super().forward(x) + self.latest


latest: Any = None
"""What the last call gave."""


@torch.no_grad()
def test_a_variable_of_the_name_of_an_attribute_is_no_part_of_the_forward() -> None:
    fast = rmtcompile.optimize(made(Named))
    for segments in (3, 4, 3, 5):
        globals()["latest"] = fast(features(segments))
        assert_same(fast.model(features(segments)), latest)
    assert fast.captures == 1
