"""Known: what tensors hold while a forward runs on fake tensors, where no input decides it.

    span = self.span.max().item()          the parameter is there: 0.7, and the program holds for that value
    n = torch.zeros(1) ... int(n + T)      nothing but code decides it: 4, in any call
    if x.max() > 0: ...                    an input decides it: refused

Operations on tensors that are known are noted as they come, none is computed. When the forward reads a
number (`item`, `bool`, `tolist`, an index, a NumPy array) those that lead to it are run on the real tensors,
in the order of the forward, in-place writes included. The tensors that such a number came from are kept, so
that `rmtcompile/binding/values.py` can see whether they still hold the same.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)
from torch.utils.weak import WeakTensorKeyDictionary

from rmtcompile.errors import CaptureError
from rmtcompile.frontend.blame import user_source

_SMALL = 1024
"""Elements up to which a result is kept, once it was needed, for the next number that needs it."""

NUMBERS = {torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default}
"""Operations that give a number."""

_LIFTS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}
_FILLS = {torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar}  # leave nothing of a tensor
_SETS = {"aten::set_", "aten::set_data"}  # writes after which a tensor is another one


@dataclass(eq=False, slots=True)
class _Memory:
    """What views of one tensor share: the operations that wrote there, in their order. None is a write of
    something that an input decides."""

    writes: list[tuple[int, _Step | None]] = field(default_factory=list)

    def since(self, time: int) -> tuple[list[_Step | None], bool]:
        """The writes before a time that still show then, and whether they leave nothing of what was there."""
        found = [step for index, step in self.writes if index < time]
        for i in reversed(range(len(found))):
            step = found[i]
            if step is not None and step.func in _FILLS and not step.refs[0].is_view:
                return found[i:], True
        return found, False


@dataclass(eq=False, slots=True)
class _Source:
    """A tensor that was there before the forward, or that it wrote out in its code.

    Attributes:
        before: what it held, once the forward writes it.
    """

    tensor: torch.Tensor
    memory: _Memory
    before: torch.Tensor | None = None


@dataclass(eq=False, slots=True)
class _Step:
    """An operation, its arguments with references in place of tensors; `kept` are results that nothing can
    have changed since."""

    index: int
    func: Callable[..., Any]
    args: Any
    kwargs: Any
    refs: list[_Ref]
    kept: list[torch.Tensor] | None = None


@dataclass(eq=False, slots=True)
class _Ref:
    """A tensor as it is referred to: a source, or a result of a step."""

    of: _Source | _Step
    position: int
    memory: _Memory
    is_view: bool = False


@functools.cache
def _aliases(
    func: Any,
) -> tuple[tuple[tuple[int, str, frozenset[str], bool], ...], tuple[frozenset[str], ...]]:
    """(position, name, sets, whether it is written) of each argument that is written or seen through a
    result; the sets of each result."""
    schema = func._schema
    arguments = tuple(
        (i, arg.name, frozenset(arg.alias_info.before_set), arg.alias_info.is_write)
        for i, arg in enumerate(schema.arguments)
        if arg.alias_info is not None
    )
    results = tuple(
        frozenset(ret.alias_info.before_set if ret.alias_info is not None else ()) for ret in schema.returns
    )
    return arguments, results


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Within it, tensors are computed for real, whatever traces or follows the forward."""
    with (
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
        torch._C._DisableAutocast(),
        torch.no_grad(),
    ):
        yield


