"""One recorded training step: what it reads, and how it is replayed as an operation of autograd.

What a forward has kept for its backward lies in memory that all recordings share. Where another forward has
run in between, or backward is asked for twice, the forward is replayed once more from its inputs, with the
same random numbers. What was not recorded (gradients of other results, `create_graph=True`) is run level by
level.

Where somebody still holds what an earlier backward gave (gradients that are added up over several backwards),
that stays as it is, and copies are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.runtime.contexts import same_numbers
from rmtcompile.runtime.copies import copies_of, is_tensor
from rmtcompile.runtime.gradients import check_unwritten, split
from rmtcompile.runtime.graphs import Recordings
from rmtcompile.runtime.stacks import Alone

if TYPE_CHECKING:
    from rmtcompile.runtime.execute import Executor

Key = tuple[Any, ...]
"""Number of segments, shapes of the inputs, and which inputs and leaves want gradients."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Read:
    """What a recording reads.

    Attributes:
        inputs: memory for the caller's inputs.
        state: memory for tensors that the forward replaces in the model, by leaf.
        held: all leaves by name; those that want gradients are tensors of this recording's own, in the
            model's memory, so that no earlier history leads into the recording.
        names: one name of each leaf that wants a gradient.
        stacks: stacked weights, likewise.
    """

    inputs: list[torch.Tensor]
    state: Tensors
    held: Tensors
    names: list[str]
    stacks: list[Alone]

    @property
    def values(self) -> tuple[torch.Tensor, ...]:
        """What is filled before a replay: inputs, then state."""
        return (*self.inputs, *self.state.values())

    def wanted(self) -> list[torch.Tensor]:
        """What gradients are computed of, in this order: inputs, state, leaves, stacks."""
        found = [x for x in self.values if x.requires_grad]
        return found + [self.held[name] for name in self.names] + [stack.tensor for stack in self.stacks]


@dataclass(frozen=True)
class Step:
    """A recorded step.

    Attributes:
        read: what it reads, apart from what lies at `addresses` in the model; `kept` is that memory.
        outputs: what forward fills, as tensors without a history; `with_gradients` says which have one.
        given: gradients of results, to be filled before backward, by the place of the result.
        gradients: what backward fills, in the order of `Read.wanted`; None where nothing depends on it.
    """

    key: Key
    segments: int
    read: Read
    addresses: dict[str, int]
    kept: list[torch.Tensor]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    outputs: list[Any]
    spec: Any
    with_gradients: frozenset[int]
    given: dict[int, torch.Tensor]
    gradients: list[torch.Tensor | None]


