"""Rules: what a function makes of rows of which only those count that a mask selects.

    log_softmax(x[mask], -1)       log_softmax(rows, -1), the same selection
    x[mask].sum()                  where(mask, rows, 0).sum()
    x[mask].mean((0, 1))           the same over mask.sum() and the sizes of the other dims
    cross_entropy(x[mask], y[mask])    labels of rows that do not count are those to ignore

A rule gets the call as the forward has written it and gives what stands for its result, or None where it does
not know: then the call is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.frontend.masks.selected import Count, Deferred, Selected, filled, make, names, selected

Rule = Callable[[Any, str, tuple[Any, ...], dict[str, Any]], Any]

_POINTWISE = names(
    "add sub mul div true_divide __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ "
    "__rtruediv__ __neg__ neg abs __abs__ exp log log1p expm1 sqrt rsqrt reciprocal pow __pow__ square "
    "sigmoid tanh relu gelu silu softplus logsigmoid erf sin cos clamp clamp_min clamp_max float double "
    "half bfloat16 long int bool detach clone contiguous eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ "
    "__gt__ __ge__ logical_and logical_or logical_not __and__ __or__ __invert__ maximum minimum where "
    "masked_fill round floor sign isfinite isnan isinf nan_to_num rsub"
)
"""Functions of each element and those beside it. None may raise for the values of rows that do not count."""

_ALONG = names("softmax log_softmax logsumexp argmax argmin amax amin cumsum")
"""Functions along one dim, their second argument."""

_REDUCTIONS = names("sum mean any all")
_LABELLED = names("cross_entropy nll_loss")
_LOSSES = names(
    "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy_with_logits binary_cross_entropy kl_div"
)
_LAST = names("linear layer_norm rms_norm")
"""Functions of the last dims of their first argument."""

_SAID = names("dtype device layout ndim dim is_floating_point is_complex requires_grad is_cuda")
"""What does not depend on how many rows there are."""


def _rows(value: Any) -> Any:
    return value.rows if isinstance(value, Selected) else value


def _all(args: Any, kwargs: Any) -> list[Any]:
    return [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]


def _first(args: Any, kwargs: Any) -> Selected:
    return next(value for value in _all(args, kwargs) if isinstance(value, Selected))


def _pointwise(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    one = _first(args, kwargs)
    ndim = one.rows.ndim
    for value in _all(args, kwargs):
        if isinstance(value, Selected):
            if value.rows.ndim != ndim:
                return None
        elif value.ndim > ndim or (value.ndim == ndim and value.shape[0] != 1):
            return None
    args, kwargs = pytree.tree_map(_rows, (args, kwargs))
    if "out" in kwargs or kwargs.get("inplace"):
        return None
    return selected(func(*args, **kwargs), one)


def _is_alone(args: Any, kwargs: Any) -> bool:
    """Whether the first argument is the only selection."""
    found = [value for value in _all(args, kwargs) if isinstance(value, Deferred)]
    return len(found) == 1 and bool(args) and args[0] is found[0]


def _along(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    ndim = args[0].rows.ndim if _is_alone(args, kwargs) else 0
    if not isinstance(dim, int) or not ndim or dim % ndim == 0:
        return None
    return selected(func(args[0].rows, *args[1:], **kwargs), args[0])


def _last(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    if not _is_alone(args, kwargs):
        return None
    over = 1
    if name != "linear":
        shape = args[1] if len(args) > 1 else kwargs.get("normalized_shape")
        over = len(shape) if isinstance(shape, (tuple, list)) else 1
    if args[0].rows.ndim <= over:
        return None
    return selected(func(args[0].rows, *args[1:], **kwargs), args[0])


def _cast(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    if len(_all(args, kwargs)) != 1:
        return None
    return selected(func(args[0].rows, *args[1:], **kwargs), args[0])


def _gather(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    if len(args) != 3 or kwargs or not all(isinstance(args[i], Selected) for i in (0, 2)):
        return None
    rows, index = args[0].rows, args[2].rows
    if args[1] % rows.ndim == 0 or rows.ndim != index.ndim:
        return None
    return selected(func(rows, args[1], index), args[0])


def _reduce(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    more = dict(zip(("dim", "keepdim"), args[1:3], strict=False)) | kwargs
    dim, keepdim, dtype = more.pop("dim", None), more.pop("keepdim", False), more.pop("dtype", None)
    if more or len(args) > 3 or not _is_alone(args, kwargs) or not isinstance(keepdim, bool):
        return None
    one = args[0]
    ndim = one.rows.ndim
    dims = tuple(range(ndim)) if dim is None else (dim,) if isinstance(dim, int) else dim
    if not isinstance(dims, (tuple, list)) or not all(isinstance(d, int) for d in dims):
        return None
    over = [d % ndim for d in dims] or list(range(ndim))  # no dims are all of them
    if 0 not in over:
        return selected(func(*(one.rows, *args[1:]), **kwargs), one)
    return reduced(one, name, over, keepdim, dtype)


def reduced(one: Selected, name: str, over: list[int], keepdim: bool = False, dtype: Any = None) -> Any:
    """The sum, mean, any or all of what is selected, over dims of which the first is one; None where there is
    no mean of such numbers."""
    rows, mask = one.rows, one.mask
    if name in ("any", "all"):
        return getattr(filled(rows.bool(), mask, name == "all"), name)(dim=over, keepdim=keepdim)
    to = rows.dtype if dtype is None else dtype
    if name == "sum":
        return filled(rows, mask, 0).sum(dim=over, keepdim=keepdim, dtype=dtype)
    if not to.is_floating_point and not to.is_complex:
        return None
    wide = torch.float32 if to in (torch.float16, torch.bfloat16) else to
    total = filled(rows, mask, 0).sum(dim=over, keepdim=keepdim, dtype=wide)
    return (total / _number(one, [d for d in over if d])).to(to)


def _number(one: Selected, dims: list[int]) -> torch.Tensor:
    """How many rows are selected, times the sizes of some dims: `i64[]`."""
    number = one.mask.sum()
    for d in dims:
        number = number * one.rows.shape[d]
    return number


@cache
def _signature(func: Any) -> inspect.Signature:
    return inspect.signature(func)


def _bound(func: Any, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Arguments by name; None where both tensors are not selections, or old spellings are used."""
    found = _signature(func).bind(*args, **kwargs)
    found.apply_defaults()
    said: dict[str, Any] = found.arguments
    tensors = [said.get("input"), said.get("target")]
    if not all(isinstance(value, Selected) for value in tensors):
        return None
    if said.get("size_average") is not None or said.get("reduce") is not None:
        return None
    return said


