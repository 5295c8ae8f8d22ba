"""Fakes: what an operation gives for operands of some kinds, known from an earlier call of it.

    linear(x: f64[2, 8, 16], w: f64[16, 16])    computed: a fake tensor f64[2, 8, 16], in memory of its own
    linear(h: f64[2, 8, 16], w: f64[16, 16])    the like is made, in a tenth of the time

Kept is how results lie in memory: in new memory, or in that of an operand. Operations that write, or that
need values, are computed each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.backends import cuda
from torch.fx.immutable_collections import immutable_list

MOST = 20_000
"""Kinds of calls that are kept."""

aten = torch.ops.aten

_OTHERS = {aten.as_strided.default, aten.lift_fresh.default}
"""Operations whose results do not lie in memory relative to what they read, or that are traced as others."""

_ATTENTION = aten.scaled_dot_product_attention.default

_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}

_STATIC = (bool, int, float, type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Result:
    """How a result lies in memory.

    Attributes:
        of: which of the tensors that the call was given has the same memory; None for new memory.
        is_given: whether it is that tensor itself.
        offset: from where that tensor begins.
        has_gradients: whether these are recorded.
        fields: of the fake tensor, but for its mode.
    """

    of: int | None
    is_given: bool
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    has_gradients: bool
    fields: dict[str, Any]

    def made(
        self, given: list[torch.Tensor], mode: FakeTensorMode, refuse: Callable[[], None] = lambda: None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The result, and another tensor in the same memory, for the graph to keep.

        Args:
            refuse: called where gradients are taken.
        """
        with torch._C._DisableTorchDispatch(), torch._C._DisablePythonDispatcher(), torch.no_grad():
            if self.of is None:
                elem = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")
            else:
                base = given[self.of]
                elem = torch.as_strided(base, self.size, self.stride, base.storage_offset() + self.offset)
            kept = self._fake(elem, mode)
            if self.of is not None and self.is_given:
                return given[self.of], kept
        if self.has_gradients:
            sources = [x for x in given if x.requires_grad]
            return _derived(lambda: self._fake(elem, mode), refuse, *sources), kept
        return self._fake(elem, mode), kept

    def _fake(self, elem: torch.Tensor, mode: FakeTensorMode) -> Any:
        value = torch.Tensor._make_subclass(
            FakeTensor, elem, False, dispatch_device=True, device_for_backend_keys=self.device
        )
        torch._C._set_throw_on_mutable_data_ptr(value)
        value.__dict__.update(self.fields, fake_mode=mode)
        return value


@dataclass(frozen=True)
class Answer:
    """What a call gives: results, and the type that holds them if they are several."""

    results: tuple[Result, ...]
    form: Any


_answers: dict[Any, Answer] = {}


class _Derived(torch.autograd.Function):
    """Makes a tensor that comes from others, as far as autograd can see."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Any], refuse: Callable[[], None], *sources: Any) -> Any:
        ctx.refuse = refuse
        return make()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.refuse()
        raise RuntimeError("gradients of what was not computed")


_derived: Any = super(torch.autograd.Function, _Derived).apply  # as it is, whatever is made of others


class _OtherError(Exception):
    """A call has arguments of which nothing is kept."""


def fake_of(mode: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    """A fake tensor of this mode, in memory of its own, that looks like a real one, without gradients."""
    with torch._C._DisableTorchDispatch(), torch._C._DisablePythonDispatcher(), torch.no_grad():
        elem = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return FakeTensor(mode, elem, value.device)


def computed(mode: FakeTensorMode, func: Any, args: Any, kwargs: Any) -> Any:
    """What a call on fake tensors of this mode gives, without gradients."""
    given: list[torch.Tensor] = []
    key = key_of(func, args, kwargs, given)
    if not all(type(x) is FakeTensor and x.fake_mode is mode and x.constant is None for x in given):
        key = None
    with torch.no_grad():
        answer = answer_of(key)
        if answer is None:
            with mode:
                result = func(*args, **kwargs)
            keep(key, result, given)
            return result
        values = [result.made(given, mode)[0] for result in answer.results]
    return values[0] if answer.form is None else answer.form(values)


def key_of(func: Any, args: Any, kwargs: Any, given: list[torch.Tensor], where: str = "") -> Any:
    """What decides how the results of a call look; None where that is not all there is to it.

    Args:
        given: gets the tensors among the arguments.
        where: what else decides it.
    """
    if not _is_settled(func) or torch._C._is_any_autocast_enabled():
        return None
    try:
        values = tuple([_kind(value, given) for value in args])
        named = tuple([(name, _kind(value, given)) for name, value in kwargs.items()])
    except _OtherError:
        return None
    settings = torch.is_grad_enabled(), torch.get_default_dtype(), where
    kernels = _kernels() if func is _ATTENTION else None
    return func, values, named, settings, _shared(given) if len(given) > 1 else None, kernels


def _shared(given: list[torch.Tensor]) -> tuple[Any, ...]:
    """Which of the tensors that a call is given are one tensor, and where they lie in the same memory."""
    first: dict[int, tuple[int, Any]] = {}
    found: list[Any] = []
    for i, x in enumerate(given):
        at, start = first.setdefault(_memory(x), (i, x.storage_offset()))
        same = next(k for k, other in enumerate(given) if other is x)
        found.append((same, at, x.storage_offset() - start) if at < i else None)
    return tuple(found)


def answer_of(key: Any) -> Answer | None:
    """What was kept of a call like this one."""
    return _answers.get(key) if key is not None else None


def keep(key: Any, result: Any, given: list[torch.Tensor]) -> None:
    """Keep what a call gave, if that is enough to make the like."""
    results = _results(result, given) if key is not None else ()
    if results:
        if len(_answers) >= MOST:
            _answers.clear()
        _answers[key] = Answer(results, type(result) if isinstance(result, (tuple, list)) else None)


@functools.cache
def _is_settled(func: Any) -> bool:
    """Whether an operation does nothing but make tensors or views, which look as its arguments have it."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten" or func in _OTHERS:
        return False
    sides = (*func._schema.arguments, *func._schema.returns)
    writes = any(one.alias_info is not None and one.alias_info.is_write for one in sides)
    results = {str(result.type) for result in func._schema.returns}
    return not writes and not _TAGS & set(func.tags) and results in ({"Tensor"}, {"List[Tensor]"})


