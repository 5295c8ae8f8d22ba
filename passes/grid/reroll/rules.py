"""What rerolling gives: for each class of segments of a region, its body and where it reads from."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from rmtcompile.ir.program import Affine, Body, Each, Source
from rmtcompile.passes.grid.partition import CELL, INIT
from rmtcompile.passes.grid.reroll.unrolled import Key, Unrolled


@dataclass(frozen=True)
class ClassRule:
    """The body and the sources of one class of one region.

    Attributes:
        body: from the capture that the rules were read from.
        sources: for each live-in, the sources of the first segments of the class one by one, then the steady
            rule (relative or absolute). A list over segments is one `Each`.
        ints: for each integer of the body, its value as a function of s and S.
        varying: dims of the body's values and live-ins that are not the same for every s and S.
    """

    body: Body
    sources: tuple[LiveIn, ...]
    ints: tuple[Affine, ...]
    varying: Mapping[fx.Node, frozenset[int]] = field(default_factory=dict, compare=False)

    @property
    def grows(self) -> bool:
        """Whether a cell's sizes or integers depend on the segment."""
        return bool(self.varying) or not all(a.is_constant for a in self.ints)

    def integers(self) -> dict[fx.Node, tuple[Affine, ...]]:
        """The integers of each operation, in the order of its arguments."""
        remaining = iter(self.ints)

        def taken(value: Any) -> list[Affine]:
            if isinstance(value, (list, tuple)):
                return [a for item in value for a in taken(item)]
            if isinstance(value, dict):
                return [a for item in value.values() for a in taken(item)]
            return [next(remaining)] if type(value) is int else []

        return {node: (*taken(node.args), *taken(dict(node.kwargs))) for node in self.body.nodes}


@dataclass(frozen=True)
class LiveIn:
    """Sources of one live-in over the segments of a class: `early[s]` for the first ones, then `steady`."""

    early: dict[int, Source]
    steady: Source | Each | None

    def at(self, segment: int) -> Source | Each:
        """The source at one segment."""
        found = self.early.get(segment, self.steady)
        assert found is not None
        return found

    @property
    def is_invariant(self) -> bool:
        """Whether every segment reads the same parameter, input or init value."""
        return (
            not self.early and isinstance(self.steady, Source) and self.steady.kind in ("leaf", "input", INIT)
        )

    @property
    def key(self) -> object:
        """Equal for live-ins that travel the same way."""
        steady = self.steady.way if isinstance(self.steady, Source) else self.steady
        return (tuple((s, source.way) for s, source in sorted(self.early.items())), steady)


@dataclass(frozen=True)
class Classes:
    """Which body a region has at segment s of S: `head` of them are peeled off the front, `tail` off the
    end."""

    head: int
    tail: int

    def of(self, segment: int, count: int) -> int:
        """Class number: 0 .. head-1 from the front, -1 .. -tail from the end, `head` for all between."""
        if segment >= count - self.tail:
            return segment - count
        return min(segment, self.head)

    def met(
        self,
        number: int,
        back: int,
        other: Classes,
        minimum: int,
        early: Container[int] = (),
        ends: Container[int] = (),
    ) -> set[int]:
        """The classes of another region that this one's class `number` finds `back` segments before, in
        inputs of `minimum` segments or more.

        Args:
            early, ends: segments that do not read there, counted from the start and from the end.
        """
        enough = minimum + self.head + self.tail + other.head + other.tail + back + 1
        return {
            other.of(segment - back, count)
            for count in range(minimum, enough + 1)
            for segment in range(back, count)
            if self.of(segment, count) == number
            and segment not in early
            and count - 1 - segment not in ends
        }


@dataclass(frozen=True)
class Rolled:
    """The rules: `rules[(kind, layer)][class]`; init has the single class 0."""

    n_layers: int
    classes: dict[Key, Classes]
    rules: dict[Key, dict[int, ClassRule]]
    # Absolute segments count from the end where `relative`: S - 1 - segment.
    outputs: tuple[Source | Each, ...]
    base: Unrolled
    minimum: int = 1
    fixed: int | None = None
    proved_on: tuple[int, ...] = field(default=())

    @property
    def grows(self) -> bool:
        """Whether some cells' sizes or integers depend on the segment."""
        cells = (rules.values() for (kind, _), rules in self.rules.items() if kind == CELL)
        return any(rule.grows for by_class in cells for rule in by_class)

    def is_like(self, other: Rolled) -> bool:
        """Whether two captures gave the same rules: the same operations, sources and integers throughout."""

        def said(rolled: Rolled) -> Any:
            return {
                key: {number: (rule.body.key, rule.sources, rule.ints) for number, rule in by_class.items()}
                for key, by_class in rolled.rules.items()
            }

        return (
            self.classes == other.classes and self.outputs == other.outputs and said(self) == said(other)
        )

    def rule(self, kind: str, layer: int, segment: int, count: int) -> ClassRule:
        key = (kind, layer)
        return self.rules[key][self.classes[key].of(segment, count)]
