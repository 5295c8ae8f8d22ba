"""Odd models and odd inputs: the right result or a refusal, never another error, and never noise.

`met` is the rule; each case is one call, without and with `fallback="sequential"`. What a model raises by
itself is a refusal where it shows while the forward is traced, and the model's own error where it shows when
the program runs.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_refusals import Walk, refusal
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from toys import SEGMENT, WIDTH, Toy, assert_same, features, made

import rmtcompile
from rmtcompile.errors import (
    CaptureError,
    FallbackWarning,
    InternalError,
    UnsupportedError,
    VerificationError,
)

Call = tuple[tuple[Any, ...], dict[str, Any]]


def outcome(f: Callable[..., Any], call: Call) -> Any:
    """The result, or the exception."""
    try:
        return f(*call[0], **call[1])
    except Exception as error:
        return error


def met(build: Callable[[], Any], calls: list[Call]) -> list[Any]:
    """Assert the rule for these calls in a row; gives what came of each without a fallback."""
    results = []
    for fallback in (None, "sequential"):
        if fallback is not None and not any(isinstance(result, Exception) for result in results):
            break
        model = build()
        fast = rmtcompile.optimize(build(), fallback=fallback)
        for call in calls:
            expected, mine = outcome(model, copied(call)), copied(call)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                got = outcome(fast, mine)
            if fallback is None:
                results.append(got)
                if isinstance(got, UnsupportedError):
                    assert got.remedy
                    continue
            if isinstance(expected, Exception):
                assert type(got) is type(expected) and str(got) == str(expected)
            else:
                assert not isinstance(got, Exception), repr(got)
                assert_same(expected, got)
    return results


def copied(call: Call) -> Call:
    with torch.inference_mode(False):
        flat, spec = pytree.tree_flatten(call)
        flat = [copy.deepcopy(x) if isinstance(x, Tensor) and not x.is_inference() else x for x in flat]
        again: Call = pytree.tree_unflatten(flat, spec)
    return again


@pytest.fixture(autouse=True)
def _silent(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Any:
    """No test of this file prints or logs anything."""
    caplog.set_level(logging.WARNING)
    yield
    assert [record.message for record in caplog.records] == []
    assert capfd.readouterr() == ("", "")


class Ids(Walk):
    """Tokens, with optional and other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)

    def forward(self, ids: Tensor, mask: Any = None, scale: Any = 1.0, **other: Any) -> Tensor:
        x = self.embed(ids) * scale
        return super().forward(x if mask is None else x * mask[..., None])


