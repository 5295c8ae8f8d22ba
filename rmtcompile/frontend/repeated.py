"""Repeated: an operation like an earlier one is noted in the graph, and not computed again.

    h = linear(x, w_0)      computed: fake tensors go through autograd, decompositions and meta kernels
    h = linear(h, w_1)      operands of the same kinds: what it gives looks like what the first one gave

A forward does the same in each layer of each segment, and is captured with several numbers of segments. So
what an operation gives for operands of some kinds is kept, across captures. Computed each time are operations
that write, whatever needs values, and views that gradients are recorded of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.backends import cuda
from torch.fx.experimental import proxy_tensor

from rmtcompile.frontend.known import Known

MOST = 20_000
"""Kinds of calls that are kept."""

aten = torch.ops.aten

_OTHERS = {aten.as_strided.default, aten.lift_fresh.default}
"""Operations whose results do not lie in memory relative to what they read, or that are traced as others."""

_ATTENTION = aten.scaled_dot_product_attention.default

_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}

_STATIC = (bool, int, float, type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class _Result:
    """How a result lies in memory.

    Attributes:
        of: which of the tensors that the call was given has the same memory; None for new memory.
        is_given: whether it is that tensor itself.
        offset: from where that tensor begins.
        has_gradients: whether these are recorded.
        fields: of the fake tensor.
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
        self, given: list[torch.Tensor], mode: Any, refuse: Callable[[], None]
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

    def _fake(self, elem: torch.Tensor, mode: Any) -> Any:
        value = torch.Tensor._make_subclass(
            FakeTensor, elem, False, dispatch_device=True, device_for_backend_keys=self.device
        )
        torch._C._set_throw_on_mutable_data_ptr(value)
        value.__dict__.update(self.fields, fake_mode=mode)
        return value


@dataclass(frozen=True)
class _Answer:
    """What a call gives: results, and the type that holds them if they are several; the name of its node."""

    name: str
    results: tuple[_Result, ...]
    form: Any


_answers: dict[Any, _Answer] = {}


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


_derived: Any = super(torch.autograd.Function, _Derived).apply  # not what tracing makes of other functions


class _OtherError(Exception):
    """A call has arguments of which nothing is kept."""