class Known(TorchDispatchMode):
    """Follows a forward on fake tensors; knows the values that no input decides.

    Attributes:
        read: the tensors from before the forward that decided numbers, in the order in which they were read.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.read: list[torch.Tensor] = []
        self._refused: CaptureError | None = None
        self._now = 0
        self._refs: Any = WeakTensorKeyDictionary()
        self._sources: dict[int, _Ref] = {}  # by identity, which the source keeps
        self._literals: set[int] = set()

    def unreadable(self, func: Any, frame: Any) -> CaptureError:
        """The refusal of a read that no value is known for."""
        self._refused = self._refused or _unreadable(func, frame)
        return self._refused

    def refuse_swallowed(self) -> None:
        """Refuse a forward that came to its end in spite of such a refusal: what it did instead is no part of
        the model."""
        if self._refused is not None:
            raise CaptureError(
                f"the forward goes on after an error that only tracing raises ({self._refused.what})",
                list(self._refused.evidence),
                "decide it from shapes or Python values",
            )

    # ---- following -----------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in NUMBERS:
            value = self.value(args[0])
            if value is None:
                if self.is_stale(args):
                    raise self.unreadable(func, sys._getframe(1))
                return func(*args)
            with outside():
                return value.item()
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        self._now += 1
        index = self._now
        if func in _LIFTS:
            self._literals.add(id(args[0]))
        inputs = _tensors((args, kwargs))
        refs = [self._ref(tensor) for tensor in inputs]
        by_name = [
            (self._memory(args[i] if i < len(args) else kwargs.get(name)), sets, is_write)
            for i, name, sets, is_write in _aliases(func)[0]
        ]
        is_decided = all(ref is not None for ref in refs) and _is_replayable(func)
        step = self._step(index, func, args, kwargs, inputs, refs) if is_decided else None
        if step is not None and any(is_write for *_, is_write in by_name):
            self._keep(refs)
        result = func(*args, **kwargs)
        for memories, _, is_write in by_name:
            for memory in memories if is_write else ():
                memory.writes.append((index, step))
        if step is not None:
            self._note(step, result, inputs, by_name)
        return result

    def _ref(self, tensor: torch.Tensor) -> _Ref | None:
        """What is known about a tensor; None where an input has a say, or nothing is in it."""
        found = self._refs.get(tensor)
        if found is not None or isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
            return found
        if is_traceable_wrapper_subclass(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return None
        if id(tensor) not in self._sources:
            memory = _Memory()
            self._sources[id(tensor)] = _Ref(_Source(tensor, memory), 0, memory)
        return self._sources[id(tensor)]

    def _memory(self, value: Any) -> list[_Memory]:
        refs = [self._ref(tensor) for tensor in _tensors(value)]
        return [ref.memory for ref in refs if ref is not None]

    def _step(
        self, index: int, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor], refs: list[Any]
    ) -> _Step:
        by_id = {id(tensor): ref for tensor, ref in zip(inputs, refs, strict=True)}

        def referred(value: Any) -> Any:
            return by_id[id(value)] if isinstance(value, torch.Tensor) else value

        args, kwargs = pytree.tree_map(referred, (args, kwargs))
        return _Step(index, func, args, kwargs, refs)

    def _keep(self, refs: list[Any]) -> None:
        """Keep what sources hold before an operation that may write there for real."""
        for ref in refs:
            if isinstance(ref.of, _Source) and ref.of.before is None:
                with outside():
                    ref.of.before = ref.of.tensor.detach().clone()

    def _note(self, step: _Step, result: Any, inputs: list[torch.Tensor], by_name: Any) -> None:
        """Results share the memory of what they are views of, or have one of their own."""
        results = _aliases(step.func)[1]
        position = 0
        values = result if len(results) > 1 else (result,) * len(results)
        for sets, value in zip(results, values, strict=True):
            seen = [memory for memories, of, _ in by_name if sets & of for memory in memories]
            for i, tensor in enumerate(_tensors(value)):
                if not any(tensor is one for one in inputs):
                    memory = seen[min(i, len(seen) - 1)] if seen else _Memory()
                    self._refs[tensor] = _Ref(step, position + i, memory, bool(seen))
            position += len(_tensors(value))

    # ---- reading -------------------------------------------------------------------------------------------

    def value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What a tensor holds at this point of the forward, to be read only; None where an input decides
        it."""
        ref = self._ref(tensor)
        steps, sources = self._needed(ref) if ref is not None else (None, {})
        if ref is None or steps is None:
            return None
        with outside():
            values = {source: _start(source) for source in sources}
            made: dict[_Step, list[torch.Tensor]] = {}

            def computed(one: Any) -> Any:
                if not isinstance(one, _Ref):
                    return one
                if isinstance(one.of, _Source):
                    return values[one.of]
                return made[one.of][one.position]

            for step in steps:
                if step.kept is not None:
                    made[step] = [kept.clone() for kept in step.kept]
                    continue
                args, kwargs = pytree.tree_map(computed, (step.args, step.kwargs))
                made[step] = _tensors(step.func(*args, **kwargs))
            self._hold(steps, made)
            for source, is_read in sources.items():
                if is_read:
                    self._note_read(source.tensor)
            return computed(ref).detach()

    def is_stale(self, *values: Any) -> bool:
        """Whether a real tensor is among those whose values an input decides: what it holds is from before
        the forward."""
        return any(
            not isinstance(tensor, FakeTensor)
            and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            and self.value(tensor) is None
            for tensor in _tensors(values)
        )

    def _needed(self, ref: _Ref) -> tuple[list[_Step] | None, dict[_Source, bool]]:
        """The operations that lead to a value, in their order, or None if an input has a say; the sources,
        and whether what they held before counts."""
        steps: dict[int, _Step] = {}
        sources: dict[_Source, bool] = {}
        waiting = [(ref, self._now + 1, False)]
        while waiting:
            one, time, is_filled = waiting.pop()
            found, is_blank = one.memory.since(time) if not is_filled else ([], True)
            if isinstance(one.of, _Step):
                found.append(one.of)
            else:
                sources[one.of] = sources.get(one.of, False) or not is_blank
            for step in found:
                if step is None:
                    return None, {}
                if step.index not in steps:
                    steps[step.index] = step
                    if step.kept is None:
                        waiting += [(other, step.index, step.func in _FILLS) for other in step.refs]
        return [steps[index] for index in sorted(steps)], sources

    def _note_read(self, tensor: torch.Tensor) -> None:
        if id(tensor) not in self._literals and not any(tensor is other for other in self.read):
            self.read.append(tensor)

    def _hold(self, steps: list[_Step], made: dict[_Step, list[torch.Tensor]]) -> None:
        """Keep small results of operations that only make new tensors: what they read is settled."""
        for step in steps:
            arguments, results = _aliases(step.func)
            fresh = not arguments and not any(results)
            if fresh and step.kept is None and sum(x.numel() for x in made[step]) <= _SMALL:
                step.kept = [x.clone() for x in made[step]]

    def restore(self) -> None:
        """Put back what operations on real tensors have written for real."""
        with outside():
            for ref in self._sources.values():
                source = ref.of
                if isinstance(source, _Source) and source.before is not None:
                    source.tensor.detach().copy_(source.before)


