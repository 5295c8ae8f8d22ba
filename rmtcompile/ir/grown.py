"""Integers of cells that grow with the segment: sizes of what keeps something of every earlier segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rmtcompile.ir.program import Affine


class Grown(int):
    """An integer of a cell that is another in each segment.

    As an `int` it is the value in the capture that it was read from; printed, it is a function of s.

    Attributes:
        affine: its value at segment s.
    """

    affine: Affine

    def __new__(cls, value: int, affine: Affine) -> Grown:
        self = super().__new__(cls, value)
        self.affine = affine
        return self

    def __eq__(self, other: object) -> bool:
        same = not isinstance(other, Grown) or self.affine == other.affine
        return same and int(self) == other

    def __hash__(self) -> int:
        return hash(int(self))

    def __repr__(self) -> str:
        return str(self.affine)

    __str__ = __repr__

    def __reduce__(self) -> Any:
        return (Grown, (int(self), self.affine))


def grown(value: Any, ints: Sequence[Affine]) -> Any:
    """Arguments of an operation with a `Grown` for each integer that the segment decides.

    Args:
        value: positional and keyword arguments.
        ints: of each integer in them, in order, its value as a function of the segment.
    """
    remaining = iter(ints)

    def visit(one: Any) -> Any:
        if isinstance(one, (list, tuple)):
            return type(one)(visit(item) for item in one)
        if isinstance(one, dict):
            return {key: visit(item) for key, item in one.items()}
        if type(one) is int:
            affine = next(remaining)
            return one if affine.is_constant else Grown(one, affine)
        return one

    return visit(value)


def is_grown(value: Any) -> bool:
    """Whether a `Grown` is among nested arguments."""
    if isinstance(value, (list, tuple)):
        return any(is_grown(item) for item in value)
    return is_grown(list(value.values())) if isinstance(value, dict) else isinstance(value, Grown)


def replaced(value: Any, is_one: Callable[[Any], bool], new: Callable[[Any], Any]) -> Any:
    """Nested arguments with `new(x)` in place of each x that `is_one`."""
    if is_one(value):
        return new(value)
    if isinstance(value, (list, tuple)):
        return type(value)(replaced(item, is_one, new) for item in value)
    if isinstance(value, dict):
        return {key: replaced(item, is_one, new) for key, item in value.items()}
    return value
