"""Arguments: those of a document, tensors among them, their names, and what a forward does to containers and
objects among them.

    def forward(self, ids, cache):      {"ids": ids, "cache": cache}
        cache.append(h)                 refused: no program would put it there
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rmtcompile.binding.objects import is_leaf, path_name, walk
from rmtcompile.binding.state import Was
from rmtcompile.errors import CaptureError


def of_document(document: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the forward that a document stands for.

    Args:
        document: a tensor, of which one of a single dim is a batch of one; a dict of keyword arguments; or a
            tuple of arguments.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(document, torch.Tensor):
        return (document[None] if document.dim() == 1 else document,), {}
    if isinstance(document, dict):
        return (), document
    if isinstance(document, tuple):
        return document, {}
    kind = type(document).__name__
    raise TypeError(f"a document is a tensor, a dict of arguments or a tuple of arguments, not a {kind}")


def by_name(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call as the signature of the callable names them; those of `*args` are a tuple."""
    forward = fn.forward if isinstance(fn, nn.Module) else fn
    try:
        bound = inspect.signature(forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return {f"input {i}": value for i, value in enumerate(args)} | dict(kwargs)
    return dict(bound)


def tensors_of(args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors among the arguments of a call, in pytree order."""
    return [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]


@contextmanager
def left_alone(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """While the forward runs on these arguments: objects among them are put back as they were after it.
    Writes into the tensors themselves are no matter of this.

    Raises:
        CaptureError: the forward has changed one of them.
    """
    named = by_name(fn, args, kwargs)
    inside = [(name, *found) for name, value in named.items() for found in walk(value)]
    before = [(name, Was(value, path)) for name, path, value in inside if not is_leaf(value)]
    changed: list[str] = []
    try:
        yield
    finally:
        for name, was in before:
            if was.is_changed:
                place = path_name((("attr", name), *was.path))
                whole = f", in a {type(named[name]).__name__}" if was.path else ""
                changed.append(f"{place} ({type(was.target).__name__}){whole}")
                was.restore()
    if changed:
        raise CaptureError(
            "the forward changes a list, a dict or another object among its arguments",
            changed,
            "return what it puts there, keep it in an attribute of an nn.Module, or do without (a cache of "
            "keys and values: use_cache=False)",
        )
