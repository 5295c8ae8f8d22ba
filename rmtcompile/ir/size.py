"""Sizes of programs that serve several of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

KEPT = "K"
"""How the names of sizes begin that are integers which a model keeps from call to call."""


class Size(int):
    """An integer of a program that follows from free sizes of the inputs (`passes/sizes.py`).

    As an `int` it is the value in the capture that it was read from; printed, it is an expression of the
    sizes. Arithmetic gives plain integers.

    Attributes:
        terms: (names, factor) pairs; the value is the sum of each factor times the sizes of these names.
    """

    terms: tuple[tuple[tuple[str, ...], int], ...]

    def __new__(cls, value: int, terms: tuple[tuple[tuple[str, ...], int], ...]) -> Size:
        self = super().__new__(cls, value)
        self.terms = terms
        return self

    def at(self, sizes: Mapping[str, int]) -> int:
        """The integer at other sizes."""
        return sum(factor * math.prod(sizes[name] for name in names) for names, factor in self.terms)

    @property
    def names(self) -> set[str]:
        """The sizes that it follows from."""
        return {name for names, _ in self.terms for name in names}

    def __bool__(self) -> bool:
        return True  # it may be zero in one capture, but is no zero that can be left out

    def __repr__(self) -> str:
        text = ""
        for names, factor in self.terms:
            size = abs(factor)
            term = " * ".join([*([] if size == 1 and names else [str(size)]), *names])
            text += f" {'-' if factor < 0 else '+'} {term}" if text else "-" * (factor < 0) + term
        return text

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __reduce__(self) -> Any:
        return (Size, (int(self), self.terms))


__all__ = ["KEPT", "Size"]
