"""Free sizes in emitted functions: taken from the shapes of arguments, so that one compiled form serves them
all.

    def cell_layers_last(v0, ...):
        R = v0.shape[2] - 2
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from rmtcompile.ir.program import Affine, Opened
from rmtcompile.ir.size import Size

if TYPE_CHECKING:
    from rmtcompile.passes.emit.cells import CellFunction

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sized:
    """What makes a program one of free sizes; see `passes/sizes.py`.

    Attributes:
        values: sizes by name, those of the capture that the program was read from.
        cells: the lifted cell functions, with `Size`s; meta "sizes" of a node is its shape.
        shapes: shapes of values of the other regions that depend on sizes.
        rests: the sizes that whole segments leave over.
    """

    values: Mapping[str, int]
    cells: tuple[CellFunction, ...]
    shapes: Mapping[fx.Node, Shape]
    rests: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Opening:
    """How a function gets the sizes that it needs: lines of code, and what of it depends on sizes."""

    lines: tuple[str, ...]
    opened: Opened


def opening(
    params: Sequence[tuple[str, Shape]], values: Iterable[Any], outputs: Sequence[Shape] = ()
) -> Opening | None:
    """The opening of a function with these parameters, integers among these values, and outputs of these
    shapes; None where the parameters do not show a size."""
    lines = []
    for name in sorted(set(names_in(values))):
        shown = (
            text
            for param, shape in params
            for dim, n in enumerate(shape)
            if (text := _solved(n, name, f"{param}.shape[{dim}]"))
        )
        text = next(shown, None)
        if text is None:
            return None
        lines.append(f"{name} = {text}")
    shapes = [shape for _, shape in params]
    return Opening(tuple(lines), Opened(_free(shapes), _free(outputs)))


def _free(shapes: Sequence[Shape]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(i for i, n in enumerate(shape) if isinstance(n, Size)) for shape in shapes)


def _solved(n: int, name: str, text: str) -> str | None:
    """The size as an expression of a dim, where the dim is `factor * size + rest`."""
    if not isinstance(n, Size) or n.names != {name}:
        return None
    factors = dict(n.terms)
    factor, rest = factors[(name,)], factors.get((), 0)
    if factor < 1:
        return None
    if rest:
        text += f" {'-' if rest > 0 else '+'} {abs(rest)}"
    return text if factor == 1 else f"({text}) // {factor}" if rest else f"{text} // {factor}"


def names_in(value: Any) -> Iterator[str]:
    """Names of the sizes in nested arguments."""
    if isinstance(value, Size):
        yield from value.names
    elif isinstance(value, Affine):
        yield from names_in((value.const, value.by_segment, value.by_count))
    elif isinstance(value, dict):
        yield from names_in(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            yield from names_in(item)
