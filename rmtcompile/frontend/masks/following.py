"""Following: a forward is followed, and `x[mask]` becomes what stands for it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from rmtcompile.errors import CaptureError
from rmtcompile.frontend.blame import user_line
from rmtcompile.frontend.masks.rules import applied
from rmtcompile.frontend.masks.same import Made
from rmtcompile.frontend.masks.selected import Deferred, Positions, Selected, make, names, refused, selected

_SELECTS = {torch.Tensor.masked_select, torch.masked_select}
_FINDS = {torch.Tensor.nonzero, torch.nonzero, torch.Tensor.argwhere, torch.argwhere}
_WHERES = {torch.where, torch.Tensor.where}
_COLUMNS = names("squeeze flatten view reshape")


def _is_mask(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and not isinstance(value, Deferred)
        and value.dtype == torch.bool
        and value.ndim > 0
    )


def _name(func: Any) -> str:
    """The name of a function, or of the attribute that it gets."""
    whole = resolve_name(func) or getattr(func, "__name__", "?")
    return str(whole).removesuffix(".__get__").rpartition(".")[2]


class Masks(TorchFunctionMode):
    """Gives what stands for `x[mask]`, `masked_select`, `nonzero()`, and for what is made of it. To be
    entered last: other modes see the operations that come of it."""

    def __init__(self) -> None:
        super().__init__()
        self._made = Made()
        self._refused: CaptureError | None = None

    def refuse_left(self, values: Any) -> None:
        """Refuse such values among what a forward gives or leaves behind, and a forward that came to its end
        in spite of a refusal."""
        for value in pytree.tree_leaves(values):
            if isinstance(value, Deferred):
                raise refused(value, "the result", value.place)
        if self._refused is not None:
            raise self._refused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return func(*args, **kwargs)
        if func is torch.Tensor.__getitem__ or func is torch.Tensor.index_select:
            found = self._read(*args, **kwargs) if len(args) == 2 else self._read(args[0], args[2])
        elif func is torch.Tensor.__setitem__:
            found = self._written(*args)
        elif func in _SELECTS and _is_mask(args[-1]) and len(args) == 2:
            x, mask = torch.broadcast_tensors(*args)
            found = self._selected(x, mask, self._made.keys(args[1]), args)
        elif func in _FINDS and _is_mask(args[0]):
            found = self._positions(args[0], kwargs.get("as_tuple", len(args) > 1 and args[1]))
        elif func in _WHERES and len(args) == 1 and _is_mask(args[0]) and not kwargs:
            found = self._positions(args[0], True)
        else:
            found = None
        if found is not None:
            return found
        if any(issubclass(kind, Deferred) for kind in types) or (
            func is torch.Tensor.__setitem__ and any(isinstance(one, Deferred) for one in args)
        ):
            return self._applied(func, args, kwargs)
        result = func(*args, **kwargs)
        self._made.note(getattr(func, "__name__", ""), args, kwargs, result)
        return result

    def _read(self, x: Any, index: Any) -> Any:
        """What stands for `x[index]`; None where the index is no mask."""
        mask = self._mask(index)
        if mask is None or isinstance(x, Deferred) or x.shape[: mask.ndim] != mask.shape:
            return None
        return self._selected(x, mask, self._made.keys(mask), mask)

    def _mask(self, index: Any) -> torch.Tensor | None:
        """The mask that an index says; None where it is none, or has changed since."""
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) == 1 and _is_mask(parts[0]):
            return parts[0]
        if not parts or not all(isinstance(part, Positions) for part in parts):
            return None
        of, keys = parts[0].of, parts[0].keys
        is_whole = [part.axis for part in parts] == list(range(of.ndim))
        alike = all(part.of is of and part.keys == keys for part in parts)
        return of if is_whole and alike and self._made.keys(of) & keys else None

    def _selected(self, x: torch.Tensor, mask: torch.Tensor, keys: Any, kept: Any) -> Selected:
        place = user_line(sys._getframe(2))
        rows = x.reshape(-1, *x.shape[mask.ndim :])
        which = mask.reshape(-1).clone()  # the forward may write into its mask
        keys = frozenset((tuple(mask.shape), key) for key in keys)
        return selected(rows, make(Selected, which, keys, place, (mask, kept), rows, rows=rows))

    def _positions(self, mask: torch.Tensor, as_tuple: Any) -> Any:
        place, keys = user_line(sys._getframe(2)), self._made.keys(mask)
        like = torch.empty((), dtype=torch.int64, device=mask.device)
        columns = [
            make(Positions, mask, keys, place, mask, like, of=mask, axis=axis) for axis in range(mask.ndim)
        ]
        if as_tuple:
            return tuple(columns)
        return make(Positions, mask, keys, place, mask, like, of=mask, axis=None)

    def _written(self, x: Any, index: Any, value: Any) -> Any:
        """`x[mask] = y[mask]`: False where it was done, None where it is something else."""
        if not isinstance(value, Selected) or isinstance(x, Deferred):
            return None
        mask = self._mask(index)
        if mask is None or x.shape[: mask.ndim] != mask.shape or x.dtype != value.rows.dtype:
            return None
        keys = frozenset((tuple(mask.shape), key) for key in self._made.keys(mask))
        if not keys & value.keys or value.rows.shape[1:] != x.shape[mask.ndim :]:
            return None
        which = mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))
        x.copy_(torch.where(which, value.rows.reshape(x.shape), x))
        return False

    def _applied(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = _name(func)
        first = args[0] if args else None
        if isinstance(first, Positions) and first.axis is None and first.of.ndim == 1:
            if name in _COLUMNS or (name == "__getitem__" and args[1] == (slice(None), 0)):
                return self._positions(first.of, True)[0]
        found = applied(func, name, args, kwargs)
        if found is not None:
            return found
        values = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Deferred)]
        one = values[0]
        differ = any(not value.keys & one.keys for value in values)
        what = f"`{name}`" + ", for selections by masks that may differ," * differ
        self._refused = self._refused or refused(one, what, user_line(sys._getframe(2)))
        raise self._refused
