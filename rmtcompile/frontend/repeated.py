"""Repeated: an operation like an earlier one is noted in the graph, and not computed again.

    h = linear(x, w_0)      computed: fake tensors go through autograd, decompositions and meta kernels
    h = linear(h, w_1)      operands of the same kinds: what it gives looks like what the first one gave

A forward does the same in each layer of each segment, and is captured with several numbers of segments. So
what an operation gives for operands of some kinds is kept, across captures (`rmtcompile/ir/fakes.py`). Views
that gradients are recorded of are computed each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import proxy_tensor

from rmtcompile.frontend.known import Known
from rmtcompile.ir.fakes import Answer, answer_of, keep, key_of


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
        key = None if _is_transformed() else key_of(func, args, kwargs, given, "traced")
        if not all(self._is_open(tensor) for tensor in given):
            key = None
        answer = answer_of(key)
        if answer is not None:
            return self._again(func, args, kwargs, answer, given)
        result = self._trace(func, types, args, kwargs)
        keep(key, result, given)
        return result

    def _is_open(self, tensor: torch.Tensor) -> bool:
        """Whether nothing is known of a tensor here that may be asked for."""
        slot = self._slot(tensor)
        return slot.constant is None if slot is not None else type(tensor) is not FakeTensor

    def _slot(self, tensor: torch.Tensor) -> Any:
        """What the tracer knows of a tensor."""
        return self._tracer.tensor_tracker.get(tensor)

    def _again(self, func: Any, args: Any, kwargs: Any, answer: Answer, given: list[torch.Tensor]) -> Any:
        """Note a call like an earlier one, and give what it gives."""
        tracer = self._tracer
        operands = tuple([self._noted(value) for value in args])
        named = {name: self._noted(value) for name, value in kwargs.items()}
        name = tracer.graph._target_to_str(func.overloadpacket.__name__)
        node = tracer.create_node("call_function", func, operands, named, name)
        pairs = [result.made(given, self._fakes, self._refuse) for result in answer.results]
        values = [(value, result.of) for (value, _), result in zip(pairs, answer.results, strict=True)]
        self._known.note(func, args, kwargs, given, values)
        if answer.form is None:
            return self._tracked(node, *pairs[0])
        node.meta["val"] = answer.form([kept for _, kept in pairs])
        parts: Any = fx.Proxy(node, tracer)
        return answer.form([self._tracked(parts[i].node, *pair) for i, pair in enumerate(pairs)])

    def _noted(self, value: Any) -> Any:
        """An argument as it stands in the graph."""
        if isinstance(value, torch.Tensor):
            slot = self._slot(value)
            return slot.proxy.node if slot is not None else self._tracer.create_arg(value)
        return type(value)([self._noted(one) for one in value]) if isinstance(value, (list, tuple)) else value

    def _tracked(self, node: fx.Node, value: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Tie a tensor to the node that gives it."""
        node.meta["val"] = kept
        self._tracer.tensor_tracker[value] = proxy_tensor._ProxyTensor(fx.Proxy(node, self._tracer), None)
        return value


def _is_transformed() -> bool:
    """Whether tensors carry more than their values."""
    is_within = torch._C._functorch.peek_interpreter_stack() is not None
    return is_within or torch.autograd.forward_ad._current_level >= 0
