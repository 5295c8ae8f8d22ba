"""Entries: a compiled program with what executes it, and what is known of the sizes that it is right for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.dispatch.size_vectors import Columns, Tie, Vector
from rmtcompile.errors import RerollError
from rmtcompile.ir.segmentation import Segmentation
from rmtcompile.passes.sizes import Sizes
from rmtcompile.runtime.costs import Costs
from rmtcompile.runtime.execute import Executor
from rmtcompile.saved import Record, Shelved


@dataclass
class Lengths:
    """What comparisons with the model have shown of one code at different numbers of segments.

    Attributes:
        checked: short lengths that are right.
        uncovered: short lengths that are not.
        are_shorter_known: whether all lengths shorter than that of a first call were looked at.
        refused: why there is no program for some of these alone.
        checked_to: the longest input that was compared because it is longer than the captures.
        too_short: whether the captures were too short for longer inputs.
        followed_to: the most segments for which the forward was seen to do what the rules say.
        tried_to: the most segments for which that was tried.
        unknown: why it could not be followed further.
    """

    checked: set[int] = field(default_factory=set)
    uncovered: set[int] = field(default_factory=set)
    are_shorter_known: bool = False
    refused: dict[int, str] = field(default_factory=dict)
    checked_to: int = 0
    too_short: bool = False
    followed_to: int = 0
    tried_to: int = 0
    unknown: str = ""


@dataclass
class Entry:
    """A compiled program and what executes it.

    Attributes:
        settled: whether hooks that the first forward registers are registered.
        lengths: what is known about numbers of segments.
        verified: lengths at which `verify=True` compared this very program with the model.
        only: programs for single lengths that the rules do not give.
        longer: what replaces it: rules from longer captures.
        trial: for a program that rules for sizes gave, what would show that they are wrong.
        is_edited: whether its module is one that the user has edited.
        made_for: the key of its family, and the sizes.
        finer: the program on a finer grid that runs texts read in one call in its place (`finer.py`).
        parts: of a segment on that grid; None where it was not looked for yet.
        unruled: why there are no rules, where it is for one number of segments for that reason.
        asked: the arguments of the call that it was made for, without their tensors; see `asked`.
    """

    compiled: Compiled
    executor: Executor
    segmentation: Segmentation
    asked: Any = None
    settled: bool = False
    lengths: Lengths = field(default_factory=Lengths)
    verified: set[int] = field(default_factory=set)
    only: dict[int, Entry] = field(default_factory=dict)
    longer: Entry | None = None
    trial: Trial | None = None
    is_edited: bool = False
    made_for: tuple[Any, Vector] | None = None
    finer: Entry | None = None
    parts: int | None = None
    unruled: RerollError | None = None

    def serves(self, by_itself: bool) -> bool:
        """Whether it runs such calls; see `Call`."""
        is_general = self.unruled is None and self.segmentation.parts == 1
        return by_itself or (is_general and (self.trial is None or not self.trial.is_whole))

    @property
    def is_borrowed(self) -> bool:
        """Whether it is a saved program, or one for texts with a rest that runs a whole one: where it is in
        doubt the call is captured."""
        return is_loaded(self.compiled) or (self.trial is not None and self.trial.is_whole)

    @property
    def example(self) -> Any:
        """(args, kwargs) of the call that it was made for, with fake tensors. To make the first of a process
        imports what takes seconds."""

        def fake(value: Any) -> Any:
            if not isinstance(value, _Like):
                return value
            return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)

        with FakeTensorMode(allow_non_fake_inputs=True):
            return pytree.tree_map(fake, self.asked, is_leaf=lambda value: isinstance(value, _Like))


class _Like(NamedTuple):
    """A tensor without its memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def asked(args: Any, kwargs: Any) -> Any:
    """The arguments of a call with what is known of its tensors in their place."""

    def like(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return _Like(tuple(value.shape), value.stride(), value.dtype, value.device)

    return pytree.tree_map(like, (args, kwargs))


@dataclass
class Trial:
    """A use of rules.

    Attributes:
        at: the sizes.
        edges: see `Rules.edges`.
        is_new: whether nothing has shown yet that the rules hold for these.
        is_corner: whether the rules were read from a program of these sizes.
    """

    rules: Rules
    at: Sizes
    edges: frozenset[str]
    is_new: bool
    is_corner: bool

    @property
    def is_whole(self) -> bool:
        """Whether the last segment is as long as the others: a text without a rest, run as one with."""
        return any(self.at[name] == length for name, length in self.rules.full.items())


@dataclass
class Rules:
    """A program of free sizes, and the sizes that it is for.

    Attributes:
        columns: where in the size vector each free size stands.
        corners: the vectors that the rules were read from; without the integers that the model keeps, where
            these are the same at all corners.
        remainders: the free sizes that are lengths of a short segment.
        counts: those that are integers which the model keeps from call to call.
        ties: places of the vector where further ones of these stand, and how they follow.
        reach: the largest of these that were compared with the model.
        beyond: some that lead out of what the model has, and with them all that are as large.
        samples: the programs at the corners.
        shapes: shapes of the outputs.
        executor: the first one; others share its compiled forms.
        costs: measured, for the choice of the plan.
        workspaces: measured, for the choice of how blocks are recorded; see `BlockRecorder.seconds`.
        lengths, trusted, refuted: what comparisons with the model have shown, by `edges`.
        full: for each of the remainders, the length of a whole segment.
    """

    columns: dict[str, Columns]
    corners: tuple[Vector, ...]
    remainders: frozenset[str]
    samples: list[tuple[Sizes, Compiled]]
    compiled: Compiled
    shapes: Any
    executor: Executor | None = None
    costs: Costs | None = None
    workspaces: dict[str, float] = field(default_factory=dict)
    lengths: dict[frozenset[str], Lengths] = field(default_factory=dict)
    trusted: set[frozenset[str]] = field(default_factory=set)
    refuted: set[frozenset[str]] = field(default_factory=set)
    counts: frozenset[str] = frozenset()
    ties: dict[int, Tie] = field(default_factory=dict)
    reach: dict[str, int] = field(default_factory=dict)
    beyond: list[Sizes] = field(default_factory=list)
    full: Sizes = field(default_factory=dict)

    def is_far(self, sizes: Sizes) -> bool:
        """Whether an integer that the model keeps is more than twice as large as any that was captured or
        compared with the model."""
        seen = {name: max(corner[self.columns[name][0]] for corner in self.corners) for name in self.counts}
        return any(sizes[name] > 2 * max(seen[name], self.reach.get(name, 0)) for name in self.counts)

    def sizes(self, vector: Vector) -> Sizes | None:
        """The free sizes in a vector, or None if it differs from the corners elsewhere too."""
        mine = {i for columns in self.columns.values() for i in columns} | self.ties.keys()
        base = self.corners[0]
        vector = vector if self.counts else vector[: len(base)]
        if len(vector) != len(base) or any(v != base[i] for i, v in enumerate(vector) if i not in mine):
            return None
        found = {}
        for name, columns in self.columns.items():
            values = {vector[i] for i in columns}
            seen = {corner[columns[0]] for corner in self.corners}
            if len(values) != 1 or min(values) < (0 if name in self.counts else 1):
                return None
            found[name] = values.pop()
            if found[name] == 1 and 1 not in seen and name not in self.remainders | self.counts:
                return None  # one row is often another program, and worth a capture of its own
        if any(all(found[name] >= at[name] for name in self.counts) for at in self.beyond):
            return None
        follow = all(vector[i] == factor * found[name] + c for i, (name, factor, c) in self.ties.items())
        return found if follow else None

    def is_current(self) -> bool:
        """Whether the model still is in the state in which the rules were read, but for what they count."""
        return is_current(self.compiled, bool(self.counts))

    def edges(self, sizes: Sizes) -> frozenset[str]:
        """The free sizes at which a program may be another one than at the corners: those that are 1 here and
        at no corner, and rests as long as a whole segment."""
        seen = {name for name, columns in self.columns.items() if 1 in {c[columns[0]] for c in self.corners}}
        ones = {name for name, size in sizes.items() if size == 1 and name not in seen | self.counts}
        return frozenset(ones | {f"{name} is whole" for name, n in self.full.items() if sizes[name] == n})


@dataclass
class Restored:
    """A program from a folder.

    Attributes:
        workspaces: see `Rules`.
        longer: the fewest segments captured for the rules that replace it; 0 if none do.
    """

    compiled: Compiled
    lengths: Lengths
    costs: Costs | None = None
    workspaces: dict[str, float] = field(default_factory=dict)
    longer: int = 0


@dataclass(frozen=True)
class Loaded:
    """The origin of a program that came from a folder."""

    fingerprint: Any
    record: Record
    shelved: Shelved


def is_loaded(compiled: Compiled) -> bool:
    """Whether a program came from a folder: it runs and reports, and has no graphs."""
    return isinstance(compiled.origin, Loaded)


def is_current(compiled: Compiled, any_numbers: bool = False) -> bool:
    """Whether the model still is in the state in which it was captured.

    Args:
        any_numbers: see `Compiled.changed`.
    """
    return compiled.fits() and compiled.changed(any_numbers) is None


def counts_on(compiled: Compiled) -> bool:
    """Whether the integers that the model keeps from call to call are those that a program is for."""
    guard = compiled.capture.guard
    return guard.numbers_now() == (guard.numbers if compiled.numbers is None else compiled.numbers)


def are_alike(one: Entry, other: Entry) -> bool:
    """Whether two entries are of the same rules."""
    return one.trial is not None and other.trial is not None and one.trial.rules is other.trial.rules