def tokens(batch: int = 2, length: int = 9, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.randint(0, 32, (batch, length), generator=torch.Generator().manual_seed(length)).to(dtype)


def call(*args: Any, **kwargs: Any) -> Call:
    return args, kwargs


# --- inputs -------------------------------------------------------------------------------------------------


class Sub(Tensor):
    """A subclass of the user's own."""


class Scaled(Tensor):
    """Integers and a scale that stand for numbers, as a quantised weight does."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.integers, self.scale = data, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Scaled(args[0].integers, args[0].scale)
        args, kwargs = pytree.tree_map_only(
            Scaled, lambda t: t.integers.to(t.scale.dtype) * t.scale, (args, kwargs or {})
        )
        return func(*args, **kwargs)


SAME: dict[str, list[Call]] = {
    "int32": [call(tokens(dtype=torch.int32)), call(tokens(length=15, dtype=torch.int32))],
    "keywords": [call(ids=tokens()), call(tokens(), None), call(tokens(), mask=None, scale=1.0, other=3)],
    "numbers": [call(tokens(), None, 2), call(tokens(), None, True), call(tokens(), None, torch.tensor(2.0))],
    "masks": [call(tokens(), tokens() > 5), call(tokens(), torch.ones(1, 1).bool().expand(2, 9))],
    "batches": [call(tokens(batch=b)) for b in (2, 3, 1)],
    "lengths": [call(tokens(length=t)) for t in (9, 1, 4, 10)],
    "one token first": [call(tokens(1, 1)), call(tokens(1, 2)), call(tokens())],
}


@torch.no_grad()
@pytest.mark.parametrize("name", SAME)
def test_inputs_that_run(name: str) -> None:
    assert all(isinstance(result, Tensor) for result in met(lambda: made(Ids), SAME[name]))


@torch.inference_mode()
def made_in_inference_mode(x: Tensor) -> Tensor:
    return x * 1


STRIDED: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: features(3).mT.contiguous().mT,
    "every second": lambda: features(6)[:, ::2],
    "expanded": lambda: features(3)[:, :1].expand(2, 9, WIDTH),
    "flipped": lambda: features(3).flip(1),
    "parameter": lambda: nn.Parameter(features(3)),
    "view of a leaf": lambda: features(3).requires_grad_()[:, :],
    "inference": lambda: made_in_inference_mode(features(3)),
}


@torch.no_grad()
def test_tensors_of_every_layout_in_memory() -> None:
    calls = [call(build()) for build in STRIDED.values()]
    assert all(isinstance(result, Tensor) for result in met(lambda: made(Walk), calls))


OTHER_KINDS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "subclass": (lambda: features(3).as_subclass(Sub), "test_odd.Sub"),
    "wrapper": (lambda: Scaled(features(3).to(torch.int8), torch.tensor(0.5).double()), "test_odd.Scaled"),
    "sparse": (lambda: features(3).to_sparse(), "torch.sparse_coo"),
    "jagged": (lambda: torch.nested.nested_tensor(list(features(3)), layout=torch.jagged), "NestedTensor"),
}


@torch.no_grad()
def test_tensors_of_other_kinds_are_refused() -> None:
    """They may compute in another way; nothing is asked of them before that."""
    fast = rmtcompile.optimize(made(Walk))
    for _ in range(2):
        for build, kind in OTHER_KINDS.values():
            with pytest.raises(UnsupportedError, match="an argument is not a plain tensor") as caught:
                fast(build())
            assert kind in caught.value.evidence[0]
        fast(features(3))


WRONG: dict[str, Call] = {
    "three dimensions": call(tokens()[:, :, None].expand(2, 9, WIDTH)),
    "one dimension": call(tokens()[0]),
    "no dimension": call(torch.tensor(3)),
    "floats": call(tokens().double()),
    "bytes": call(tokens(dtype=torch.uint8)),
    "a list": call([[1, 2, 3]]),
    "none": call(None),
    "nothing": call(),
    "twice": call(tokens(), ids=tokens()),
    "mask of another batch": call(tokens(), tokens(batch=3) > 5),
    "short mask": call(tokens(), tokens(length=6) > 5),
    "complex scale": call(tokens(), None, 1j),
}


@torch.no_grad()
def test_inputs_that_the_model_refuses() -> None:
    """Readable, also after a call that was right, and in silence."""
    first, *errors, last = met(lambda: made(Ids), [call(tokens()), *WRONG.values(), call(tokens())])
    assert isinstance(first, Tensor) and isinstance(last, Tensor)
    for name, error in zip(WRONG, errors, strict=True):
        assert isinstance(error, CaptureError), name
        assert "could not be traced: " in str(error) or "the model itself raises " in str(error), name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.complex128, torch.long])
def test_inputs_of_another_type_than_the_weights(dtype: torch.dtype) -> None:
    """On fake tensors torch lets them pass."""
    (error,) = met(lambda: made(Walk), [call(features(3).to(dtype))])
    assert "the model itself raises RuntimeError: expected m1 and m2 to have the same dtype" in str(error)
    assert "toys.py:" in error.evidence[0]


@torch.no_grad()
@pytest.mark.parametrize("first", [[], [call(tokens())]])
def test_values_that_the_model_refuses(first: list[Call]) -> None:
    """Values are not seen before the program runs; then the error is the model's own, from its own line."""
    *_, error, after = met(lambda: made(Ids), [*first, call(tokens() + 40), call(tokens())])
    assert isinstance(error, IndexError) and isinstance(after, Tensor)
    names = []
    trace = error.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_qualname)
        trace = trace.tb_next
    assert "Ids.forward" in names


# --- models -------------------------------------------------------------------------------------------------


def compiled_layers() -> nn.Module:
    model = made(Walk)
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend="eager")
    return model


def compiled_in_place() -> nn.Module:
    model = made(Walk)
    for layer in model.layers:
        layer.compile(backend="eager")
    return model


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize(
    "build",
    [
        compiled_layers,
        compiled_in_place,
        lambda: torch.compile(made(Walk), backend="eager"),
        lambda: torch.compile(made(Walk).forward, backend="eager"),
    ],
    ids=["layers", "layers in place", "model", "function"],
)
def test_what_is_compiled_already_is_captured_as_it_was_written(build: Any, mode: Any) -> None:
    with mode():
        expected = made(Walk)(features(4))
        fast = rmtcompile.optimize(build())
        for _ in range(2):
            assert_same(expected, fast(features(4)))
    assert fast.schedule.width == 3


