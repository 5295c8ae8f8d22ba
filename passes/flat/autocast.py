"""Autocast: what a region of autocast converts, the graph converts itself.

    with torch.autocast("cpu", bfloat16):            a, b = to(x, bfloat16), to(w, bfloat16)
        y = linear(x, w)                       ->    y = linear(a, b)

Which operands an operation converts is not looked up but observed: it runs on fake tensors with and without
autocast, and the operations below autocast that compute something are compared. In this order:

    it does the same in both cases               it stays as it is
    it does so once some operands are converted  these are converted before it
    it is made of others                         these take its place, and are looked at in turn
    else                                         what it does under autocast, below autograd, takes its place

Requires: nodes with meta `autocast`, as `capture` leaves them, before anything moves or replaces a node: an
operation in place converts less than its functional form does.
Ensures: same bits without autocast, also of gradients; no node has meta `autocast`. A program of this graph
has to run with autocast off, since it would convert what the region around a call does not mean.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rmtcompile.errors import CaptureError
from rmtcompile.ir.modes import Autocast, autocast_as
from rmtcompile.passes.flat.decompose import DECOMPOSITIONS, inline

aten = torch.ops.aten

_FAKES = logging.getLogger("torch._subclasses.fake_tensor")

_MOVES = frozenset({
    aten._to_copy.default, aten.clone.default, aten._unsafe_view.default, aten._reshape_copy.default,
    aten.copy_.default, aten.empty_like.default, aten.empty_strided.default, aten.empty.memory_format,
})  # fmt: skip
"""Operations that compute nothing: whether values are converted before or after them makes no difference."""


_ENTERED = frozenset({aten._trilinear.default, aten.linalg_pinv.atol_rtol_tensor})
"""Kernels that call matrix products, which autocast converts where no mode sees it (of 54 operations that
were measured, torch 2.13)."""


def explicit_autocast(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with conversions in the place of autocast; the same object where there is none."""
    states = {node: node.meta.pop("autocast", ()) for node in module.graph.nodes}
    if not any(states.values()):
        return module
    known: dict[Any, _Form] = {}
    for node, state in states.items():
        if state and node.op == "call_function":
            _resolve(node, state, known)
    module.recompile()
    return module


@dataclass(frozen=True)
class _Form:
    """How an operation is written without autocast.

    Attributes:
        how: "casts", "parts" or "below".
        casts: dtype of each operand (by its position among the tensors) that is converted.
        dtype: the argument `dtype` that is given to it, if it is.
    """

    how: str
    casts: Mapping[int, torch.dtype] = field(default_factory=dict)
    dtype: torch.dtype | None = None


def _resolve(node: fx.Node, state: Autocast, known: dict[Any, _Form]) -> None:
    """Write one operation without autocast."""
    if not isinstance(node.target, torch._ops.OpOverload):
        if isinstance(node.target, torch._ops.HigherOrderOperator):  # it has to run in the region
            regions = (f"torch.autocast({kind!r}, {dtype!r})" for kind, dtype in state)
            node.meta["context"] = (*regions, *node.meta.get("context", ()))
        return
    call = _Call(node)
    key = (call.key, state)
    if key not in known:
        known[key] = _form(call, state)
    form = known[key]
    if form.how == "casts":
        _convert(node, form)
        return
    if form.how == "parts":
        parts = DECOMPOSITIONS.get(node.target, node.target.decompose)
        with autocast_as(state):
            made = inline(node, parts)
        for part in made:
            if part.target is node.target:  # torch keeps some whole
                _lower(part, state)
            else:
                _resolve(part, state, known)
    else:
        _lower(node, state)


def _lower(node: fx.Node, state: Autocast) -> None:
    """Put what the operation does below autocast, and below autograd, in its place."""
    with autocast_as(state):
        inline(node, node.target, pre_dispatch=False)  # type: ignore[arg-type]


def _form(call: _Call, state: Autocast) -> _Form:
    wanted = call.run(state)
    if any(func in _ENTERED for func, _ in wanted.computed):
        raise CaptureError(
            f"autocast changes what happens inside of {call.op}",
            [f"at {call.node.meta.get('source')}"],
            "run it with autocast off: with torch.autocast(device, enabled=False)",
        )
    for casts in _candidates(call, wanted, state):
        for dtype in (None, wanted.dtype) if call.takes_dtype else (None,):
            if call.does(wanted, casts, dtype):
                return _Form("casts", casts, dtype)
    if call.op in DECOMPOSITIONS:
        return _Form("parts")
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(call.op.name(), composite)
    return _Form("parts" if is_composite else "below")


