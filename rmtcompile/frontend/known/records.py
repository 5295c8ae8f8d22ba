"""Records: the operations of a forward as they are noted, the tensors they read, the memory they share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

FILLS = {torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar}  # leave nothing of a tensor
_SETS = {"aten::set_", "aten::set_data"}  # writes after which a tensor is another one


@dataclass(eq=False, slots=True)
class Memory:
    """What views of one tensor share: the operations that wrote there, in their order. None is a write of
    something that an input decides."""

    writes: list[tuple[int, Step | None]] = field(default_factory=list)

    def since(self, time: int) -> tuple[list[Step | None], bool]:
        """The writes before a time that still show then, and whether they leave nothing of what was there."""
        found = [step for index, step in self.writes if index < time]
        for i in reversed(range(len(found))):
            step = found[i]
            if step is not None and step.func in FILLS and not step.refs[0].is_view:
                return found[i:], True
        return found, False


@dataclass(eq=False, slots=True)
class Source:
    """A tensor that was there before the forward, or that it wrote out in its code.

    Attributes:
        before: what it held, once the forward writes it.
    """

    tensor: torch.Tensor
    memory: Memory
    before: torch.Tensor | None = None


@dataclass(eq=False, slots=True)
class Step:
    """An operation, its arguments with references in place of tensors; `kept` are results that nothing can
    have changed since."""

    index: int
    func: Callable[..., Any]
    args: Any
    kwargs: Any
    refs: list[Ref]
    kept: list[torch.Tensor] | None = None


@dataclass(eq=False, slots=True)
class Ref:
    """A tensor as it is referred to: a source, or a result of a step."""

    of: Source | Step
    position: int
    memory: Memory
    is_view: bool = False


@functools.cache
def aliases(
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


def is_replayable(func: Any) -> bool:
    """Whether the operation gives the same again when it is run on the same."""
    is_random = torch.Tag.nondeterministic_seeded in func.tags
    return not is_random and func._schema.name not in _SETS


def start(source: Source) -> torch.Tensor:
    """What a source held before the forward; a copy, where operations write there."""
    value = source.tensor.detach() if source.before is None else source.before
    return value.clone() if source.memory.writes else value


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors among arguments or results."""
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
