"""Learning: the rules for sizes that a new program makes possible, read from it and others of its family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from rmtcompile.binding.watch import ModuleGuard
from rmtcompile.compiler.free_sizes import differ, sized
from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.dispatch.entries import Lengths, Rules, is_current
from rmtcompile.dispatch.size_vectors import Counted, Vector, boxes, counted, free_sizes
from rmtcompile.errors import UnsupportedError
from rmtcompile.passes.sizes import Sizes, SizesDiffer

_MAX_EXTRA = 3
"""Captures that one call may cost beyond its own."""


@dataclass
class Family:
    """Programs by size vector, and the rules read from them."""

    known: dict[Vector, Compiled] = field(default_factory=dict)
    rules: list[Rules] = field(default_factory=list)
    failed: set[frozenset[Vector]] = field(default_factory=set)
    losses: int = 0  # captures made for rules that did not come about
    lengths: dict[Vector, Lengths] = field(default_factory=dict)  # of the programs
    guard: ModuleGuard | None = None  # of the newest program: knows what integers the model keeps

    def at(self, sizes: Vector) -> Vector:
        """The size vector of a call, with the integers that the model keeps now."""
        numbers = self.guard.numbers_now() if self.guard is not None else ()
        return (*sizes, *numbers) if all(type(number) is int for number in numbers) else sizes

    def captured(self, sizes: Vector, compiled: Compiled) -> Vector:
        """The size vector of a program that was captured now."""
        guard = compiled.capture.guard
        if self.guard is not None and guard.number_names != self.guard.number_names:
            self.known.clear()
            self.rules = [rules for rules in self.rules if not rules.counts]
        self.guard = guard
        return (*sizes, *guard.numbers)

    def forget(self) -> None:
        """Drop what the model's state or weights no longer fit, and the oldest programs."""
        for vector in [v for v, compiled in self.known.items() if not is_current(compiled, True)]:
            del self.known[vector]
        self.rules = [rules for rules in self.rules if rules.is_current()]
        for vector in list(self.known)[:-8]:
            del self.known[vector]


def learn(
    family: Family,
    vector: Vector,
    lengths: Sequence[int | None],
    captured: Callable[[Vector], Compiled],
) -> Rules | None:
    """Rules that a new program makes possible, read from it and others, some captured for that."""
    kept = vector[len(lengths) :]
    known = [v for v in family.known if v[len(lengths) :] == kept]
    for corners in boxes(known, vector, lengths):
        missing = [v for v in corners if v not in family.known]
        free = free_sizes(corners, lengths)
        if frozenset(corners) in family.failed or len(missing) > _MAX_EXTRA or free is None:
            continue
        if missing and family.losses >= _MAX_EXTRA:
            continue
        try:
            present = [family.known[v] for v in corners if v in family.known]
            for other in present[1:]:
                differ(present[0], other)
            for v in missing:
                family.known[v] = captured(v)
                differ(present[0], family.known[v])
            return _read(family, corners, Counted(free, frozenset(), {}), lengths)
        except (SizesDiffer, UnsupportedError):
            family.failed.add(frozenset(corners))
            family.losses += len(missing)
    new, others = family.known[vector], [v for v in family.known if v != vector] if kept else []
    fixed = [len(lengths) + i for i, is_sum in enumerate(new.capture.guard.are_sums) if not is_sum]
    others = [v for v in others if all(v[i] == vector[i] for i in fixed)]
    alike = [v for v in others if _is_alike(family.known[v], new)]
    for corners, found in counted(alike, vector, lengths):
        with suppress(SizesDiffer):
            return _read(family, corners, found, lengths)
    return None


def _read(
    family: Family, corners: Sequence[Vector], free: Counted, lengths: Sequence[int | None]
) -> Rules:
    counts, columns = free.counts, free.columns
    remainders = frozenset(
        name for name, (first, *_) in columns.items() if name not in counts and lengths[first] is not None
    )
    samples: list[tuple[Sizes, Compiled]] = [
        ({name: v[first] for name, (first, *_) in columns.items()}, family.known[v]) for v in corners
    ]
    compiled, shapes = sized(samples, remainders, counts)
    read_from = tuple(corner if counts else corner[: len(lengths)] for corner in corners)
    full = {name: length for name in remainders if (length := lengths[columns[name][0]]) is not None}
    rules = Rules(
        columns, read_from, remainders, samples, compiled, shapes, counts=counts, ties=free.ties, full=full
    )
    family.rules = [rules, *family.rules[:7]]
    return rules


def _is_alike(one: Compiled, other: Compiled) -> bool:
    """Whether two programs differ in integers only."""
    try:
        differ(one, other)
    except SizesDiffer:
        return False
    return True