def _start(source: _Source) -> torch.Tensor:
    """What a source held before the forward; a copy, where operations write there."""
    value = source.tensor.detach() if source.before is None else source.before
    return value.clone() if source.memory.writes else value


def _is_replayable(func: Any) -> bool:
    is_random = torch.Tag.nondeterministic_seeded in func.tags
    return not is_random and func._schema.name not in _SETS


# ---- what reads tensors without an operation -----------------------------------------------------------

_ARRAYS = {torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__}
_READS = {
    torch.Tensor.item,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__complex__,
    torch.Tensor.__index__,
    torch.Tensor.is_nonzero,
    torch.is_nonzero,
    torch.Tensor.tolist,
    torch.Tensor.__repr__,
    torch.Tensor.__format__,
    torch.Tensor.__reduce_ex__,
    torch.Tensor.equal,
    torch.Tensor.allclose,
    torch.equal,
    torch.allclose,
}
_FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, torch.Tensor.new_tensor}


class Reads(TorchFunctionMode):
    """Gives `known` values to functions that read memory without an operation that tracing could see, or that
    tracing refuses. NumPy gets copies that it cannot write: a write would be lost."""

    def __init__(self, known: Known) -> None:
        super().__init__()
        self._known = known

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ARRAYS or func in _READS:
            return self._read(func, args, kwargs)
        if func in _FROM_NUMBERS:
            args, kwargs = pytree.tree_map(
                lambda value: self._listed(func, value), (args, kwargs), is_leaf=_is_list
            )
        return func(*args, **kwargs)

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        values = {id(tensor): self._valued(tensor) for tensor in _tensors((args, kwargs))}
        if any(value is None for value in values.values()):
            if func in _ARRAYS or self._known.is_stale(args, kwargs):
                raise self._known.unreadable(func, sys._getframe(2))
            return func(*args, **kwargs)

        def known(value: Any) -> Any:
            return values[id(value)] if isinstance(value, torch.Tensor) else value

        args, kwargs = pytree.tree_map(known, (args, kwargs))
        with outside():
            result = func(*args, **kwargs)
        if func in _ARRAYS and hasattr(result, "flags"):
            result.flags.writeable = False
        return result

    def _valued(self, tensor: torch.Tensor) -> torch.Tensor | None:
        value = self._known.value(tensor)
        if value is None:
            return None
        with outside():
            return value.clone().requires_grad_(tensor.requires_grad)

    def _listed(self, func: Any, value: Any) -> Any:
        """Lists of numbers with the tensors among them read; what is no list stays."""
        if not _is_list(value) or not _tensors(value):
            return value

        def read(one: Any) -> Any:
            found = self._known.value(one) if isinstance(one, torch.Tensor) else one
            if found is None and one is not None:
                raise self._known.unreadable(func, sys._getframe(2))
            return found

        return pytree.tree_map(read, value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _unreadable(func: Any, frame: Any) -> CaptureError:
    return CaptureError(
        f"the forward depends on the values of a tensor ({getattr(func, '__name__', func)})",
        [f"at {user_source(frame)}"],
        "decide it from shapes or Python values; what joins tensors is torch.stack",
    )