class Repeated:
    """Stands before the mode that traces, for as long as it does.

    Args:
        mode: the mode of `make_fx`, above autograd.
        fakes: the mode of the fake tensors.
        known: what follows the values of the forward.
        refuse: called where the forward takes gradients itself, of which nothing can be known here.
    """

    def __init__(
        self,
        mode: proxy_tensor.ProxyTorchDispatchMode,
        fakes: FakeTensorMode,
        known: Known,
        refuse: Callable[[], None],
    ) -> None:
        self._tracer: Any = mode.tracer
        self._trace = mode.__torch_dispatch__
        self._fakes = fakes
        self._known, self._refuse = known, refuse
        mode.__torch_dispatch__ = self._dispatched  # type: ignore[method-assign]

    def _dispatched(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given: list[torch.Tensor] = []
        key = self._key(func, args, kwargs, given) if _is_settled(func) else None
        if key is None:
            return self._trace(func, types, args, kwargs)
        answer = _answers.get(key)
        if answer is not None:
            return self._again(func, args, kwargs, answer, given)
        result = self._trace(func, types, args, kwargs)
        results = _results(result, given)
        if results:
            if len(_answers) >= MOST:
                _answers.clear()
            name = self._tracer.graph._target_to_str(func.overloadpacket.__name__)
            form = type(result) if isinstance(result, (tuple, list)) else None
            _answers[key] = _Answer(name, results, form)
        return result

    def _key(self, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor]) -> Any:
        """What decides how the results look; None where that is not all there is to a call."""
        if torch._C._is_any_autocast_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
            return None
        if torch.autograd.forward_ad._current_level >= 0:
            return None
        try:
            values = tuple([_kind(value, given) for value in args])
            named = tuple([(name, _kind(value, given)) for name, value in kwargs.items()])
        except _OtherError:
            return None
        for tensor in given:
            slot = self._slot(tensor)
            if slot.constant is not None if slot is not None else type(tensor) is FakeTensor:
                return None  # its contents may be asked for
        settings = (torch.is_grad_enabled(), torch.get_default_dtype())
        return func, values, named, settings, _kernels() if func is _ATTENTION else None

    def _slot(self, tensor: torch.Tensor) -> Any:
        """What the tracer knows of a tensor."""
        return self._tracer.tensor_tracker.get(tensor)

    def _again(
        self, func: Any, args: Any, kwargs: Any, answer: _Answer, given: list[torch.Tensor]
    ) -> Any:
        """Note a call like an earlier one, and give what it gives."""
        tracer = self._tracer
        operands = tuple([self._noted(value) for value in args])
        named = {name: self._noted(value) for name, value in kwargs.items()}
        node = tracer.create_node("call_function", func, operands, named, answer.name)
        pairs = [result.made(given, self._fakes, self._refuse) for result in answer.results]
        values = [(value, result.of) for (value, _), result in zip(pairs, answer.results, strict=True)]
        self._known.note(func, args, kwargs, given, values)
        if answer.form is None:
            return self._tracked(node, *pairs[0])
        node.meta["val"] = answer.form([kept for _, kept in pairs])
        parts = fx.Proxy(node, tracer)
        return answer.form([self._tracked(parts[i].node, *pair) for i, pair in enumerate(pairs)])

    def _noted(self, value: Any) -> Any:
        """An argument as it stands in the graph."""
        if isinstance(value, torch.Tensor):
            slot = self._slot(value)
            return slot.proxy.node if slot is not None else self._tracer.create_arg(value)
        return type(value)([self._noted(one) for one in value]) if type(value) in (list, tuple) else value

    def _tracked(self, node: fx.Node, value: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Tie a tensor to the node that gives it."""
        node.meta["val"] = kept
        self._tracer.tensor_tracker[value] = proxy_tensor._ProxyTensor(fx.Proxy(node, self._tracer), None)
        return value


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
        if value.layout is not torch.strided:
            raise _OtherError
        given.append(value)
        keys = torch._C._dispatch_keys(value).raw_repr()
        return keys, value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if kind in (list, tuple):
        return kind, tuple([_kind(one, given) for one in value])
    if kind not in _STATIC:
        raise _OtherError
    return kind, value


def _kernels() -> tuple[bool, ...]:
    """Which kernels attention may use: how its result lies in memory depends on it."""
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()


def _results(result: Any, given: list[torch.Tensor]) -> tuple[_Result, ...]:
    """What is to be kept of what a call gave; nothing where that is not enough to make the like."""
    values = result if isinstance(result, (tuple, list)) else (result,)
    if not all(type(x) is FakeTensor and x.constant is None for x in values):
        return ()
    if any(x.layout is not torch.strided or x.is_conj() or x.is_neg() for x in values):
        return ()
    mode = values[0].fake_mode if values else None
    fakes = [x if isinstance(x, FakeTensor) else mode.from_tensor(x) for x in given]
    memories = [x.untyped_storage()._cdata for x in fakes]
    found = []
    for i, x in enumerate(values):
        memory, is_given = x.untyped_storage()._cdata, any(x is one for one in given)
        of = next((k for k, one in enumerate(given) if x is one), None)
        if of is None and memory in memories:
            of = memories.index(memory)
        elif of is None and any(memory == y.untyped_storage()._cdata for y in values[:i]):
            return ()
        base = fakes[of] if of is not None else None
        if base is not None and (base is not given[of] or base.dtype != x.dtype or x.requires_grad):
            return ()
        offset = x.storage_offset() - (base.storage_offset() if base is not None else 0)
        if base is None and offset:
            return ()
        fields = dict(x.__dict__)
        size, kind = (tuple(x.shape), x.stride(), offset), (x.dtype, x.device, x.requires_grad)
        found.append(_Result(of, is_given, *size, *kind, fields))
    return tuple(found)
