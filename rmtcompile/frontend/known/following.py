"""Following: every operation of a forward is noted; a number that is read is computed from them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from rmtcompile.errors import CaptureError
from rmtcompile.frontend.blame import user_source
from rmtcompile.frontend.known.records import (
    FILLS,
    Memory,
    Ref,
    Source,
    Step,
    aliases,
    is_replayable,
    outside,
    start,
    tensors,
)

_SMALL = 1024
"""Elements up to which a result is kept, once it was needed, for the next number that needs it."""

NUMBERS = {torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default}
"""Operations that give a number."""

_DEVICE = torch.ops.prim.device.default

_LIFTS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}


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
        self._sources: dict[int, Ref] = {}  # by identity, which the source keeps
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
        if func is _DEVICE and type(args[0]) is FakeTensor:  # asked of operands by half of all operations
            return args[0].fake_device
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
        inputs = tensors((args, kwargs))
        refs = [self._ref(tensor) for tensor in inputs]
        by_name = [
            (self._memory(args[i] if i < len(args) else kwargs.get(name)), sets, is_write)
            for i, name, sets, is_write in aliases(func)[0]
        ]
        is_decided = all(ref is not None for ref in refs) and is_replayable(func)
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

    def note(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        given: Sequence[torch.Tensor],
        results: Sequence[tuple[torch.Tensor, int | None]],
    ) -> None:
        """Note an operation that writes nothing and was not computed here.

        Args:
            given: the tensors among its arguments.
            results: each with which of these has the same memory; None for memory of its own.
        """
        self._now += 1
        refs: list[Any] = []
        for tensor in given:
            refs.append(self._ref(tensor))
            if refs[-1] is None:
                return
        if is_replayable(func):
            step = self._step(self._now, func, args, kwargs, list(given), refs)
            for i, (value, of) in enumerate(results):
                if of is None or value is not given[of]:
                    memory = refs[of].memory if of is not None else Memory()
                    self._refs[value] = Ref(step, i, memory, of is not None)

    def _ref(self, tensor: torch.Tensor) -> Ref | None:
        """What is known about a tensor; None where an input has a say, or nothing is in it."""
        found = self._refs.get(tensor)
        if found is not None or isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
            return found
        if is_traceable_wrapper_subclass(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return None
        if id(tensor) not in self._sources:
            memory = Memory()
            self._sources[id(tensor)] = Ref(Source(tensor, memory), 0, memory)
        return self._sources[id(tensor)]

    def _memory(self, value: Any) -> list[Memory]:
        refs = [self._ref(tensor) for tensor in tensors(value)]
        return [ref.memory for ref in refs if ref is not None]

    def _step(
        self, index: int, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor], refs: list[Any]
    ) -> Step:
        by_id = {id(tensor): ref for tensor, ref in zip(inputs, refs, strict=True)}

        def referred(value: Any) -> Any:
            return by_id[id(value)] if isinstance(value, torch.Tensor) else value

        args, kwargs = pytree.tree_map(referred, (args, kwargs))
        return Step(index, func, args, kwargs, refs)

    def _keep(self, refs: list[Any]) -> None:
        """Keep what sources hold before an operation that may write there for real."""
        for ref in refs:
            if isinstance(ref.of, Source) and ref.of.before is None:
                with outside():
                    ref.of.before = ref.of.tensor.detach().clone()

    def _note(self, step: Step, result: Any, inputs: list[torch.Tensor], by_name: Any) -> None:
        """Results share the memory of what they are views of, or have one of their own."""
        results = aliases(step.func)[1]
        position = 0
        values = result if len(results) > 1 else (result,) * len(results)
        for sets, value in zip(results, values, strict=True):
            seen = [memory for memories, of, _ in by_name if sets & of for memory in memories]
            for i, tensor in enumerate(tensors(value)):
                if not any(tensor is one for one in inputs):
                    memory = seen[min(i, len(seen) - 1)] if seen else Memory()
                    self._refs[tensor] = Ref(step, position + i, memory, bool(seen))
            position += len(tensors(value))

    # ---- reading -------------------------------------------------------------------------------------------

    def value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What a tensor holds at this point of the forward, to be read only; None where an input decides
        it."""
        ref = self._ref(tensor)
        steps, sources = self._needed(ref) if ref is not None else (None, {})
        if ref is None or steps is None:
            return None
        with outside():
            values = {source: start(source) for source in sources}
            made: dict[Step, list[torch.Tensor]] = {}

            def computed(one: Any) -> Any:
                if not isinstance(one, Ref):
                    return one
                if isinstance(one.of, Source):
                    return values[one.of]
                return made[one.of][one.position]

            for step in steps:
                if step.kept is not None:
                    made[step] = [kept.clone() for kept in step.kept]
                    continue
                args, kwargs = pytree.tree_map(computed, (step.args, step.kwargs))
                made[step] = tensors(step.func(*args, **kwargs))
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
            for tensor in tensors(values)
        )

    def _needed(self, ref: Ref) -> tuple[list[Step] | None, dict[Source, bool]]:
        """The operations that lead to a value, in their order, or None if an input has a say; the sources,
        and whether what they held before counts."""
        steps: dict[int, Step] = {}
        sources: dict[Source, bool] = {}
        waiting = [(ref, self._now + 1, False)]
        while waiting:
            one, time, is_filled = waiting.pop()
            found, is_blank = one.memory.since(time) if not is_filled else ([], True)
            if isinstance(one.of, Step):
                found.append(one.of)
            else:
                sources[one.of] = sources.get(one.of, False) or not is_blank
            for step in found:
                if step is None:
                    return None, {}
                if step.index not in steps:
                    steps[step.index] = step
                    if step.kept is None:
                        waiting += [(other, step.index, step.func in FILLS) for other in step.refs]
        return [steps[index] for index in sorted(steps)], sources

    def _note_read(self, tensor: torch.Tensor) -> None:
        if id(tensor) not in self._literals and not any(tensor is other for other in self.read):
            self.read.append(tensor)

    def _hold(self, steps: list[Step], made: dict[Step, list[torch.Tensor]]) -> None:
        """Keep small results of operations that only make new tensors: what they read is settled."""
        for step in steps:
            arguments, results = aliases(step.func)
            fresh = not arguments and not any(results)
            if fresh and step.kept is None and sum(x.numel() for x in made[step]) <= _SMALL:
                step.kept = [x.clone() for x in made[step]]

    def restore(self) -> None:
        """Put back what operations on real tensors have written for real."""
        with outside():
            for ref in self._sources.values():
                source = ref.of
                if isinstance(source, Source) and source.before is not None:
                    source.tensor.detach().copy_(source.before)


def _unreadable(func: Any, frame: Any) -> CaptureError:
    return CaptureError(
        f"the forward depends on the values of a tensor ({getattr(func, '__name__', func)})",
        [f"at {user_source(frame)}"],
        "decide it from shapes or Python values; what joins tensors is torch.stack",
    )