def _kind(value: Any, given: list[torch.Tensor]) -> Any:
    """What decides of an argument how the results look.

    Args:
        given: gets the tensors.
    """
    kind = type(value)
    if kind is FakeTensor or kind is nn.Parameter or (kind is torch.Tensor and value.dim()):
        if value.layout is not torch.strided or (kind is torch.Tensor and not _is_real(value)):
            raise _OtherError
        given.append(value)
        keys = torch._C._dispatch_keys(value).raw_repr()
        return keys, value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if kind in (list, tuple, immutable_list):
        return kind, tuple([_kind(one, given) for one in value])
    if kind not in _STATIC:
        raise _OtherError
    return kind, value


def _is_real(value: torch.Tensor) -> bool:
    """Whether it holds numbers, and no integers: from these a call may read sizes (`tensor_split`)."""
    return value.is_floating_point() or value.is_complex() or value.dtype is torch.bool


def _kernels() -> tuple[Any, ...]:
    """Which kernels attention may use, the first choice first: the layout of its result depends on it."""
    enabled = (
        cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled, cuda.cudnn_sdp_enabled
    )  # fmt: skip
    return *(is_enabled() for is_enabled in enabled), *torch._C._get_sdp_priority_order()


def _results(result: Any, given: list[torch.Tensor]) -> tuple[Result, ...]:
    """What is to be kept of what a call gave; nothing where that is not enough to make the like."""
    values = result if isinstance(result, (tuple, list)) else (result,)
    if not values or not all(type(x) is FakeTensor and x.constant is None for x in values):
        return ()
    if any(x.layout is not torch.strided or x.is_conj() or x.is_neg() for x in values):
        return ()
    mode: Any = values[0].fake_mode
    fakes = [x if isinstance(x, FakeTensor) else mode.from_tensor(x) for x in given]
    memories = [_memory(x) for x in fakes]
    found: list[Result] = []
    for i, x in enumerate(values):
        of = next((k for k, one in enumerate(given) if x is one), None)
        is_given, offset = of is not None, x.storage_offset()
        if of is None and _memory(x) in memories:
            of = memories.index(_memory(x))
        if of is None:
            if offset or any(_memory(x) == _memory(other) for other in values[:i]):
                return ()
        else:
            base = fakes[of]
            if base is not given[of] or base.dtype != x.dtype or x.requires_grad:
                return ()
            offset -= base.storage_offset()
        size, kind = (tuple(x.shape), x.stride(), offset), (x.dtype, x.device, x.requires_grad)
        fields = {name: value for name, value in vars(x).items() if name != "fake_mode"}
        found.append(Result(of, is_given, *size, *kind, fields))
    return tuple(found)


def _memory(value: torch.Tensor) -> int:
    return value.untyped_storage()._cdata
