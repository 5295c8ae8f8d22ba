"""Counting: integers that a forward reads from its model, adds to, and leaves there for the next call.

    self.position = 12     read      table[12:15]     12, and 12 + 3, in the graph
    self.position + n      15        left: 15         a sum: a program for any position can be read from two
    self.position % 4      0                          no sum: what the forward does may depend on it

While such a forward is captured its integers know whether anything but sums, and multiples, was made of them.
Where not, nothing that the forward does depends on their values, and the programs of two of them show all.
Python takes the ends of a range without asking them, so that `range` is watched, too. An index into a list is
taken like that as well: where a model has lists of several numbers its integers are not free (`watch.py`).

Which attributes count is known from earlier captures of the same modules.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_RANGE = range
_KNOWN: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def note(module: nn.Module, name: str) -> None:
    """Note that forwards go on from the integer in this attribute."""
    _KNOWN.setdefault(module, set()).add(name)


class Counts:
    """The integers of one capture.

    Attributes:
        watched: (id of module, attribute) of those that were watched.
        broken: those of which something else than sums was made.
    """

    def __init__(self) -> None:
        self.watched: set[tuple[int, str]] = set()
        self.broken: set[tuple[int, str]] = set()

    @contextmanager
    def watching(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Watch the known integers of these modules for a while."""
        held: list[tuple[nn.Module, str]] = []
        for module in [module for module in dict.fromkeys(modules) if module in _KNOWN]:
            for name in sorted(_KNOWN[module]):
                if type(module.__dict__.get(name)) is int:
                    place = (id(module), name)
                    self.watched.add(place)
                    module.__dict__[name] = Counting(module.__dict__[name], self, frozenset({place}))
                    held.append((module, name))
        own = builtins.range
        try:
            if held:
                builtins.range = _Range  # type: ignore[misc]
            yield
        finally:
            builtins.range = own  # type: ignore[misc]
            for module, name in held:
                if name in module.__dict__:
                    module.__dict__[name] = plain(module.__dict__[name])


def plain(value: Any) -> Any:
    """The value itself, or the integer that was watched."""
    return value.value if isinstance(value, Counting) else value


class Counting(int):
    """An integer that knows what is made of it."""

    def __new__(cls, value: int, counts: Counts, places: frozenset[tuple[int, str]]) -> Counting:
        self = super().__new__(cls, value)
        self.value, self._counts, self._places = value, counts, places
        return self

    value: int
    _counts: Counts
    _places: frozenset[tuple[int, str]]

    def _sum(self, value: Any, other: Any) -> Any:
        if isinstance(other, torch.Tensor):  # an operation of the graph, with the integer in it
            return value
        if type(value) is not int:  # of a float
            self._break(other)
            return value
        places = other._places if isinstance(other, Counting) else frozenset()
        return Counting(value, self._counts, self._places | places)

    def _break(self, *others: Any) -> None:
        for one in (self, *others):
            if isinstance(one, Counting):
                self._counts.broken |= one._places

    def __add__(self, other: Any) -> Any:
        return self._sum(int.__add__(self, other), other)

    def __radd__(self, other: Any) -> Any:
        return self._sum(int.__radd__(self, other), other)

    def __sub__(self, other: Any) -> Any:
        return self._sum(int.__sub__(self, other), other)

    def __rsub__(self, other: Any) -> Any:
        return self._sum(int.__rsub__(self, other), other)

    def __mul__(self, other: Any) -> Any:
        return self._times(int.__mul__(self, other), other)

    def __rmul__(self, other: Any) -> Any:
        return self._times(int.__rmul__(self, other), other)

    def _times(self, value: Any, other: Any) -> Any:
        if type(other) is int or isinstance(other, torch.Tensor):
            return self._sum(value, other)
        self._break(other)
        return value

    def __reduce__(self) -> Any:
        return int, (self.value,)

    def __repr__(self) -> str:
        return repr(self.value)


class _AsRange(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _RANGE)


class _Range(metaclass=_AsRange):
    """`range`, whose numbers are integers that know nothing."""

    def __new__(cls, *ends: Any) -> Any:
        for end in ends:
            if isinstance(end, Counting):
                end._break()
        return _RANGE(*ends)


def _breaking(name: str) -> Callable[..., Any]:
    plain_one = getattr(int, name)

    def method(self: Counting, *others: Any) -> Any:
        self._break(*others)
        return plain_one(self, *others)

    method.__name__ = name
    return method


for _name in (
    *("mod", "rmod", "floordiv", "rfloordiv", "truediv", "rtruediv", "divmod", "rdivmod"),
    *("pow", "rpow", "lshift", "rlshift", "rshift", "rrshift", "and", "rand", "or", "ror", "xor", "rxor"),
    *("eq", "ne", "lt", "le", "gt", "ge", "bool", "hash", "neg", "abs", "invert", "round", "int", "index"),
    *("float", "trunc", "floor", "ceil"),
):
    setattr(Counting, f"__{_name}__", _breaking(f"__{_name}__"))


__all__ = ["Counting", "Counts", "note", "plain"]
