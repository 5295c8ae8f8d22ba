"""A call, in the ways in which it is run to be measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from rmtcompile.binding.arguments import tensors_of
from rmtcompile.runtime.base import OnLevel

if TYPE_CHECKING:
    from rmtcompile.optimized import Optimized


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an optimized model, captured before.

    Attributes:
        executor: what runs its program.
        segments, tensors: of the call.
    """

    fast: Optimized
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    executor: Any
    segments: int
    tensors: list[torch.Tensor]

    def program(self) -> Any:
        """The program as it always runs: replayed where levels are recorded."""
        return self.executor.run(self.segments, self.tensors)

    def level_by_level(self, on_level: OnLevel | None = None) -> Any:
        """The program, each level launched; gives its results."""
        return self.executor.run(self.segments, self.tensors, graphs=False, on_level=on_level)

    def model(self) -> None:
        """The model as it is; it is left as it was."""
        from rmtcompile.binding.state import Contents, Snapshot, roots_of

        snapshot = Snapshot(roots_of(self.fast.model))
        contents = Contents(snapshot)
        try:
            self.fast.model(*self.args, **self.kwargs)
        finally:
            snapshot.restore()
            contents.restore()

    @property
    def leaves(self) -> Sequence[torch.Tensor]:
        """All that gradients may be wanted of."""
        return [*self.tensors, *self.executor.held().values()]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that the program reads."""
        kept = (leaf.tensor.dtype for leaf in self.fast.compiled.leaves.values())
        return next((dtype for dtype in kept if dtype.is_floating_point), torch.float32)


def call_of(fast: Optimized, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A call, captured and compiled if it was not."""
    fast.prepare(*args, **kwargs)
    assert fast._last is not None
    entry, count = fast._last
    return Call(fast, args, kwargs, entry.executor, count, tensors_of(args, kwargs))