class Attends(Walk):
    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        x, m = super().step(l, x, m)
        return x + flex_attention(x[:, None], x[:, None], x[:, None])[:, 0], m


class Draws(Walk):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + torch.rand(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)


class Chooses(Walk):
    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        x, m = super().step(l, x, m)
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y * 3, (x,)), m


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    ("build", "what"),
    [
        (Attends, "an operator takes a function: flex_attention"),
        (Chooses, "an operator takes a function: cond"),
        (Draws, "an operator takes a Generator: rand.generator"),
    ],
)
def test_operators_that_take_other_things_than_tensors(build: Any, what: str) -> None:
    (error, _) = met(lambda: made(build), [call(features(3)), call(features(2))])
    assert error.what == what and "test_odd.py:" in error.evidence[0]


class Swallows(Walk):
    """Goes on after any error, as a check that must not fail may do."""

    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        try:
            x = x * 2 if float(x.sum()) > 0 else x * 3
        except Exception:
            return x, m
        return super().step(l, x, m)


class SwallowsArrays(Walk):
    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        try:
            x = x + torch.from_numpy(x.numpy())
        except Exception:
            return x, m
        return super().step(l, x, m)


@torch.no_grad()
@pytest.mark.parametrize("build", [Swallows, SwallowsArrays])
def test_errors_of_tracing_cannot_be_swallowed(build: Any) -> None:
    (error,) = met(lambda: made(build), [call(features(3))])
    assert error.what.startswith("the forward goes on after an error that only tracing raises")
    assert "test_odd.py:" in error.evidence[0]


def quantised(model: nn.Module) -> nn.Module:
    """Weights in integers, as torchao's `quantize_` does it."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            scale = weight.abs().max() / 127
            scaled = Scaled((weight / scale).round().to(torch.int8), scale)
            module.weight = nn.Parameter(scaled, requires_grad=False)
    return model


@torch.no_grad()
def test_quantised_weights() -> None:
    (error,) = met(lambda: quantised(made(Walk)), [call(features(3))])
    assert "the model holds layers.0.mix.weight: test_odd.Scaled" in error.evidence
    model = made(Walk)
    fast = rmtcompile.optimize(model)
    fast(features(3))
    quantised(model)  # of the same shapes and types
    with pytest.raises(CaptureError, match=r"layers.0.mix.weight: test_odd.Scaled"):
        fast(features(3))


class Sparse(Walk):
    def __init__(self) -> None:
        super().__init__()
        mixed = nn.Parameter(torch.eye(WIDTH).to_sparse())
        self.mix = nn.ParameterList([mixed] * 3)

    def step(self, l: int, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        x, m = super().step(l, x, m)
        return torch.sparse.mm(self.mix[l], x.reshape(-1, WIDTH).T).T.reshape(x.shape), m


class Lazy(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


@torch.no_grad()
def test_parameters_of_other_kinds() -> None:
    lines = refusal(made(Sparse), features(3))
    assert lines[0] == "the forward reads a tensor that is not a plain one"
    assert lines[1] == "  mix.0: a tensor of torch.sparse_coo"
    model = made(Lazy)
    lines = refusal(model, features(3))
    assert lines[:2] == ["the model has parameters that are not initialised yet", "  head.weight"]
    expected = model(features(3))
    assert_same(expected, rmtcompile.optimize(model)(features(3)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@torch.no_grad()
def test_scripted_layers() -> None:
    def build() -> nn.Module:
        model = made(Walk)
        for i, layer in enumerate(model.layers):
            model.layers[i] = torch.jit.script(layer)
        return model

    assert all(isinstance(result, Tensor) for result in met(build, [call(features(s)) for s in (3, 5, 3)]))


def test_a_model_made_in_inference_mode() -> None:
    """Its parameters become views of memory of the same kind, so that the model runs on."""
    with torch.inference_mode():
        model = made(Ids)
        expected = model(tokens())
        fast = rmtcompile.optimize(model)
        for ids in (tokens(), tokens().int(), tokens()):
            assert_same(expected, fast(ids))
        assert_same(expected, model(tokens()))
    with torch.no_grad():
        assert_same(expected.clone(), fast(tokens()))


# --- several processes --------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_data_parallel_models() -> None:
    (error,) = met(lambda: DistributedDataParallel(made(Walk)), [call(features(3))])
    assert error.what == "a wrapper around the model joins gradients or buffers of several processes"
    with torch.no_grad():
        (result,) = met(lambda: DistributedDataParallel(made(Walk)), [call(features(3))])
        assert isinstance(result, Tensor)


@pytest.mark.usefixtures("group")
def test_data_parallel_around_a_program() -> None:
    """The program as the forward of a module."""
    theirs, mine = DistributedDataParallel(made(Walk)), made(Walk)
    mine.forward = rmtcompile.optimize(mine.forward)
    wrapped = DistributedDataParallel(mine)
    for segments in (3, 4):
        for model in (theirs, wrapped):
            model(features(segments)).square().mean().backward()
    assert mine.forward.captures == 1
    for a, b in zip(theirs.parameters(), wrapped.parameters(), strict=True):
        assert_same(a.grad, b.grad, 1e-9)


# --- the boundary -------------------------------------------------------------------------------------------


def broken(*_: Any, **__: Any) -> Any:
    raise KeyError("a bug")


@torch.no_grad()
@pytest.mark.parametrize(
    "place", ["rmtcompile.compiler.pipeline.allocate_lanes", "rmtcompile.runtime.execute.Executor.run"]
)
def test_a_bug_is_told_from_a_refusal(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Walk)
    expected = model(features(3))
    monkeypatch.setattr(place, broken)
    with pytest.raises(InternalError) as caught:
        rmtcompile.optimize(model)(features(3))
    lines = str(caught.value).splitlines()
    assert lines[0] == "rmtcompile failed where the model itself runs: KeyError: 'a bug'"
    assert lines[-1].startswith("  help: this is a bug, please report it; fallback='sequential' runs")
    fast = rmtcompile.optimize(model, fallback="sequential")
    for _ in range(2):
        with pytest.warns(FallbackWarning, match="running the model as it is: rmtcompile failed where"):
            assert_same(expected, fast(features(3)))


class Counts(Walk):
    """Counts its calls and keeps a state, before and behind a check."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        if x.shape[1] == 2 * SEGMENT:
            raise ValueError("two segments are none")
        return super().forward(x)


