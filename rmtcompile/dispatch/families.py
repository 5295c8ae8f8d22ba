"""Families: the programs of calls that differ in sizes only, and the rules that give the program of a size
that was not seen yet.

    f(x[1, 20, D])   captured
    f(x[2, 20, D])   captured, and made one with the first: B is a free size
    f(x[3, 20, D])   the same code, loaded with B = 3; no capture
    f(x[7, 23, D])   a rest of 3: captured ...

Integers that the model keeps from call to call, a position in a text say, are sizes here, too; a program for
another one cannot be captured before the model has come to it.

Sizes that change together are one free size (`size_vectors.py`). Rules need the program at both values of a
free size, at the four corners where there are two; corners that nobody called for are captured too. Where one
of two sizes is 1 the programs may differ (broadcasting), and the next larger size is captured instead.

A rule is proved at its corners. The first use away from the corners, and the first of length one, are
checked: they run on fake tensors first, and are compared with the model itself; so is one whose kept integers
are more than twice as large as any before. For rests that is done as
soon as there is a rule, on the input at hand, cut to a rest of another length. A later instance that stops
where it runs is given up for a capture. A text without a rest is one whose rest is a whole segment, where
rules for rests came first (`_as_rest`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from rmtcompile.binding.guard import structure_key
from rmtcompile.compiler.free_sizes import instance, sized
from rmtcompile.compiler.pipeline import Compiled, rescheduled
from rmtcompile.compiler.unrolling import reshaped, resize
from rmtcompile.dispatch.compared import CHECKED, of_rest
from rmtcompile.dispatch.entries import Entry, Lengths, Restored, Rules, Trial
from rmtcompile.dispatch.learning import Family, learn
from rmtcompile.dispatch.size_vectors import Vector, lengths_of, shapes_at, sizes_of, tensors_in
from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.layouts import Layout
from rmtcompile.ir.segmentation import Segmentation
from rmtcompile.passes.sizes import Sizes
from rmtcompile.passes.sizes import at as at_sizes
from rmtcompile.runtime.costs import Costs
from rmtcompile.runtime.dry import dry_run
from rmtcompile.runtime.execute import Executor


class Families:
    """Finds or makes the program of a call.

    Args:
        compile_at: captures and compiles for arguments; the last two are a single number of segments or
            None, and the fewest segments to capture.
        execute: makes an executor, like another one.
        compare: compares the program of rules with the model for arguments, and settles the trial; raises
            UnsupportedError where the model itself fails on them.
        is_alike: whether the model calls the same for arguments and for others, of so many segments; None
            where that cannot be told.
        saved_rules, saved_program: what a folder has for a key and sizes.
        layouts: of the arguments, where they decide what the forward does.
    """

    def __init__(
        self,
        compile_at: Callable[[Any, Any, Segmentation, int | None, int], Compiled],
        execute: Callable[[Compiled, Segmentation, Executor | None], Executor],
        compare: Callable[[Entry, Any, Any], object],
        is_alike: Callable[[tuple[Any, Any], tuple[Any, Any], int], bool | None],
        saved_rules: Callable[[Any, Vector], Sequence[Rules]],
        saved_program: Callable[[Any, Vector], Restored | None],
        layouts: Callable[[Any, Any], tuple[Layout, ...]],
    ) -> None:
        self._compile_at = compile_at
        self._execute = execute
        self._compare, self._is_alike = compare, is_alike
        self._saved_rules, self._saved_program, self._layouts = saved_rules, saved_program, layouts
        self._families: dict[Any, Family] = {}
        self._expected: tuple[Any, Vector, Rules, Entry] | None = None

    def expected(self, args: Any, kwargs: Any, segmentation: Segmentation) -> Entry | None:
        """What `entry` will give for sizes that come for the first time, where rules are trusted with them
        and nothing has changed since: it may be started before that is looked at."""
        key = (structure_key(args, kwargs, segmentation, self._layouts(args, kwargs)), None, 2)
        family = self._families.get(key)
        if family is None:
            return None
        vector = family.at(sizes_of(args, kwargs, segmentation))
        for rules in family.rules:
            sizes = rules.sizes(vector)
            if sizes is not None and rules.edges(sizes) in rules.trusted:
                entry = self._instance(family, rules, vector, args, kwargs, segmentation)
                self._expected = (key, vector, rules, entry) if entry is not None else None
                return entry
        return None

    def entry(
        self,
        args: Any,
        kwargs: Any,
        segmentation: Segmentation,
        only: int | None = None,
        fewest: int = 2,
        anew: bool = False,
        by_itself: bool = False,
    ) -> Entry:
        """A program for these arguments: of rules that apply, saved, or captured now; `anew`: captured.
        `by_itself`: see `Call`.

        Raises:
            UnsupportedError: the forward cannot be compiled.
        """
        key = (structure_key(args, kwargs, segmentation, self._layouts(args, kwargs)), only, fewest)
        family = self._families.setdefault(key, Family())
        sizes = sizes_of(args, kwargs, segmentation)
        vector = family.at(sizes)
        found = None if anew else self._of_rules(family, key, vector, args, kwargs, segmentation)
        if found is not None:
            return found
        family.forget()
        found = None if anew else self._saved(family, key, sizes, args, kwargs, segmentation)
        if found is not None:
            return found
        if by_itself and vector not in family.known and not anew:
            found = self._as_rest(key, args, kwargs, segmentation)
            if found is not None:
                return found
        if vector not in family.known:
            new = self._compile_at(args, kwargs, segmentation, only, fewest)
            vector = family.captured(sizes, new)
            family.known[vector] = new

            def captured(at: Vector) -> Compiled:
                """A program for sizes that nobody has called for."""
                there = reshaped(args, kwargs, shapes_at(at, args, kwargs, segmentation))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return self._compile_at(*there, segmentation, only, fewest)

            rules = learn(family, vector, lengths_of(args, kwargs, segmentation), captured)
            if rules is not None and rules.remainders:
                if only is None:
                    self._try_rests(family, rules, args, kwargs, segmentation)
                found = self._instance(family, rules, vector, args, kwargs, segmentation)
                if found is not None:
                    found.made_for = key, sizes
                    return found
        compiled = family.known[vector]
        lengths = family.lengths[vector] = Lengths()
        executor = self._execute(compiled, segmentation, None)
        return Entry(compiled, executor, segmentation, lengths=lengths, made_for=(key, sizes))

    def saved(self, args: Any, kwargs: Any, segmentation: Segmentation) -> Entry | None:
        """A saved program for these arguments."""
        key = (structure_key(args, kwargs, segmentation, self._layouts(args, kwargs)), None, 2)
        sizes, family = sizes_of(args, kwargs, segmentation), self._families.setdefault(key, Family())
        return self._saved(family, key, sizes, args, kwargs, segmentation)

    def _saved(
        self, family: Family, key: Any, sizes: Vector, args: Any, kwargs: Any, segmentation: Segmentation
    ) -> Entry | None:
        """A program from a folder, or of rules from there, for sizes that were not captured here."""
        vector = family.at(sizes)
        if vector in family.known:
            return None
        is_new = self._read_saved(family, key, sizes)
        found = self._of_rules(family, key, vector, args, kwargs, segmentation) if is_new else None
        return found or self._restored(key, sizes, segmentation)

    def _read_saved(self, family: Family, key: Any, sizes: Vector) -> bool:
        """Add rules from a folder that hold at these sizes; whether there were any that are not known."""
        corners = {rules.corners for rules in family.rules}
        new = [rules for rules in self._saved_rules(key, sizes) if rules.corners not in corners]
        family.rules = [*new, *family.rules][:8]
        return bool(new)

    def _as_rest(self, key: Any, args: Any, kwargs: Any, segmentation: Segmentation) -> Entry | None:
        """The program of rules for rests, for a text of whole segments: its last one is the longest rest.
        Saved under the key of the rests; the first use is compared with the model."""
        (call, _, rest), only, fewest = key
        if rest or segmentation.parts > 1:
            return None
        begun = segmentation.pieces(segmentation.axes[0].length) if segmentation.period > 1 else True
        family = self._families.setdefault(with_rest := ((call, segmentation, begun), only, fewest), Family())
        sizes = sizes_of(args, kwargs, segmentation, ends_whole=True)
        self._read_saved(family, with_rest, sizes)
        found = self._of_rules(family, with_rest, family.at(sizes), args, kwargs, segmentation)
        if found is not None:
            found.made_for = with_rest, sizes
        return found

    def _of_rules(
        self, family: Family, key: Any, vector: Vector, args: Any, kwargs: Any, segmentation: Segmentation
    ) -> Entry | None:
        """The program of the first rules that give one, and still hold."""
        for rules in family.rules:
            if rules.sizes(vector) is None or not rules.is_current():
                continue
            expected, self._expected = self._expected, None
            if expected is not None and expected[:2] == (key, vector) and expected[2] is rules:
                found: Entry | None = expected[3]
            else:
                found = self._instance(family, rules, vector, args, kwargs, segmentation)
            if found is not None:
                found.made_for = key, sizes_of(args, kwargs, segmentation)
                return found
        return None

    def _restored(self, key: Any, vector: Vector, segmentation: Segmentation) -> Entry | None:
        """The saved program of these sizes. No rules are read from it: its graphs are not there."""
        saved = self._saved_program(key, vector)
        if saved is None:
            return None
        executor = self._execute(saved.compiled, segmentation, None)
        executor.costs = saved.costs
        if saved.workspaces:
            executor.replays.trust(saved.workspaces)
        made_for = key, vector
        entry = Entry(saved.compiled, executor, segmentation, lengths=saved.lengths, made_for=made_for)
        if saved.longer > key[2]:
            entry.longer = self._restored((*key[:2], saved.longer), vector, segmentation)
        return entry

    def _try_rests(
        self, family: Family, rules: Rules, args: Any, kwargs: Any, segmentation: Segmentation
    ) -> None:
        """Compare rules with the model for a rest that no call had, and for one of one position, so that no
        later call has to."""
        lengths = {axis.length for axis in segmentation.axes}
        if len(rules.remainders) > 1 or len(lengths) > 1:
            return
        (name,), (length,) = rules.remainders, lengths
        seen = {corner[rules.columns[name][0]] for corner in rules.corners}
        alike = {segmentation.pieces(rest) for rest in seen}
        unseen = sorted(set(range(2, length)) - seen, key=lambda rest: abs(2 * rest - length))
        unseen = [rest for rest in unseen if segmentation.pieces(rest) in alike]
        for rest in [*unseen[:1], *({1} - seen if segmentation.pieces(1) in alike else ())]:
            there = of_rest(args, kwargs, segmentation, CHECKED, rest)
            vector = family.at(sizes_of(*there, segmentation))
            entry = self._instance(family, rules, vector, *there, segmentation)
            if entry is not None:
                with suppress(UnsupportedError):  # a model need not run on every rest: it stays untried
                    self._compare(entry, *there)

    def settle(self, trial: Trial, is_right: bool) -> None:
        """Note whether a use of rules gave what the model gives; where not, they are not used again."""
        rules = trial.rules
        (rules.trusted if is_right else rules.refuted).add(trial.edges)
        if is_right:
            rules.reach |= {name: max(trial.at[name], rules.reach.get(name, 0)) for name in rules.counts}

    def run_in_order(self, entry: Entry, costs: Costs) -> None:
        """Give a program one cell a level, and all later ones of the same rules, since that was measured to
        be cheaper."""
        if entry.trial is None:
            entry.compiled = rescheduled(entry.compiled, entry.compiled.program.n_layers)
            entry.executor = self._execute(entry.compiled, entry.segmentation, None)
        else:
            rules = entry.trial.rules
            n_layers = entry.compiled.program.n_layers
            rules.samples = [(sizes, rescheduled(compiled, n_layers)) for sizes, compiled in rules.samples]
            rules.compiled, rules.shapes = sized(rules.samples, rules.remainders, rules.counts)
            rules.executor, rules.costs = None, costs
            entry.compiled = instance(rules.compiled, entry.trial.at, entry.compiled.numbers)
            entry.executor = rules.executor = self._execute(entry.compiled, entry.segmentation, None)
        entry.executor.costs = costs

    def _instance(
        self,
        family: Family,
        rules: Rules,
        vector: Vector,
        args: Any,
        kwargs: Any,
        segmentation: Segmentation,
    ) -> Entry | None:
        """The program of the rules at these sizes, or None where they do not apply or do not hold."""
        sizes = rules.sizes(vector)
        if sizes is None:
            return None
        edges = rules.edges(sizes)
        if edges in rules.refuted:
            return None
        kept = vector[len(sizes_of(args, kwargs, segmentation)) :]
        compiled = instance(rules.compiled, sizes, kept if rules.counts else None)
        executor = self._execute(compiled, segmentation, rules.executor)
        if edges not in rules.trusted and not (
            self._holds(rules, sizes, executor, args, kwargs)
            and self._calls_the_same(rules, edges, compiled, args, kwargs, segmentation)
        ):
            return None
        rules.executor = rules.executor or executor
        executor.costs = rules.costs
        executor.replays.whole = partial(_whole, rules, sizes)
        if rules.workspaces:
            executor.replays.trust(rules.workspaces)
        is_corner = (vector if rules.counts else vector[: len(rules.corners[0])]) in rules.corners
        is_new = edges not in rules.trusted or rules.is_far(sizes)
        trial = Trial(rules, sizes, edges, is_new, is_corner)
        if edges not in rules.lengths:  # what is known of lengths at the corners need not be found out again
            corners = rules.corners if rules.counts else [(*corner, *kept) for corner in rules.corners]
            known = [family.lengths[v] for v in corners if v in family.lengths and not trial.is_whole]
            rules.lengths[edges] = Lengths(
                followed_to=min((one.followed_to for one in known), default=0),
                checked_to=min((one.checked_to for one in known), default=0),
            )
        return Entry(compiled, executor, segmentation, lengths=rules.lengths[edges], trial=trial)

    def _holds(self, rules: Rules, sizes: Sizes, executor: Executor, args: Any, kwargs: Any) -> bool:
        """Whether the program runs at these sizes, on fake tensors, and gives results of the right shapes."""
        count, inputs = executor.compiled.rolled.base.count, tensors_in(args, kwargs)
        shapes = executor.segmentation.shapes([x.shape for x in inputs], count)
        try:
            return dry_run(executor, count, shapes, inputs) == at_sizes(rules.shapes, sizes)
        except Exception:  # whatever it is, the rules do not hold here
            return False

    def _calls_the_same(
        self,
        rules: Rules,
        edges: frozenset[str],
        compiled: Compiled,
        args: Any,
        kwargs: Any,
        segmentation: Segmentation,
    ) -> bool:
        """Whether the model calls at these sizes what it calls at a corner: values may not show it. Where it
        cannot be followed, sizes at an edge are captured."""
        corner, count = rules.corners[0], compiled.proved_on[0]
        there = reshaped(args, kwargs, shapes_at(corner, args, kwargs, segmentation))
        here, there = (resize(*given, segmentation, count) for given in ((args, kwargs), there))
        found = self._is_alike(here, there, count)
        return not edges if found is None else found


def _whole(rules: Rules, sizes: Sizes) -> Compiled:
    """The program of rules for a last segment as long as the others."""
    (name,) = rules.remainders
    return instance(rules.compiled, {**sizes, name: rules.full[name]})