def _candidates(call: _Call, wanted: _Observed, state: Autocast) -> Iterator[dict[int, torch.dtype]]:
    """Conversions of operands that may do what autocast does: none, those that were seen, one for all."""
    yield {}
    if wanted.casts:
        yield wanted.casts
    for dtype in (*(dtype for _, dtype in state), torch.float32):
        casts = {
            i: dtype
            for i, val in enumerate(call.vals)
            if val.is_floating_point() and val.dtype not in (dtype, torch.float64)
        }
        if casts:
            yield casts


def _convert(node: fx.Node, form: _Form) -> None:
    """Convert operands before the operation."""
    if form.dtype is not None:
        node.kwargs = {**node.kwargs, "dtype": form.dtype}
    made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    position = iter(range(len(_operands(node))))

    def converted(operand: fx.Node) -> fx.Node:
        if not isinstance(operand.meta.get("val"), torch.Tensor):
            return operand
        dtype = form.casts.get(next(position))
        if dtype is None:
            return operand
        if (operand, dtype) not in made:
            with node.graph.inserting_before(node):
                cast = node.graph.call_function(aten.to.dtype, (operand, dtype))
            cast.meta = dict(node.meta)
            with autocast_as():
                cast.meta["val"] = operand.meta["val"].to(dtype)
            made[operand, dtype] = cast
        return made[operand, dtype]

    if form.casts:
        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), converted)


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors among the arguments, in their order; one that is given twice comes twice."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return [operand for operand in found if isinstance(operand.meta.get("val"), torch.Tensor)]


class _Call:
    """One operation of the graph, to be run on fake tensors like its own.

    Attributes:
        op, vals: the operation, and its tensors in the order of the arguments.
        key: equal for calls that have the same form.
    """

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.op: Any = node.target
        self.vals = [operand.meta["val"] for operand in _operands(node)]
        types = tuple((tuple(v.shape), v.stride(), v.dtype, v.device) for v in self.vals)
        constants = repr(fx.node.map_arg((node.args, node.kwargs), lambda operand: "tensor"))
        self.key = (self.op, types, constants)

    @property
    def takes_dtype(self) -> bool:
        """Whether the operation has an argument `dtype` that is not given."""
        return self.node.kwargs.get("dtype") is None and any(
            argument.name == "dtype" and argument.kwarg_only for argument in self.op._schema.arguments
        )

    def run(
        self,
        state: Autocast,
        casts: Mapping[int, torch.dtype] | None = None,
        dtype: torch.dtype | None = None,
    ) -> _Observed:
        """What it does below autocast in this state, with some operands of another dtype."""
        with FakeTensorMode(), torch.no_grad():
            with autocast_as():
                tensors = [
                    torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device).to(
                        (casts or {}).get(i, v.dtype)
                    )
                    for i, v in enumerate(self.vals)
                ]
            remaining = iter(tensors)

            def value(operand: fx.Node) -> Any:
                val = operand.meta.get("val")
                return next(remaining) if isinstance(val, torch.Tensor) else val

            args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), value)
            if dtype is not None:
                kwargs = {**kwargs, "dtype": dtype}
            observed = _Observed(tensors)
            with autocast_as(state), observed:
                result = self.op(*args, **kwargs)
        observed.results = _types(result)
        return observed

    def does(self, wanted: _Observed, casts: Mapping[int, torch.dtype], dtype: torch.dtype | None) -> bool:
        """Whether it does what was observed once these operands are converted; it may not run on them."""
        _FAKES.disabled = True  # or it writes the trace of each operation that does not run
        try:
            return self.run((), casts, dtype).same(wanted)
        except RuntimeError:
            return False
        finally:
            _FAKES.disabled = False


class _Observed(TorchDispatchMode):
    """What an operation does below autocast and autograd.

    Attributes:
        computed: the operations that compute something, each with the dtypes that it reads.
        casts: dtypes that its own operands are converted to, by position.
        results: shapes and dtypes of its results.
    """

    def __init__(self, operands: list[torch.Tensor]) -> None:
        super().__init__()
        self.operands = operands
        self.computed: list[Any] = []
        self.casts: dict[int, torch.dtype] = {}
        self.results: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default:
            for i, operand in enumerate(self.operands):
                if operand is args[0] and result.dtype != operand.dtype:
                    self.casts[i] = result.dtype
        elif not func.is_view and func not in _MOVES and func.namespace != "prim":
            read = [x.dtype for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.computed.append((func, read))
        return result

    def same(self, other: _Observed) -> bool:
        """Whether both compute the same, and give results of the same types."""
        return (self.computed, self.results) == (other.computed, other.results)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of a single result."""
        return self.results[0][1] if len(self.results) == 1 else None


def _types(result: Any) -> list[Any]:
    return [
        (tuple(x.shape), x.dtype, x.device) for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)
    ]
