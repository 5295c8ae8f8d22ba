"""Selected: what stands for values whose number of rows another tensor decides."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.errors import CaptureError

Keys = frozenset[Any]
"""What is known of a mask: two that share one hold the same (`same.py`)."""


class Deferred(torch.Tensor):
    """Has no values of its own: only functions with a rule take it.

    Attributes:
        mask: `bool[M]`, which rows count, as it was when they were selected.
        keys: see `Keys`.
        place: the user's line that selects.
        kept: what has to stay alive for the keys to mean anything.
    """

    mask: torch.Tensor
    keys: Keys
    place: str
    kept: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = pytree.tree_leaves((args, kwargs))
        one = next(value for value in found if isinstance(value, Deferred))
        raise refused(one, func, "?")


class Selected(Deferred):
    """Stands for `rows[mask]`.

    Attributes:
        rows: `[M, ...]`. Rows that do not count hold one half (0 where they are integers): a number at which
            every function has a finite derivative, so that gradients of zero stay zero.
    """

    rows: torch.Tensor


class Positions(Deferred):
    """Stands for `mask.nonzero()`.

    Attributes:
        of: the mask, in its shape.
        axis: which of its columns; None for all of them.
    """

    of: torch.Tensor
    axis: int | None


class Count(Deferred):
    """Stands for the number of selected rows, or elements, where Python has an integer.

    Attributes:
        number: `i64[]`.
    """

    number: torch.Tensor


def make(
    kind: type[Any], mask: torch.Tensor, keys: Keys, place: str, kept: Any, like: torch.Tensor, **more: Any
) -> Any:
    """A deferred value; it looks like `like` to what asks for neither shape nor values."""
    made = torch.Tensor._make_wrapper_subclass(kind, like.shape, dtype=like.dtype, device=like.device)
    vars(made).update(mask=mask, keys=keys, place=place, kept=kept, **more)
    return made


def filled(rows: torch.Tensor, mask: torch.Tensor, value: Any = None) -> torch.Tensor:
    """Rows with those that do not count replaced: by a value, else by what every function takes."""
    if value is None:
        value = 0.5 if rows.is_floating_point() or rows.is_complex() else 0
    which = mask.reshape(-1, *(1,) * (rows.ndim - 1))
    if rows.dtype == torch.bool:
        return rows | ~which if value else rows & which
    return torch.where(which, rows, value)


def selected(rows: torch.Tensor, like: Deferred) -> Selected:
    """The same selection of other rows `[M, ...]`."""
    rows = filled(rows, like.mask)
    found: Selected = make(Selected, like.mask, like.keys, like.place, like.kept, rows, rows=rows)
    return found


def names(text: str) -> frozenset[str]:
    """Names of functions, written as a text."""
    return frozenset(text.split())


def refused(value: Deferred, func: Any, place: str) -> CaptureError:
    """The refusal of a use that has no rule.

    Args:
        func: what it reaches, a function or its name.
        place: the user's line of the use; the other one in the evidence selects.
    """
    name = func if isinstance(func, str) else f"`{getattr(func, '__name__', func)}`"
    return CaptureError(
        f"the forward depends on the values of a tensor: how many rows a mask selects, "
        f"which {name} has to know",
        list(dict.fromkeys([f"at {place}", f"at {value.place}"])),
        "decide it from shapes or Python values, or keep all rows: torch.where(mask.unsqueeze(-1), x, 0) and "
        "mask.sum() for sums and means, "
        "labels=torch.where(mask, labels, -100) for cross_entropy; sums, means, losses and what "
        "treats each row by itself may also read x[mask]",
    )