class StepReplays(Recordings):
    """What recordings of steps share: memory, and which forward's values lie there.

    Args:
        executor: whose steps they are.
    """

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor.compiled.leaves, executor.replaced)
        self.executor = executor
        self.draws = executor.compiled.longest.draws
        self.latest: object | None = None

    def replayed(self, step: Step, inputs: Sequence[torch.Tensor], leaves: Tensors) -> Any:
        """The results of a recorded step, with the history of one operation."""
        state = [leaves[name] for name in step.read.state]
        parameters = [leaves[name] for name in step.read.names]
        parameters += [leaf for stack in step.read.stacks for leaf in stack.leaves]
        found = iter(_Replay.apply(self, step, len(inputs) + len(state), *inputs, *state, *parameters))
        return pytree.tree_unflatten([next(found) if is_tensor(x) else x for x in step.outputs], step.spec)

    def lacks(self, step: Step, places: Iterable[int]) -> None:
        """Told that results at other places than the recorded ones have got gradients."""

    def numbers(self) -> torch.Tensor | None:
        """Where the generator of random numbers stands; None where a step draws none."""
        return torch.cuda.get_rng_state(self.executor.device) if self.draws else None

    @contextmanager
    def drawing(self, numbers: torch.Tensor | None) -> Iterator[None]:
        """The random numbers that were drawn from there, once more."""
        with same_numbers(self.executor.device) if numbers is not None else nullcontext():
            if numbers is not None:
                torch.cuda.set_rng_state(numbers, self.executor.device)
            yield

    def replay_forward(self, step: Step, values: Sequence[torch.Tensor]) -> object:
        """Run the recorded forward on inputs and state; gives a mark of this forward."""
        with self.alone():
            for place, value in zip(step.read.values, values, strict=True):
                place.detach().copy_(value.detach())
            step.forward.replay()
        self.latest = mark = object()
        return mark

    def results(self, step: Step) -> list[torch.Tensor]:
        """What the last forward has filled, in memory of their own."""
        with self.alone():
            return copies_of([x for x in step.outputs if is_tensor(x)])

    def replay_backward(
        self, step: Step, mark: object, again: Callable[[], object], grads: dict[int, torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """Run the recorded backward; gives the gradients in the order of `Read.wanted`.

        Args:
            mark: of the forward that it belongs to.
            again: runs that forward once more, where its values are not in the pool any more.
            grads: of results, by place.
        """
        if self.latest is not mark:
            again()
        self.latest = None  # backward writes over what forward has kept
        with self.alone():
            for place, room in step.given.items():
                if place in grads:
                    room.copy_(grads[place])
                else:
                    room.zero_()
            distinct = {g.data_ptr(): g for g in step.gradients if g is not None}
            before = {at: g.clone() for at, g in distinct.items() if _is_held(g)}
            step.backward.replay()
            copies = {at: distinct[at].clone() for at in before}
            for at, old in before.items():
                distinct[at].copy_(old)
        # Handed out as other tensors, whose memory is seen to be held as long as somebody has them.
        return [None if g is None else copies.get(g.data_ptr(), g).detach() for g in step.gradients]

    def launched_backward(
        self,
        step: Step,
        values: Sequence[torch.Tensor],
        wanted: Sequence[torch.Tensor],
        grads: dict[int, torch.Tensor],
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of `wanted`, level by level: where results have gradients that the recording has no place
        for, or where gradients are to have a history."""
        if not set(grads) <= set(step.given):
            self.lacks(step, grads)
        has_history, count = torch.is_grad_enabled(), len(step.read.inputs)
        with torch.enable_grad():
            leaves = {name: leaf.fetch() for name, leaf in self.leaves.items()}
            leaves.update(zip(step.read.state, values[count:], strict=True))
            found = self.executor.launch_with_gradients(step.segments, list(values[:count]), leaves)
        flat = pytree.tree_leaves(found)
        asked = [flat[place] for place in grads]
        given = list(grads.values())
        return torch.autograd.grad(asked, wanted, given, allow_unused=True, create_graph=has_history)


class _Replay(torch.autograd.Function):
    """A recorded step as one operation: inputs, state and parameters -> results."""

    @staticmethod
    def forward(
        ctx: Any, steps: StepReplays, step: Step, count: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Results with memory of their own.

        Args:
            count: inputs and tensors of the state among `tensors`; parameters follow.
        """
        values, parameters = tensors[:count], tensors[count:]
        ctx.steps, ctx.step, ctx.count, ctx.parameters = steps, step, count, parameters
        ctx.versions = [parameter._version for parameter in parameters]
        ctx.numbers = steps.numbers()
        ctx.mark = steps.replay_forward(step, values)
        ctx.save_for_backward(*values)
        ctx.set_materialize_grads(False)
        places = [place for place, x in enumerate(step.outputs) if is_tensor(x)]
        results = steps.results(step)
        found = zip(places, results, strict=True)
        ctx.mark_non_differentiable(*(x for place, x in found if place not in step.with_gradients))
        ctx.places = places
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if ctx.step is None:
            raise RuntimeError(
                "backward was called a second time for this result; the first call needs retain_graph=True"
            )
        check_unwritten(ctx.parameters, ctx.versions)
        steps, step = ctx.steps, ctx.step
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            # What the forward has left in the model may hold this operation for long, but not the recordings.
            ctx.steps = ctx.step = None
        asked = {place: g for place, g in zip(ctx.places, grads, strict=True) if g is not None}
        needed = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or not set(asked) <= set(step.given):
            tensors = (*ctx.saved_tensors, *ctx.parameters)
            wanted = {id(x): x for x, is_needed in zip(tensors, needed, strict=True) if is_needed}
            launched = steps.launched_backward(step, ctx.saved_tensors, list(wanted.values()), asked)
            by_tensor = dict(zip(wanted, launched, strict=True))
            return None, None, None, *(by_tensor.pop(id(x), None) for x in tensors)  # each once

        def again() -> None:
            with steps.drawing(ctx.numbers):
                steps.replay_forward(step, ctx.saved_tensors)

        found = iter(steps.replay_backward(step, ctx.mark, again, asked))
        of_values = [next(found) if x.requires_grad else None for x in step.read.values]
        of_leaves = [next(found) for _ in step.read.names]
        of_stacks: list[torch.Tensor | None] = []
        for stack in step.read.stacks:
            grad, leaves = next(found), stack.leaves
            of_stacks += [None] * len(leaves) if grad is None else split(grad, stack.parts, leaves)
        return None, None, None, *of_values, *of_leaves, *of_stacks


def _is_held(tensor: torch.Tensor) -> bool:
    """Whether anybody but this tensor holds its memory."""
    return _holders(tensor) > _holders(torch.empty(0))


def _holders(tensor: torch.Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


__all__ = ["Key", "Read", "Step", "StepReplays", "Tensors"]
