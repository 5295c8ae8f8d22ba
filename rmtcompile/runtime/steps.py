"""Recorded training steps: the forward and the backward of a length as two CUDA graphs.

    first call of a length    launched level by level; which of its results get gradients is noted in backward
    second call               recorded: forward, then backward from these results, in one pool of memory
    later calls               a replay each; autograd sees one operation between parameters and results

Gradients of stacked weights are added up in memory that all recordings share; parameters get views of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.errors import RecordingWarning, warn
from rmtcompile.runtime.contexts import own_modes, same_numbers
from rmtcompile.runtime.copies import is_tensor
from rmtcompile.runtime.gradients import is_transformed
from rmtcompile.runtime.graphs import free_generators
from rmtcompile.runtime.recorded_step import Key, Read, Step, StepReplays, Tensors
from rmtcompile.runtime.stacks import Alone
from rmtcompile.runtime.workspaces import own_workspaces

if TYPE_CHECKING:
    from rmtcompile.runtime.execute import Executor


class Steps(StepReplays):
    """Records the training steps of one executor, and replays them.

    Args:
        limit: recordings kept; the least recently used one is dropped.
        longest: levels of a run that is recorded at most.
    """

    def __init__(self, executor: Executor, limit: int = 16, longest: int = 4096) -> None:
        super().__init__(executor)
        self.limit, self.longest = limit, longest
        self._recordings: OrderedDict[Key, Step] = OrderedDict()
        self._asked: dict[Key, set[int]] = {}  # results that got gradients
        self._rooms: Tensors = {}  # for sums of gradients of stacks, by port
        self._refused: set[Key] = set()  # too large for the memory that is left
        self._has_failed = False

    def __str__(self) -> str:
        """How training steps are recorded, in words."""
        if self._has_failed:
            return "training steps are not recorded, since that has failed; levels are launched one by one"
        if self.obstacle:
            return f"training steps are launched level by level: {self.obstacle}"
        return "a training step of a length is recorded as two CUDA graphs when the length comes again"

    @property
    def obstacle(self) -> str:
        """What is in the way of recording, in words; empty where nothing is."""
        if self.executor.keeping.draws_again:
            return "backward draws random numbers again"
        if not self.executor.stacks.can_be_alone:
            return "weights of layers are put together anew at each call"
        return ""

    def run(self, segments: int, inputs: list[torch.Tensor]) -> tuple[Any, ...]:
        """Run with gradients; recorded where this length comes again after a backward."""
        if self._has_failed or _is_looked_at() or self.obstacle:
            return self.executor.launch_with_gradients(segments, inputs)
        leaves = {name: leaf.fetch() for name, leaf in self.leaves.items()}
        key = self._key(segments, inputs, leaves)
        step = self._recordings.get(key)
        if step is not None and not self._is_current(step):
            self.forget()
            step = None
        if step is None and self._wants(key, segments, leaves):
            step = self._record(key, segments, inputs, leaves)
        if step is None:
            outputs = self.executor.launch_with_gradients(segments, inputs)
            self._watch(outputs, self._asked.setdefault(key, set()))
            return outputs
        self._recordings.move_to_end(key)
        outputs = self.replayed(step, inputs, leaves)
        return tuple(outputs)

    def forget(self) -> None:
        """Drop all recordings: weights have moved."""
        self._recordings.clear()
        self._rooms.clear()
        self._asked.clear()
        self.latest = None

    def lacks(self, step: Step, places: Iterable[int]) -> None:
        """See `StepReplays`: it is recorded anew."""
        self._asked.setdefault(step.key, set()).update(places)
        self._recordings.pop(step.key, None)

    # ---- recording -----------------------------------------------------------------------------------------

    def _key(self, segments: int, inputs: Sequence[torch.Tensor], leaves: Tensors) -> Key:
        wanting = frozenset(name for name, leaf in leaves.items() if leaf.requires_grad)
        return segments, tuple((x.shape, x.requires_grad) for x in inputs), wanting

    def _is_current(self, step: Step) -> bool:
        """Whether the model's tensors are where they were, and what it replaces is as it was."""
        return self.at_addresses(step.addresses) and self.state_like(step.read.state) is not None

    def _wants(self, key: Key, segments: int, leaves: Tensors) -> bool:
        """Whether to record: a backward has shown what it needs, and parameters are computed from nothing."""
        levels = self.executor.program.grid(segments).n_levels
        fixed = (leaf for name, leaf in leaves.items() if name not in self.replaced)
        is_wanted = bool(self._asked.get(key)) and key not in self._refused
        return is_wanted and levels <= self.longest and all(x.is_leaf for x in fixed)

    def _watch(self, outputs: Any, asked: set[int]) -> None:
        """Note which results get gradients."""

        def noting(place: int, number: int) -> Callable[[tuple[torch.Tensor | None, ...]], None]:
            def note(grads: tuple[torch.Tensor | None, ...]) -> None:
                if grads[number] is not None:
                    asked.add(place)

            return note

        for place, value in enumerate(pytree.tree_leaves(outputs)):
            if is_tensor(value) and value.grad_fn is not None:
                value.grad_fn.register_prehook(noting(place, value.output_nr))

    def _record(self, key: Key, segments: int, inputs: list[torch.Tensor], leaves: Tensors) -> Step | None:
        """A recording of this length; None where that fails. Where memory is too small for it this length
        stays as it is, after another failure nothing is recorded any more."""
        self.latest = None
        self.wait()
        said = ""
        with same_numbers(self.executor.device), torch.enable_grad():
            for attempt in (1, 2):
                try:
                    if attempt == 2:  # what is done at a first call only cannot be recorded: do it now
                        self._launched(segments, inputs, leaves, self._asked[key])
                    step = self._recorded_step(key, segments, inputs, leaves)
                    self._keep(key, step)
                    return step
                except torch.OutOfMemoryError as error:
                    said = _first_line(error)
                    self._refused.add(key)
                    break
                except RuntimeError as error:
                    said = _first_line(error)
                    self._has_failed = attempt == 2
                free_generators()
        free_generators()
        if self._has_failed:
            self.forget()
        what = f"training steps of {segments} segments are not recorded as CUDA graphs"
        warn(f"{what}: {said}", RecordingWarning)
        return None

    def _keep(self, key: Key, step: Step) -> None:
        self._recordings[key] = step
        while len(self._recordings) > self.limit:
            self._recordings.popitem(last=False)

    def _recorded_step(self, key: Key, segments: int, inputs: list[torch.Tensor], leaves: Tensors) -> Step:
        read = self._read(inputs, leaves)
        rooms = self._rooms_for(read.stacks)
        live: list[Any] = []  # the results, with their history, until backward is recorded

        def forward() -> Any:
            found = self.executor.launch_with_gradients(segments, read.inputs, read.held, read.stacks, rooms)
            live[:], spec = pytree.tree_flatten(found)
            return [x.detach() if is_tensor(x) else x for x in live], spec

        def backward() -> list[torch.Tensor | None]:
            asked, wanted = [live[place] for place in places], read.wanted()
            with own_modes():
                found = torch.autograd.grad(asked, wanted, list(given.values()), allow_unused=True)
            return [_settled(grad, rooms) for grad in found]

        places = sorted(self._asked[key])
        try:
            graph, (outputs, spec) = self.captured_once(forward, own_workspaces)
            with_gradients = frozenset(i for i, x in enumerate(live) if is_tensor(x) and x.requires_grad)
            given = {place: torch.zeros_like(outputs[place]) for place in places}
            back, gradients = self.captured_once(backward, own_workspaces)
        finally:
            live.clear()  # an error would hold it
        addresses = {name: x.data_ptr() for name, x in leaves.items() if name not in read.state}
        kept = [x.detach() for x in leaves.values()]
        step = (key, segments, read, addresses, kept, graph, back, outputs, spec, with_gradients, given)
        return Step(*step, gradients)

    def _launched(self, segments: int, inputs: list[torch.Tensor], leaves: Tensors, places: set[int]) -> None:
        """One step that is not recorded."""
        read = self._read(inputs, leaves)
        found = self.executor.launch_with_gradients(segments, read.inputs, read.held, read.stacks)
        flat = pytree.tree_leaves(found)
        asked = [flat[place] for place in sorted(places)]
        torch.autograd.grad(asked, read.wanted(), [torch.zeros_like(x) for x in asked], allow_unused=True)

    def _read(self, inputs: list[torch.Tensor], leaves: Tensors) -> Read:
        static = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        state = {
            name: leaves[name].detach().clone().requires_grad_(leaves[name].requires_grad)
            for name in sorted(self.replaced)
        }
        own: dict[int, torch.Tensor] = {}  # by the leaf, which may have several names
        held, names = dict(leaves), []
        for name, leaf in leaves.items():
            if name in state:
                held[name] = state[name]
            elif leaf.requires_grad:
                if id(leaf) not in own:
                    own[id(leaf)] = _own(leaf)
                    names.append(name)
                held[name] = own[id(leaf)]
        return Read(static, state, held, names, self.executor.stacks.alone())

    def _rooms_for(self, stacks: Sequence[Alone]) -> Tensors:
        """Memory for the sums of gradients of stacks, by port: the same for all recordings."""
        for stack in stacks:
            for port in stack.ports:
                if port not in self._rooms:
                    self._rooms[port] = torch.zeros_like(stack.tensor, requires_grad=False)
        return self._rooms


def _own(leaf: torch.Tensor) -> torch.Tensor:
    """A leaf of autograd in the memory of another one, and of its kind."""
    if isinstance(leaf, torch.nn.Parameter):
        return torch.nn.Parameter(leaf.detach(), requires_grad=True)
    return leaf.detach().requires_grad_()


def _settled(grad: torch.Tensor | None, rooms: Tensors) -> torch.Tensor | None:
    """A gradient as the recording keeps it: a room is that very tensor, and each element has its place."""
    if grad is None:
        return None
    room = next((room for room in rooms.values() if room.data_ptr() == grad.data_ptr()), None)
    if room is not None and room.shape == grad.shape:
        return room
    repeats = any(n > 1 and stride == 0 for n, stride in zip(grad.shape, grad.stride(), strict=True))
    return grad.contiguous() if repeats else grad


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _is_looked_at() -> bool:
    """Whether somebody wants to see what autograd sees: a transform of `torch.func`, or hooks on what is kept
    for backward (`save_on_cpu`, a checkpoint around the model)."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None or is_transformed()


__all__ = ["Steps"]
