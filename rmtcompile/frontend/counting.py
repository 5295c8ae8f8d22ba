"""Counting: integers that a forward reads from its model, adds to, and leaves there for the next call.

    self.position = 12     read      table[12:15]     12, and 12 + 3, in the graph
    self.position + n      15        left: 15         a sum: a program for any position can be read from two
    self.position % 4      0                          no sum: what the forward does may depend on it

While such a forward is captured its integers know whether anything but sums, and multiples, was made of them.
Where not, nothing that the forward does depends on their values, and the programs of two of them show all.

They are no `int`: whoever wants a number of them has to ask, also in C (`names[position]`, `range`, `math`).
Functions of torch get numbers without asking (`asking.py`). To Python code they look like integers; what asks
for the very type is not seen, so that the program of such a capture is compared with the model at once.

Which attributes count is known from earlier captures of the same modules, and so is what was made of them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

Place = tuple[int, str]
"""(id of module, attribute)."""

_KNOWN: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()
"""By module and attribute: whether nothing but sums was made of it so far."""


def note(module: nn.Module, name: str) -> None:
    """Note that forwards go on from the integer in this attribute."""
    _KNOWN.setdefault(module, {}).setdefault(name, True)


def forget(module: nn.Module, name: str) -> None:
    """Take what is made of this integer for more than sums."""
    _KNOWN.setdefault(module, {})[name] = False


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

    def break_all(self) -> None:
        """Take what is made of all of these for more than sums."""
        self.broken(self._watched)

    @contextmanager
    def put(self, modules: Iterable[nn.Module]) -> Iterator[bool]:
        """Have the known integers of these modules watched for a while; whether there are any."""
        here: dict[Place, nn.Module] = {}
        for module in [module for module in dict.fromkeys(modules) if module in _KNOWN]:
            for name in [name for name, are_sums in _KNOWN[module].items() if are_sums]:
                value = module.__dict__.get(name)
                if type(value) is int:
                    place = (id(module), name)
                    here[place] = self._watched[place] = module
                    module.__dict__[name] = Counting(value, {place: 1}, self)
        try:
            yield bool(here)
        finally:
            for (_, name), module in here.items():
                if name in module.__dict__:
                    module.__dict__[name] = plain(module.__dict__[name])


def plain(value: Any) -> Any:
    """The value itself, or the number of an integer that was watched."""
    return value.number if type(value) is Counting else value


class Counting(torch.SymInt):
    """A sum of watched integers. Functions of torch take it as they take any `torch.SymInt`.

    Attributes:
        number: what it is.
        parts: how often it has the integer of each place.
    """

    number: int
    parts: Mapping[Place, int]

    def __init__(self, number: int, parts: Mapping[Place, int], counts: Counts) -> None:
        super().__init__(_Asked(self))
        self.number, self.parts, self._counts = number, parts, counts

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` sees."""
        return int

    def __copy__(self) -> Counting:
        return self

    def __deepcopy__(self, _: Any) -> Counting:
        return self

    def __reduce__(self) -> Any:
        self.break_up()
        return int, (self.number,)

    def break_up(self, places: Iterable[Place] | None = None) -> None:
        """Note that what is made of it is no sum; of the integers of some places only, if they are given."""
        self._counts.broken(self.parts if places is None else places)

    def sum(self, number: int, own: int, other: Any = 0, others: int = 0) -> Any:
        """`own` times this one and `others` times the other one, which make this number."""
        parts = {place: own * count for place, count in self.parts.items()}
        for place, count in other.parts.items() if type(other) is Counting else ():
            parts[place] = parts.get(place, 0) + others * count
        parts = {place: count for place, count in parts.items() if count}
        return Counting(number, parts, self._counts) if parts else number


class _Asked:
    """What torch asks where a sum comes past `asking.py`: it is noted, and cannot be told."""

    def __init__(self, owner: Counting) -> None:
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        self._owner.break_up()
        raise AttributeError(name)


def _adding(function: Callable[[Any, Any], Any], own: int, others: int) -> Callable[..., Any]:
    def method(self: Counting, other: Any) -> Any:
        if isinstance(other, torch.Tensor):  # an operation of the graph
            return NotImplemented
        number = function(self.number, plain(other))
        if type(number) is int:
            return self.sum(number, own, other, others)
        return _asked(number, self, other)  # with a float, say

    return method


def _times(self: Counting, other: Any) -> Any:
    if isinstance(other, torch.Tensor):
        return NotImplemented
    number = self.number * plain(other)
    if type(number) is int and type(other) in (int, bool):
        return self.sum(number, other)
    return _asked(number, self, other)


def _asking(function: Callable[..., Any], is_turned: bool = False) -> Callable[..., Any]:
    def method(self: Counting, *others: Any) -> Any:
        if any(isinstance(other, torch.Tensor) for other in others):
            return NotImplemented
        given = [plain(x) for x in (self, *others)]
        return _asked(function(*(reversed(given) if is_turned else given)), self, *others)

    return method


def _asked(result: Any, *operands: Any) -> Any:
    """The result of what is no sum."""
    for one in operands:
        if type(one) is Counting:
            one.break_up()
    return result


_SUMS = {
    "add": _adding(operator.add, 1, 1), "radd": _adding(lambda a, b: b + a, 1, 1),
    "mul": _times, "rmul": _times, "sub": _adding(operator.sub, 1, -1),
    "rsub": _adding(lambda a, b: b - a, -1, 1),
    "neg": lambda self: self.sum(-self.number, -1), "pos": lambda self: self,
}  # fmt: skip
_BINARY: dict[str, Callable[..., Any]] = {
    "mod": operator.mod, "floordiv": operator.floordiv, "truediv": operator.truediv, "divmod": divmod,
    "pow": pow, "lshift": operator.lshift, "rshift": operator.rshift, "and": operator.and_,
    "or": operator.or_, "xor": operator.xor,
}  # fmt: skip
_OTHERS: dict[str, Callable[..., Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
    "ge": operator.ge, "bool": bool, "hash": hash, "abs": abs, "invert": operator.invert, "round": round,
    "int": int, "index": operator.index, "float": float, "complex": complex, "trunc": math.trunc,
    "floor": math.floor, "ceil": math.ceil, "format": format, "str": str, "repr": repr,
}  # fmt: skip
for _name, _method in _SUMS.items():
    setattr(Counting, f"__{_name}__", _method)
for _name, _function in _BINARY.items():
    setattr(Counting, f"__{_name}__", _asking(_function))
    setattr(Counting, f"__r{_name}__", _asking(_function, is_turned=True))
for _name, _function in _OTHERS.items():
    setattr(Counting, f"__{_name}__", _asking(_function))
for _name in ("bit_length", "bit_count", "to_bytes", "as_integer_ratio", "conjugate", "is_integer"):
    setattr(Counting, _name, _asking(operator.methodcaller(_name)))


__all__ = ["Counting", "Counts", "Place", "forget", "note", "plain"]
