"""Lengths: whether the rules of a program hold for a number of segments, and what runs it where they do not.

Rules are read from two captures of a few segments. A carry that is read four segments later, an integer that
only looks like a line, or another rule from the tenth segment on does not show there.

    captured, 2 and 3 segments      proved
    followed, 4 .. 24 segments      the same operations, integers, sizes and operands as the rules say
    compared, 4 .. 8 segments       the same values
    longer                          extrapolated, until such an input comes

The first time that a program is to run more segments than were followed, the forward is followed on that
many, or on twice as many as before where that is more (`followed.py`): no values are computed. Where it
departs from the rules they are read again from longer captures, which settle it. And a program runs the first
segments of its first longer input, uncompiled, and is compared with the model (`compared.py`).
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rmtcompile.compiler.rerolling import SEEN
from rmtcompile.dispatch.boundary import explained
from rmtcompile.dispatch.calls import Call, TooFewSegments
from rmtcompile.dispatch.compared import (
    LONGER,
    length_to_check,
    of_segments,
    rounding,
    unexplained,
)
from rmtcompile.dispatch.entries import Entry, is_loaded
from rmtcompile.dispatch.followed import FAR, FAR_TRAINED, Followed, are_as_many, followed, is_affordable
from rmtcompile.dispatch.ruleless import alone
from rmtcompile.dispatch.verify import first_difference
from rmtcompile.errors import RerollError, UnsupportedError, VerificationError

if TYPE_CHECKING:
    from rmtcompile.dispatch.programs import Programs

AGAIN = 3
"""Segments captured for rules that no departure has replaced yet, at most: after a second one it is asked
whether what the forward does repeats."""

ANY = 1 << 62
"""More segments than any input has."""

BEHIND = 3
"""Segments captured behind one that departs late: at the end what it leaves is dead code."""

GOES_ON = SEEN
"""Segments to which the first part of a text is followed: a state that rules of a few segments have left is
of no use to those that more of them show."""

DOUBTS = 4
"""Longer captures in a row that one call may cost."""


class Lengthening:
    """Sees to it that a program is right for the number of segments of a call."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    def is_settled(self, entry: Entry, count: int) -> bool:
        """Whether nothing is left to be looked at before a program runs so many segments."""
        compiled, lengths = entry.compiled, entry.lengths
        known = max(lengths.followed_to, lengths.tried_to, compiled.proved_on[-1])
        is_trusted = entry.trial is None or entry.trial.is_corner or not entry.trial.is_new
        return (
            compiled.fixed is None
            and compiled.proved_on[0] <= count <= known
            and entry.longer is None
            and is_trusted
            and length_to_check(entry.compiled, count, lengths.checked_to) is None
        )

    def entry(self, entry: Entry, call: Call, args: Any, kwargs: Any) -> Entry:
        """The entry itself, or one compiled for just this length where its rules do not cover it.

        Args:
            args, kwargs: a whole text of as many segments, or the first 16 of it.
        """
        goes_on = call.first > 0
        call = replace(call, first=0, count=call.total, segmentation=entry.segmentation)
        if not goes_on and call.count in entry.only and entry.only[call.count].unruled is not None:
            return self._for_just(entry, call, args, kwargs)
        entry = self._followed(entry, call, args, kwargs)
        entry = self._beyond(entry, call, args, kwargs)
        entry = self._followed(entry, call, args, kwargs)
        count, lengths = call.count, entry.lengths
        self.settle_short(entry, count, args, kwargs)
        self._settle_shorter(entry, count, args, kwargs)
        if entry.compiled.fixed not in (None, count):  # no input is as long as rules need
            lengths.uncovered.add(count)
        if goes_on and count in lengths.uncovered:
            raise UnsupportedError(
                f"no rules go on to {count} segments: the program of so few is one of its own",
                remedy="call the model on the whole text",
            )
        chosen = self._for_just(entry, call, args, kwargs) if count in lengths.uncovered else entry
        if self._programs.options.verify and count not in chosen.verified and not goes_on:
            self._check(chosen, count, args, kwargs)
            chosen.verified.add(count)
        return chosen

    def settle_short(self, entry: Entry, count: int, args: Any, kwargs: Any) -> None:
        """Find out whether rules hold for fewer segments than they were read from, unless that is known."""
        compiled, lengths = entry.compiled, entry.lengths
        is_short = compiled.fixed is None and count < compiled.proved_on[0]
        if not is_short or count in lengths.uncovered or count in lengths.checked:
            return
        with entry.executor.uncompiled():
            holds = count >= compiled.fewest and self._programs.difference(entry, count, args, kwargs) is None
        if holds:  # values may not show what is done else: times zero
            given = self._programs.model, compiled.proved_on, args, kwargs, entry.segmentation
            holds = are_as_many(*given, count) is not False
        (lengths.checked if holds else lengths.uncovered).add(count)

    def _settle_shorter(self, entry: Entry, count: int, args: Any, kwargs: Any) -> None:
        """Find out the same of all shorter lengths, at a first call that takes long: later calls need not."""
        if entry.lengths.are_shorter_known or not entry.executor.engine.is_compiled:
            return
        entry.lengths.are_shorter_known = True
        for shorter in range(1, min(count, entry.compiled.proved_on[0])):
            part = of_segments(args, kwargs, entry.segmentation, shorter)
            with suppress(UnsupportedError), explained(self._programs.model, *part):
                self.settle_short(entry, shorter, *part)

    def _check(self, entry: Entry, count: int, args: Any, kwargs: Any) -> None:
        """Raise VerificationError if the program differs from the model; the message says where."""
        found = self._programs.difference(entry, count, args, kwargs)
        if found is not None:
            raise self._located_difference(entry, count, found, args, kwargs)

    def _located_difference(
        self, entry: Entry, count: int, found: str, args: Any, kwargs: Any
    ) -> VerificationError:
        if is_loaded(entry.compiled):
            return VerificationError(f"{found}\n  the program was saved: its cells cannot be looked at")
        model, options = self._programs.model, self._programs.options
        program = entry.compiled, entry.executor, entry.segmentation
        where = first_difference(model, *program, options, count, args, kwargs)
        return VerificationError("\n  ".join([found, *where]))

    def _for_just(self, entry: Entry, call: Call, args: Any, kwargs: Any) -> Entry:
        """The program for this number of segments alone.

        Raises:
            RerollError: it would be too large, or wrong.
        """
        if entry.unruled is not None and call.count not in entry.only:
            entry.only[call.count] = alone(self._programs, call, entry.unruled, args, kwargs)
        if call.count in entry.lengths.refused:
            raise TooFewSegments(entry.lengths.refused[call.count])
        if call.count not in entry.only:
            try:
                entry.only[call.count] = self._programs.made(call, args, kwargs, only=call.count)
            except UnsupportedError as error:
                if entry.compiled.rolled.fixed is not None:
                    raise
                why = f"{call.count} segments are less than the rules are for. {error}"
                entry.lengths.refused[call.count] = why
                raise TooFewSegments(why) from error
        if self._programs.is_refuted(entry.only[call.count], call.count, args, kwargs):
            entry.only[call.count] = self._programs.made(call, args, kwargs, only=call.count)
        return entry.only[call.count]

    def _followed(self, entry: Entry, call: Call, args: Any, kwargs: Any) -> Entry:
        """The entry, its forward followed to the length of the call, or what replaces it."""
        while entry.longer is not None:
            entry = entry.longer
        changed: Followed | None = None
        for _ in range(DOUBTS):
            changed = None
            lengths, rolled = entry.lengths, entry.compiled.rolled
            known = max(lengths.followed_to, entry.compiled.proved_on[-1])
            is_first = not lengths.followed_to and not lengths.tried_to
            far = _far(entry, call) if is_first else 0
            if rolled.fixed is not None or max(call.count, far) <= max(known, lengths.tried_to):
                return entry
            model, wanted = self._programs.model, (call.count, known, far)
            found = followed(model, entry.compiled, args, kwargs, entry.segmentation, *wanted)
            if entry.is_borrowed and (found.to < call.count or found.unknown):
                entry = self._anew(entry, call, args, kwargs)
                continue
            lengths.followed_to, lengths.unknown = found.to, found.unknown
            if found.unknown:
                lengths.tried_to = ANY if found.is_farthest else max(call.count, 2 * known)
            if found.to < call.count:
                entry = self._settled(entry, found, call, args, kwargs)
            elif found.departs and not call.by_itself:
                entry = self._foreseen(entry, found, call, args, kwargs)
            if entry.compiled.rolled is not rolled and not entry.compiled.rolled.is_like(rolled):
                changed = found
        if changed is not None:
            raise changed.error()
        entry.lengths.unknown = "it does something else again and again that no result shows"
        entry.lengths.tried_to = call.count
        return entry

    def _foreseen(self, entry: Entry, found: Followed, call: Call, args: Any, kwargs: Any) -> Entry:
        """The same where the forward departs from the rules in a later part of the text: the entry itself
        where there are no others that it could begin with."""
        try:
            return self._settled(entry, found, replace(call, count=found.to + 1), args, kwargs)
        except RerollError as error:
            if error.period > 1:
                raise
            return entry

    def _settled(self, entry: Entry, found: Followed, call: Call, args: Any, kwargs: Any) -> Entry:
        """The entry, or rules of longer captures, where the forward departs from the rules, or cannot be
        followed."""
        fewest = found.to + 1 if found.departs else call.count - 1
        if found.departs and fewest > self._programs.options.max_segments_captured:
            fewest += BEHIND
        rolled = entry.compiled.rolled
        if found.departs and entry.compiled.proved_on[0] > AGAIN and is_affordable(entry.compiled, SEEN):
            error = found.error()
            error.period = self._programs.period(call, args, kwargs)
            if error.period > 1:
                raise error
        if not is_affordable(entry.compiled, fewest + 1):
            if found.departs:
                raise found.error()
            return entry
        try:
            longer = self._programs.made(call, args, kwargs, fewest=fewest)
        except UnsupportedError as error:
            if found.departs or isinstance(error, RerollError):
                raise found.error(error) from error
            return entry  # these lengths cannot be captured: it stays unknown
        is_same = longer.compiled.rolled.is_like(rolled)
        if is_same and not found.departs:
            entry.lengths.followed_to, entry.lengths.unknown = longer.compiled.proved_on[-1], ""
            return entry
        entry.longer = longer
        return longer

    def _beyond(self, entry: Entry, call: Call, args: Any, kwargs: Any) -> Entry:
        """The entry, compared with the model where it is to run longer inputs than it was proved on, or what
        replaces it."""
        longest = self._programs.options.max_segments_captured + LONGER
        length = length_to_check(entry.compiled, call.count, entry.lengths.checked_to)
        while length is not None:
            proved = entry.compiled.proved_on[-1]
            part = of_segments(args, kwargs, entry.segmentation, length)
            if not entry.lengths.too_short:
                with entry.executor.uncompiled(), torch.no_grad():
                    is_followed = entry.lengths.followed_to >= length  # longer captures show nothing more
                    given = rounding(entry.compiled), unexplained(entry.compiled) if is_followed else 0.0
                    found = self._programs.difference(entry, length, *part, *given)
                settled = proved >= longest or length <= proved
                if found is None or (settled and self._is_rounding(entry, length, part)):
                    entry.lengths.checked_to = length
                    break
                if entry.is_borrowed:
                    entry = self._anew(entry, call, args, kwargs)
                    continue
                if length <= proved:
                    raise self._located_difference(entry, length, found, *part)
                if proved >= longest:
                    error = RerollError(
                        f"what holds for up to {proved} segments does not hold for {length}",
                        [found],
                        "a value must be read at most a few segments later; fallback='sequential' runs the "
                        "model as it is",
                    )
                    error.nodes = entry.compiled.longest.nodes // proved
                    raise error
            entry.lengths.too_short = True
            entry.longer = self._programs.made(call, args, kwargs, fewest=proved)
            same = entry.longer.compiled.rolled.is_like(entry.compiled.rolled)
            entry = entry.longer
            if same and self._is_rounding(entry, length, part):
                entry.lengths.checked_to = length
                break
            length = max(length, length_to_check(entry.compiled, call.count, 0) or 0)
        return entry

    def _anew(self, entry: Entry, call: Call, args: Any, kwargs: Any) -> Entry:
        """What replaces a program in doubt that was saved, and has no graphs to settle it, or that is for
        texts with a rest: the call is captured."""
        assert entry.made_for is not None
        (_, only, fewest), _ = entry.made_for
        entry.longer = self._programs.made(call, args, kwargs, only, fewest, anew=True)
        return entry.longer

    def _is_rounding(self, entry: Entry, length: int, part: tuple[Any, Any]) -> bool:
        """Whether a difference that the rules of longer captures do not explain is small enough."""
        limit = unexplained(entry.compiled)
        if limit in (0.0, math.inf):
            return limit > 0
        with entry.executor.uncompiled(), torch.no_grad():
            return self._programs.difference(entry, length, *part, tolerance=limit) is None


def _far(entry: Entry, call: Call) -> int:
    """Segments to which a forward is followed at its first call, if it can be."""
    if entry.executor.engine.is_compiled:
        return FAR_TRAINED if torch.is_grad_enabled() else FAR
    return GOES_ON if not call.by_itself and call.segmentation.period == 1 else 0