def _labelled(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    said = _bound(func, args, kwargs)
    if said is None or said["input"].rows.ndim < 2:
        return None
    one, labels = said["input"], said["target"]
    if labels.rows.is_floating_point():  # probabilities
        return _loss(func, name, args, kwargs)
    rows = filled(labels.rows, one.mask, said["ignore_index"])
    result = func(**{**said, "input": one.rows, "target": rows})
    return selected(result, one) if said["reduction"] == "none" else result


def _loss(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    said = _bound(func, args, kwargs)
    if said is None or (name != "cross_entropy" and said["input"].rows.shape != said["target"].rows.shape):
        return None
    one, reduction = said["input"], said["reduction"]
    for key in ("weight", "pos_weight"):
        value = said.get(key)
        if value is not None and (isinstance(value, Deferred) or value.ndim >= one.rows.ndim):
            return None
    plain = {**said, "input": one.rows, "target": said["target"].rows, "reduction": "none"}
    each = selected(func(**plain), one)
    if reduction == "none":
        return each
    over = list(range(each.rows.ndim))
    if reduction == "batchmean":
        return reduced(each, "sum", over) / one.mask.sum()
    return reduced(each, reduction, over) if reduction in ("mean", "sum") else None


def _flat(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """`view(-1)`, `flatten()`, and views that change nothing."""
    if not _is_alone(args, kwargs) or kwargs:
        return None
    one = args[0]
    rest = tuple(one.rows.shape[1:])
    shape = tuple(args[1]) if len(args) == 2 and isinstance(args[1], (tuple, list)) else tuple(args[1:])
    if name != "flatten" and shape == (-1, *rest):
        return one
    if shape != (() if name == "flatten" else (-1,)):
        return None
    mask = one.mask.reshape(-1, *(1,) * len(rest)).expand(one.rows.shape).reshape(-1)
    rows = one.rows.reshape(-1)
    keys = frozenset(("flat", rest, key) for key in one.keys) if rest else one.keys
    return make(Selected, mask, keys, one.place, one.kept, rows, rows=rows)


def _unsqueeze(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    dim = args[1] if len(args) == 2 else kwargs.get("dim") if len(args) == 1 else None
    if not isinstance(dim, int):
        return None
    one = args[0]
    if dim % (one.rows.ndim + (name == "unsqueeze")) == 0:
        return None
    return selected(func(one.rows, dim), one)


def _part(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Parts of each row, and a selection of what is selected."""
    one, index = args
    if not isinstance(one, Selected):
        return None
    if isinstance(index, Selected) and index.rows.dtype == torch.bool and index.rows.ndim == 1:
        mask = one.mask & index.rows
        keys = frozenset(("again", id(index), key) for key in one.keys)
        like = make(Selected, mask, keys, one.place, (one.kept, index), one.rows, rows=one.rows)
        return selected(one.rows, like)
    if not isinstance(index, tuple) or any(isinstance(part, torch.Tensor) or part is None for part in index):
        return None
    is_whole = index[0] == slice(None) if isinstance(index[0], slice) else False
    is_last = index[0] is Ellipsis and len(index) <= one.rows.ndim
    return selected(one.rows[index], one) if is_whole or is_last else None


def _said(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    return func(_rows(args[0]), *args[1:], **kwargs)


def _size(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    one = args[0]
    if kwargs or len(args) > (2 if name == "size" else 1):
        return None
    rest = tuple(one.rows.shape[1:])
    if name == "numel":
        return _counted_as(one, list(range(1, one.rows.ndim)))
    if len(args) == 1:
        return (_counted_as(one, []), *rest)
    return (_counted_as(one, []), *rest)[args[1]]


def _counted_as(one: Selected, dims: list[int]) -> Count:
    number = _number(one, dims)
    found: Count = make(Count, one.mask, one.keys, one.place, one.kept, number, number=number)
    return found


def _counted(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A floating tensor times or by a count is one of its type, as with an integer of Python."""
    others = [value for value in args if not isinstance(value, Count)]
    if kwargs or len(args) != 2 or len(others) != 1 or not isinstance(others[0], torch.Tensor):
        return None
    if isinstance(others[0], Deferred) or not others[0].is_floating_point():
        return None
    return func(*(value.number if isinstance(value, Count) else value for value in args))


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(_LABELLED, _labelled),
    **dict.fromkeys(_LOSSES, _loss),
    **dict.fromkeys(_LAST, _last),
    **dict.fromkeys(_SAID, _said),
    **dict.fromkeys(("view", "reshape", "flatten"), _flat),
    **dict.fromkeys(("unsqueeze", "squeeze"), _unsqueeze),
    **dict.fromkeys(("numel", "size", "shape"), _size),
    **dict.fromkeys(("to", "type"), _cast),
    "gather": _gather,
    "__getitem__": _part,
}
_COUNTED = names("mul div true_divide __mul__ __rmul__ __truediv__ __rtruediv__")


def applied(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What stands for the result of a call that reads deferred values; None where no rule knows it."""
    found = [value for value in _all(args, kwargs) if isinstance(value, Deferred)]
    if any(isinstance(value, Count) for value in found):
        return _counted(func, name, args, kwargs) if name in _COUNTED else None
    is_one = all(isinstance(value, Selected) and value.keys & found[0].keys for value in found)
    rule = _RULES.get(name)
    return rule(func, name, args, kwargs) if is_one and rule is not None else None