@torch.no_grad()
def test_a_failed_call_leaves_the_model_as_it_was() -> None:
    model = made(Counts)
    fast = rmtcompile.optimize(model)
    for _ in range(2):
        with pytest.raises(CaptureError, match="ValueError: two segments are none"):
            fast(features(2))
        assert (model.calls, float(model.seen)) == (0, 0.0)
    random = torch.get_rng_state()
    broke = made(Walk).float()
    with pytest.raises(CaptureError, match="the model itself raises"):
        rmtcompile.optimize(broke)(features(3))
    assert torch.equal(random, torch.get_rng_state())


@torch.no_grad()
def test_verify_is_not_fallen_back_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmtcompile.dispatch.programs.difference", lambda *_: "the result differs")
    monkeypatch.setattr("rmtcompile.dispatch.lengths.first_difference", lambda *_: ["everywhere"])
    fast = rmtcompile.optimize(made(Toy), fallback="sequential", verify=True)
    with pytest.raises(VerificationError, match="the result differs"):
        fast(features(3))


@torch.no_grad()
def test_warnings_that_are_errors_stay_what_they_are() -> None:
    """The first test of a user with `-W error`."""
    model = made(functools.partial(Toy, up=-2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(rmtcompile.SequentialScheduleWarning):
            rmtcompile.optimize(model)(features(4))


@torch.no_grad()
def test_threads() -> None:
    """Several call one program, some for the first time."""
    model = made(Walk)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    expected = {s: model(features(s)) for s in (3, 4, 5)}
    failures: list[BaseException] = []

    def run(s: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(3):
                    assert_same(expected[s], fast(features(s)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(s,)) for s in (3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# --- options ------------------------------------------------------------------------------------------------


def test_options_that_cannot_be_kept_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"a backend of torch.compile \(.*inductor.*\), not 'foo'"):
        rmtcompile.optimize(made(Walk), backend="foo")
    rmtcompile.optimize(made(Walk), backend="aot_eager")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda_graphs=True needs a CUDA device"):
        rmtcompile.optimize(made(Walk), cuda_graphs=True)


@torch.no_grad()
def test_graphs_of_a_model_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        fast = rmtcompile.optimize(made(Walk), cuda_graphs=True)
    with pytest.raises(UnsupportedError, match="cuda_graphs=True, and the model runs on cpu"):
        fast(features(3))


def test_a_line_is_said_once() -> None:
    error = UnsupportedError("what", ["a.py:1", "a.py:2", "a.py:1", "a.py:1"], "do this")
    assert str(error).splitlines() == ["what", "  a.py:1", "  a.py:2", "  help: do this"]
