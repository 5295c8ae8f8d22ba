"""Unasked: expressions of the user's code in which an integer is taken without being asked.

    0.5 < self.position            a float compares itself
    2.0 * self.position            a float multiplies itself
    self.names[self.position]      a list takes an index
    range(self.position, n)        so does what is written in C

An integer that knows what is made of it (`counting.py`) does not see these. So the source of each function
that runs is looked at when it returns: where such an expression holds a watched integer, that is told.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import os
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

_UNKNOWN = object()
_NOT_THEIRS = tuple(os.path.dirname(path) + os.sep for path in (torch.__file__, __file__))
_ASKING = (
    abs, bool, complex, divmod, float, format, hash, id, int, isinstance, max, min, pow, print, repr, round,
    str, sum, type,
)  # fmt: skip
"""Builtins that ask an integer, or take nothing of it."""

Watched = Callable[[Any], bool]


@contextmanager
def unasked(is_watched: Watched, tell: Callable[[Any], None]) -> Iterator[None]:
    """Look at all functions that return meanwhile, but for those of torch and of this folder.

    Args:
        is_watched: whether a value is an integer that is to be asked.
        tell: called with each one that is not.
    """

    def look(frame: types.FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "return" and not code.co_filename.startswith(_NOT_THEIRS):
            for node in _expressions(code):
                for value in _taken(node, frame, is_watched):
                    tell(value)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)


@lru_cache(maxsize=4096)
def _expressions(code: types.CodeType) -> tuple[ast.AST, ...]:
    """Where a function calculates, compares, indexes or calls; none where it has no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):  # made by exec, or a part of a line
        return ()
    kinds = (ast.BinOp, ast.AugAssign, ast.Compare, ast.Subscript, ast.Call)
    return tuple(node for node in ast.walk(tree) if isinstance(node, kinds))


def _taken(node: Any, frame: types.FrameType, is_watched: Watched) -> list[Any]:
    """The watched integers that an expression takes without asking them."""

    def within(*parts: ast.AST) -> list[Any]:
        found = [_value(x, frame) for part in parts for x in ast.walk(part) if isinstance(x, _NAMES)]
        return [value for value in found if is_watched(value)]

    if isinstance(node, ast.Compare):
        sides = pairwise([node.left, *node.comparators])
        return [x for left, right in sides if not _leaves_it(left, frame) for x in within(right)]
    if isinstance(node, ast.BinOp):
        return [] if _leaves_it(node.left, frame) else within(node.right)
    if isinstance(node, ast.AugAssign):
        return [] if _leaves_it(node.target, frame) else within(node.value)
    if isinstance(node, ast.Subscript):
        return [] if isinstance(_value(node.value, frame), torch.Tensor) else within(node.slice)
    found = within(*node.args, *(keyword.value for keyword in node.keywords))
    return found if found and not _is_open(_value(node.func, frame)) else []


_NAMES = (ast.Name, ast.Attribute)


def _value(node: ast.AST, frame: types.FrameType) -> Any:
    """What a name, or an attribute of one, is now; `_UNKNOWN` for all else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        for names in (frame.f_locals, frame.f_globals, vars(builtins)):
            if node.id in names:
                return names[node.id]
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, frame)
        if isinstance(owner, torch.nn.Module):
            for held in (owner._parameters, owner._buffers, owner._modules):
                if node.attr in held:
                    return held[node.attr]
        owner = torch.Tensor if isinstance(owner, torch.Tensor) else owner
        return inspect.getattr_static(owner, node.attr, _UNKNOWN) if owner is not _UNKNOWN else owner
    return _UNKNOWN


def _leaves_it(left: ast.AST, frame: types.FrameType) -> bool:
    """Whether what stands on the left leaves an operation to an integer of a class of its own, or to torch.

    It does where it is an integer itself, or a tensor. What is not known does not.
    """
    if isinstance(left, ast.UnaryOp):
        return _leaves_it(left.operand, frame)
    if isinstance(left, ast.BinOp) and not isinstance(left.op, (ast.Div, ast.Pow)):
        return _leaves_it(left.left, frame) and _leaves_it(left.right, frame)
    if isinstance(left, ast.Call):
        function = _value(left.func, frame)
        is_number = function is len or function is int
        return is_number or isinstance(function, torch.nn.Module) or _is_of_torch(function)
    if isinstance(left, ast.Subscript):
        return _leaves_it(left.value, frame)
    if isinstance(left, ast.Attribute) and isinstance(_value(left.value, frame), torch.Tensor):
        return True  # its shape, or another tensor
    return isinstance(_value(left, frame), (int, torch.Tensor))


def _is_open(function: Any) -> bool:
    """Whether what a function makes of an integer is seen, or stands in the graph."""
    is_asking = any(function is one for one in _ASKING)
    return is_asking or isinstance(function, _WRITTEN_IN_PYTHON) or _is_of_torch(function)


def _is_of_torch(function: Any) -> bool:
    owner = getattr(function, "__objclass__", None) or getattr(function, "__self__", None) or function
    names = (getattr(x, name, None) for x in (owner, type(owner)) for name in ("__module__", "__name__"))
    return any(isinstance(name, str) and name.partition(".")[0] == "torch" for name in names)


_WRITTEN_IN_PYTHON = types.FunctionType, types.MethodType, staticmethod, classmethod, torch.nn.Module


__all__ = ["unasked"]
