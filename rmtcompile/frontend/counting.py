"""Counting: integers that a forward reads from its model, adds to, and leaves there for the next call.

    self.position = 12     read      table[12:15]     12, and 12 + 3, in the graph
    self.position + n      15        left: 15         a sum: a program for any position can be read from two
    self.position % 4      0                          no sum: what the forward does may depend on it

While such a forward is captured its integers know whether anything but sums, and multiples, was made of them.
Where not, nothing that the forward does depends on their values, and the programs of two of them show all.

What takes an integer without asking it is found in the source (`unasked.py`).

Which attributes count is known from earlier captures of the same modules, and so is what was made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from rmtcompile.frontend.unasked import unasked

Place = tuple[int, str]
"""(id of module, attribute)."""

_KNOWN: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()
"""By module and attribute: whether nothing but sums was made of it so far."""


def note(module: nn.Module, name: str) -> None:
    """Note that forwards go on from the integer in this attribute."""
    _KNOWN.setdefault(module, {}).setdefault(name, True)


class Counts:
    """The integers of one capture."""

    def __init__(self) -> None:
        self._watched: dict[Place, nn.Module] = {}

    def __bool__(self) -> bool:
        return bool(self._watched)

    @property
    def sums(self) -> frozenset[Place]:
        """Those of which nothing but sums was made, by this capture and all before it."""
        return frozenset(place for place, module in self._watched.items() if _KNOWN[module][place[1]])

    def broken(self, places: Iterable[Place]) -> None:
        """Something else than a sum is made of these."""
        for place in places:
            _KNOWN[self._watched[place]][place[1]] = False

    @contextmanager
    def watching(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Watch the known integers of these modules for a while."""
        here: dict[Place, nn.Module] = {}
        for module in [module for module in dict.fromkeys(modules) if module in _KNOWN]:
            for name in _KNOWN[module]:
                value = module.__dict__.get(name)
                if type(value) is int:
                    place = (id(module), name)
                    here[place] = self._watched[place] = module
                    module.__dict__[name] = Counting(value, self, frozenset({place}))
        looking = unasked(lambda x: isinstance(x, Counting), Counting.break_with) if here else nullcontext()
        try:
            with looking:
                yield
        finally:
            for (_, name), module in here.items():
                if name in module.__dict__:
                    module.__dict__[name] = plain(module.__dict__[name])


def plain(value: Any) -> Any:
    """The value itself, or the integer that was watched."""
    return int.__pos__(value) if isinstance(value, Counting) else value


class Counting(int):
    """An integer that knows what is made of it."""

    _counts: Counts
    _places: frozenset[Place]

    def __new__(cls, value: int, counts: Counts, places: frozenset[Place]) -> Counting:
        self = super().__new__(cls, value)
        self._counts, self._places = counts, places
        return self

    def __reduce__(self) -> Any:
        return int, (plain(self),)

    def break_with(self, *others: Any) -> None:
        """Note that what is made of this integer, and of others, is no sum."""
        for one in (self, *others):
            if isinstance(one, Counting):
                one._counts.broken(one._places)

    def sum_of(self, value: Any, *others: Any) -> Any:
        """What an operation gives whose result is a sum, or a multiple."""
        places = [one._places for one in others if isinstance(one, Counting)]
        return Counting(value, self._counts, self._places.union(*places))


def _summing(name: str, is_product: bool = False) -> Callable[..., Any]:
    own = getattr(int, name)

    def method(self: Counting, *others: Any) -> Any:
        value = own(self, *others)
        if any(isinstance(other, torch.Tensor) for other in others):  # an operation of the graph
            return value
        if type(value) is not int or (is_product and any(isinstance(x, Counting) for x in others)):
            self.break_with(*others)  # with a float, say
            return value
        return self.sum_of(value, *others)

    return method


def _breaking(name: str) -> Callable[..., Any]:
    own = getattr(int, name)

    def method(self: Counting, *others: Any) -> Any:
        self.break_with(*others)
        return own(self, *others)

    return method


for _name in ("add", "radd", "sub", "rsub", "neg", "pos"):
    setattr(Counting, f"__{_name}__", _summing(f"__{_name}__"))
for _name in ("mul", "rmul"):
    setattr(Counting, f"__{_name}__", _summing(f"__{_name}__", is_product=True))
for _name in (
    *("mod", "rmod", "floordiv", "rfloordiv", "truediv", "rtruediv", "divmod", "rdivmod"),
    *("pow", "rpow", "lshift", "rlshift", "rshift", "rrshift", "and", "rand", "or", "ror", "xor", "rxor"),
    *("eq", "ne", "lt", "le", "gt", "ge", "bool", "hash", "abs", "invert", "round", "int", "index"),
    *("float", "trunc", "floor", "ceil", "format", "str", "repr"),
):
    setattr(Counting, f"__{_name}__", _breaking(f"__{_name}__"))
for _name in ("bit_length", "bit_count", "to_bytes", "as_integer_ratio", "conjugate"):
    setattr(Counting, _name, _breaking(_name))


__all__ = ["Counting", "Counts", "note", "plain"]
