"""Run states: what a run has left at a border between segments, as a value.

    outputs, state = fast.run(tokens[:, :5000])
    outputs, state = fast.run(tokens[:, 5000:9000], state=state)      as in one call of 9000 tokens

A state holds the values that later segments read, how many segments have been read for good, and the part
of the input that is to be read again with what follows: an incomplete segment, and segments that the model
treats in another way since they were the last ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmtcompile.errors import StateError
from rmtcompile.runtime.crossing import Key

FORMAT = "rmtcompile.state/1"


@dataclass(frozen=True)
class Origin:
    """Who made a state in this process.

    Attributes:
        model: the callable.
        weigh: tells its weights of now.
    """

    model: Any
    weigh: Callable[[], str]


@dataclass(frozen=True)
class Part:
    """Which part of a state is in this process, where several run the program together.

    Attributes:
        stamp: equal for all parts of one state.
        rank, count: this process among those.
        gather: gives all processes the values of all, from those of each; for all of them to call.
    """

    stamp: str
    rank: int
    count: int
    gather: Callable[[Part, Mapping[Key, Tensor]], dict[Key, Tensor]] = field(repr=False, compare=False)


@dataclass(frozen=True)
class RunState:
    """Where a run has stopped; made by `Optimized.run`, never changed.

    Attributes:
        segments: segments that were read and will not be read again.
        values: by name of the value and the segment that made it; each as one cell, prologue or epilogue gave
            it, with whatever dtype, device and shape it has there.
        pending: parts of the segmented inputs that the next run reads again before its own: one tensor for
            each axis of the segmentation, in order.
        plan: what a program has to carry to go on from here; empty where no segment was read for good.
        weights: of a state that was read from a file: tells whether a model has the weights that made it.
        dims: the dim along which each of `pending` is cut.
        origin: None for a state that was read from a file.
        part: which part of the values these are, where several processes run the program and each has those
            that its own layers read; None where they are all of them.
    """

    segments: int
    values: Mapping[Key, Tensor]
    pending: tuple[Tensor, ...]
    plan: str
    weights: str = ""
    dims: tuple[int, ...] = ()
    origin: Origin | None = field(default=None, repr=False, compare=False)
    part: Part | None = None

    @property
    def pending_tokens(self) -> int:
        """Elements along the first segmented axis that will be read again."""
        return self.pending[0].shape[self.dims[0]]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in (*self.values.values(), *self.pending))

    def __repr__(self) -> str:
        pending = f", {self.pending_tokens} pending" if self.pending_tokens else ""
        size = f"{len(self.values)} values, {self.nbytes:,} bytes"
        part = f"; part of rank {self.part.rank} of {self.part.count}" if self.part is not None else ""
        return f"RunState({self.segments} segments{pending}; {size}{part})"

    def weighed(self) -> str:
        """What tells the weights that made the state: those of now, if the model is in this process."""
        return self.origin.weigh() if self.origin is not None else self.weights

    # ---- parts ---------------------------------------------------------------------------------------------

    @property
    def is_whole(self) -> bool:
        """Whether all values are in this process."""
        return self.part is None

    def gathered(self) -> RunState:
        """The state with the values of all processes; where it is in parts, for all of them to call.

        Raises:
            RankError: another process does not answer.
            UnsupportedError: other processes are about to do something else.
        """
        if self.part is None:
            return self
        return replace(self, values=self.part.gather(self.part, self.values), part=None)

    # ---- copies --------------------------------------------------------------------------------------------

    def map(self, function: Callable[[Tensor], Tensor]) -> RunState:
        """The same state with each of its tensors replaced by what `function` gives for it."""
        values = {key: function(value) for key, value in self.values.items()}
        return replace(self, values=values, pending=tuple(map(function, self.pending)))

    def clone(self) -> RunState:
        """A copy in memory of its own."""
        return self.map(torch.clone)

    def detach(self) -> RunState:
        """The same values without their history: gradients end here (truncated backpropagation)."""
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> RunState:
        """The same values on another device."""
        return self.map(lambda tensor: tensor.to(device))

    # ---- batch ---------------------------------------------------------------------------------------------

    def split(self, sizes: int | Sequence[int] = 1) -> list[RunState]:
        """One state for each part of the batch.

        Args:
            sizes: rows of each part; a number, of every part.

        Raises:
            StateError: which dim of a value is the batch does not show from its shape.
        """
        batch = self._batch()
        dims = {key: self._dim(key, value, batch) for key, value in self.values.items()}
        wanted = [sizes] * (batch // max(sizes, 1)) if isinstance(sizes, int) else list(sizes)
        if sum(wanted) != batch or min(wanted) < 1:
            raise StateError(f"a batch of {batch} has no parts of {wanted} rows")
        starts = [sum(wanted[:i]) for i in range(len(wanted))]
        return [
            replace(
                self,
                part=self.part and replace(self.part, stamp=f"{self.part.stamp}[{at}:{at + n}]"),
                values={key: value.narrow(dims[key], at, n) for key, value in self.values.items()},
                pending=tuple(
                    tensor.narrow(_batch_dim(dim), at, n)
                    for tensor, dim in zip(self.pending, self.dims, strict=True)
                ),
            )
            for at, n in zip(starts, wanted, strict=True)
        ]

    @staticmethod
    def join(states: Sequence[RunState]) -> RunState:
        """One state for a batch of several, in their order.

        Raises:
            StateError: they stand at different segments, belong to different plans, or a value's batch dim
                does not show from its shape.
        """
        if not states:
            raise StateError("there are no states to join")
        first = states[0]
        for other in states[1:]:
            if other.is_whole != first.is_whole:
                raise StateError("one process's part of a state joins no whole one", remedy=_GATHER)
            if (other.segments, other.plan, other.values.keys()) != (
                first.segments, first.plan, first.values.keys()
            ):  # fmt: skip
                raise StateError(
                    "only states of one plan that stand at the same segment can be joined",
                    [f"{one.segments} segments, plan {one.plan}" for one in (first, other)],
                )
            if other.pending_tokens != first.pending_tokens:
                raise StateError(
                    "only states with equally long incomplete segments can be joined",
                    [f"{one.pending_tokens} tokens" for one in (first, other)],
                )
        values = {
            key: torch.cat([one.values[key] for one in states], first._dim(key, value, first._batch()))
            for key, value in first.values.items()
        }
        parts = zip(*(one.pending for one in states), strict=True)
        pending = tuple(
            torch.cat(same, _batch_dim(dim)) for same, dim in zip(parts, first.dims, strict=True)
        )
        stamp = " + ".join(one.part.stamp for one in states if one.part is not None)
        part = first.part and replace(first.part, stamp=stamp)
        return replace(first, values=values, pending=pending, part=part)

    def _batch(self) -> int:
        return self.pending[0].shape[_batch_dim(self.dims[0])]

    def _dim(self, key: Key, value: Tensor, batch: int) -> int:
        """The dim of a value that counts the batch: the only one of that size, or the first if it is one."""
        if value.dim() and value.shape[0] == batch:
            return 0
        found = [dim for dim, size in enumerate(value.shape) if size == batch]
        if len(found) != 1:
            raise StateError(
                f"it does not show which dim of a value is the batch of {batch}",
                [f"{key[0]}, segment {key[1]}: {list(value.shape)}"],
                "split or join the tensors in `values` yourself",
            )
        return found[0]

    # ---- files ---------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the state as one safetensors file, with the fingerprint of the plan and of the weights that
        the model has now.

        Raises:
            StateError: other processes have some of its values.
        """
        from safetensors.torch import save_file

        if self.part is not None:
            raise StateError(f"these are the values of rank {self.part.rank} alone", [repr(self)], _GATHER)

        header = {
            "format": FORMAT,
            "segments": self.segments,
            "plan": self.plan,
            "weights": self.weighed(),
            "dims": list(self.dims),
        }
        tensors = {f"{name}@{segment}": value for (name, segment), value in self.values.items()}
        tensors |= {f"pending {i}": tensor for i, tensor in enumerate(self.pending)}
        plain = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        save_file(plain, str(path), metadata={"rmtcompile": json.dumps(header)})

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> RunState:
        """Read a state that `save` has written.

        Raises:
            StateError: the file holds no state.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                header: dict[str, Any] = json.loads((file.metadata() or {}).get("rmtcompile", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise StateError(f"{path} holds no state", [str(error)]) from error
        if header.get("format") != FORMAT:
            raise StateError(f"{path} holds no state of this version", [f"format {header.get('format')}"])
        count = sum(name.startswith("pending ") for name in tensors)
        pending = tuple(tensors.pop(f"pending {i}") for i in range(count))
        values = {}
        for text, tensor in tensors.items():
            name, _, segment = text.rpartition("@")
            values[name, int(segment)] = tensor
        dims = tuple(header["dims"])
        return RunState(header["segments"], values, pending, header["plan"], header["weights"], dims)


_GATHER = "state.gathered(), called on every rank, has the values of all of them"


def _batch_dim(segmented: int) -> int:
    """Which dim of an input is the batch, where this one holds the segments: the first other one."""
    return 0 if segmented else 1


__all__ = ["Origin", "Part", "RunState"]
