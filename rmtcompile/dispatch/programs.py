"""Programs: the program that serves a call, found among those that were made or compiled now.

    call    -> segmentation, number of segments, key of its inputs and modes
    key     -> entries, one for each state of the model in which it was captured (`entries.py`)
    entry   -> rules for other sizes (`families.py`), and for other numbers of segments (`lengths.py`)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from rmtcompile.binding.arguments import tensors_of
from rmtcompile.binding.guard import call_key, program_key
from rmtcompile.binding.kinds import refuse_model, refuse_odd_arguments
from rmtcompile.compiler.pipeline import Compiled, compile_forward
from rmtcompile.compiler.rerolling import period_of_forward
from rmtcompile.compiler.stages import Log, Progress, said_when_long
from rmtcompile.dispatch.boundary import explained
from rmtcompile.dispatch.calls import Call, Layouts, TooFewSegments
from rmtcompile.dispatch.compared import CHECKED, ENOUGH, LONGER, of_segments, rounding
from rmtcompile.dispatch.entries import (
    Entry,
    Restored,
    Rules,
    are_alike,
    asked,
    counts_on,
    is_current,
    is_loaded,
)
from rmtcompile.dispatch.families import Families
from rmtcompile.dispatch.finer import finer, made_or_finer
from rmtcompile.dispatch.followed import is_alike
from rmtcompile.dispatch.lengths import Lengthening
from rmtcompile.dispatch.relocated import relocated
from rmtcompile.dispatch.ruleless import alone, periodic
from rmtcompile.dispatch.shelf import Key, Shelf
from rmtcompile.dispatch.size_vectors import Vector
from rmtcompile.dispatch.told import Told
from rmtcompile.dispatch.verify import difference
from rmtcompile.errors import BoundedError, RerollError, UnsupportedError
from rmtcompile.frontend.counting import forget
from rmtcompile.frontend.probe import probe
from rmtcompile.ir.segmentation import Segmentation
from rmtcompile.options import Options
from rmtcompile.passes.cell.optimise import FOR_COMPILED_CELLS
from rmtcompile.runtime.bands import executor_for
from rmtcompile.runtime.engine import backend_for
from rmtcompile.runtime.execute import Executor
from rmtcompile.runtime.graphs import Started
from rmtcompile.runtime.reach import OutOfReachError

MAX_SIZES = 32
"""Sizes of inputs whose programs are kept loaded."""

_CAPTURING = (
    "capturing the forward for inputs of a new kind (batch size, incomplete segment, mode, arguments); any "
    "number of segments will run it; optimize(..., progress=True) says more"
)

class Programs:
    """All programs of one model.

    Attributes:
        model: the callable, which may be exchanged.
        captures: how many programs were captured.
        segmentations: how calls are cut, by their keys.
        shelf: saved programs.
        told: what the log was told.
    """

    def __init__(self, model: Callable[..., Any], options: Options, progress: Progress | None) -> None:
        self.model = model
        self.options = options
        self.progress = progress
        self.captures = 0
        self.segmentations: dict[Any, Segmentation] = {}
        self._entries: OrderedDict[Any, list[Entry]] = OrderedDict()
        self.shelf = Shelf(options, options.cache)
        self._layouts = Layouts()
        self._families = Families(
            self._compile, self._execute, self._compare, self._is_alike,
            self._saved_rules, self._saved_program, self._layouts.of,
        )  # fmt: skip
        self._ready: dict[tuple[Any, int], Entry] = {}  # what ran the last call of a key and length
        self.told = Told(options)
        self._lengths = Lengthening(self)

    # ---- a call --------------------------------------------------------------------------------------------

    def located(self, args: Any, kwargs: Any) -> Call:
        """How this call is cut into segments, and the key of the programs that may run it.

        Raises:
            UnsupportedError: the input is empty, of a kind that no program can hold, or has no segments.
        """
        self.shelf.close()
        segmentation = self.segmentation(args, kwargs)
        count, _ = segmentation.count([tensor.shape for tensor in tensors_of(args, kwargs)])
        if count == 0:
            raise _empty()
        key = program_key(args, kwargs, segmentation)
        layouts = self._layouts.of(args, kwargs)
        return Call(segmentation, count, (key, layouts) if layouts else key)

    def segmentation(self, args: Any, kwargs: Any) -> Segmentation:
        """Along which axes these arguments are cut."""
        refuse_odd_arguments(args, kwargs)
        key, tensors = call_key(args, kwargs), tensors_of(args, kwargs)
        if tensors and not any(tensor.numel() for tensor in tensors):
            raise _empty()
        if key not in self.segmentations:
            refuse_model(self.model)
            found = self.shelf.segmentation(self.model, key)
            if found is None:
                found = probe(self.model, args, kwargs, self.options.segment_size)
            self.segmentations[key] = found
        return self.segmentations[key]

    def start(self, call: Call, args: Any, kwargs: Any) -> tuple[Entry, Started] | None:
        """Start what ran the last such call, or what rules will give for the first one, if it is recorded;
        whether it still holds is seen afterwards."""
        entry = self._ready.get((call.key, call.count))
        if entry is not None and not counts_on(entry.compiled):
            entry = None
        if entry is None and call.key not in self._entries:
            entry = self._families.expected(args, kwargs, call.segmentation)
        started = entry.executor.start(call.count, tensors_of(args, kwargs)) if entry is not None else None
        return (entry, started) if entry is not None and started is not None else None

    def entry(self, call: Call, args: Any, kwargs: Any) -> tuple[Call, Entry]:
        """The call and its program, compiled now if there is none: of rules, or for this number of segments
        alone.

        Where it cannot be compiled the segments are looked for again: the model may cut its inputs in another
        way by now, or this input may show what an earlier one has hidden.

        Raises:
            TooFewSegments: there is no program for so short an input.
            UnsupportedError: the forward cannot be compiled.
            VerificationError: with `verify`, the program differs from the model.
        """
        try:
            return self._ruled(call, args, kwargs)
        except RerollError as error:
            found = alone(self, call, error, args, kwargs)
        if (ruled := self._kept(call)) is not None:
            ruled.only[call.count] = found
        else:
            self._entries[call.key].append(found)
        return call, found

    def _ruled(self, call: Call, args: Any, kwargs: Any) -> tuple[Call, Entry]:
        try:
            return call, self.of_rules(call, args, kwargs)
        except TooFewSegments:
            raise
        except UnsupportedError as error:
            if isinstance(error, RerollError) and error.period > 1 and not call.first:
                return periodic(self, call, error, args, kwargs)
            return relocated(self, call, error, args, kwargs)

    def instead(
        self, call: Call, entry: Entry, args: Any, kwargs: Any, error: Exception
    ) -> tuple[Call, Entry] | None:
        """What to run instead of a program that rules for sizes gave and that has stopped, if this is one."""
        if entry.trial is None or entry.trial.is_corner:
            return None
        if isinstance(error, OutOfReachError):
            entry.trial.rules.beyond.append(entry.trial.at)
        else:
            self._families.settle(entry.trial, False)
        entries = self._entries.get(call.key, [])
        self._entries[call.key] = [one for one in entries if entry not in (one, one.finer)]
        return self.entry(call, args, kwargs)

    def has_run(self, call: Call, entry: Entry) -> None:
        """Note which program ran a call, so that the next such call may start it before it is checked."""
        self._ready[call.key, call.count] = entry
        self.shelf.close()

    # ---- programs ------------------------------------------------------------------------------------------

    def of_rules(self, call: Call, args: Any, kwargs: Any) -> Entry:
        """The program of rules, compiled now if there is none. Those of a call that goes on from a state are
        looked at on a whole text of as many segments, its own repeated: that compares programs, not texts."""
        entries = self._entries.setdefault(call.key, [])
        self._entries.move_to_end(call.key)
        entry = self._kept(call)
        if call.first and entry is not None and self._lengths.is_settled(entry, call.total):
            return entry
        self.shelf.is_dirty = True
        if call.first:
            args, kwargs = of_segments(args, kwargs, call.segmentation, min(call.total, ENOUGH))
        if entry is not None:
            self.told.changes = 0
        else:
            captures, last = self.captures, entries[-1].compiled if entries else None
            entry = made_or_finer(self, call, args, kwargs)
            if self.captures > captures:
                self.told.captured_anew(last)
            if entry.compiled.numbers is not None:  # those for other integers have had their turn
                entries[:] = [one for one in entries if not are_alike(one, entry)]
            entries.append(entry)
            del entries[:-8]
            if len(self._entries) > MAX_SIZES:
                while len(self._entries) > MAX_SIZES:
                    self._entries.popitem(last=False)
                self._ready = {k: e for k, e in self._ready.items() if k[0] in self._entries}
        if self.is_refuted(entry, call.total, args, kwargs):
            entries[entries.index(entry)] = entry = made_or_finer(self, call, args, kwargs)
        fine = finer(self, self._lengths, entry, call, args, kwargs)
        return fine or self._lengths.entry(entry, call, args, kwargs)

    def _kept(self, call: Call) -> Entry | None:
        """The first program for such calls that fits the model's state."""
        entries = self._entries[call.key]
        return next((e for e in entries if e.serves(call.by_itself) and is_current(e.compiled)), None)

    def made(
        self,
        call: Call,
        args: Any,
        kwargs: Any,
        only: int | None = None,
        fewest: int = 2,
        anew: bool = False,
    ) -> Entry:
        """A program captured now, saved, or given by rules for its sizes.

        Args:
            only: a number of segments, for a program of that length alone.
            fewest: segments to capture at least.
            anew: whether it is captured in any case.
        """
        entry = self._families.entry(args, kwargs, call.segmentation, only, fewest, anew, call.by_itself)
        entry.asked = asked(args, kwargs)
        if entry.longer is not None:
            entry.longer.asked = entry.asked
        return entry

    def saved(self, call: Call, args: Any, kwargs: Any) -> Entry | None:
        """A program from a folder."""
        return self._families.saved(args, kwargs, call.segmentation)

    def period(self, call: Call, args: Any, kwargs: Any) -> int:
        """After how many segments what the forward does repeats."""
        given = self._compile_options(args, kwargs), Log(None)
        return period_of_forward(self.model, args, kwargs, call.segmentation, *given)

    @property
    def entries(self) -> list[Entry]:
        """All programs that are kept."""
        return [entry for entries in self._entries.values() for entry in entries]

    def is_refuted(self, entry: Entry, count: int, args: Any, kwargs: Any) -> bool:
        """Compare the first use of rules for sizes with the model, or each with `verify`; short lengths have
        no say."""
        compiled, trial = entry.compiled, entry.trial
        if compiled.fixed not in (None, count):  # it does not run so many
            return False
        is_short = compiled.fixed is None and count < compiled.proved_on[0]
        if trial is None or trial.is_corner or is_short or not (trial.is_new or self.options.verify):
            return False
        is_all = self.options.verify or compiled.fixed is not None
        length = count if is_all else min(count, max(CHECKED, compiled.proved_on[0]))
        is_right = self._agrees(entry, length, args, kwargs)
        if not is_right and rounding(compiled) and not is_all and length > compiled.proved_on[-1]:
            length = compiled.proved_on[-1]  # rounding in 16 bits grows from segment to segment
            is_right = self._agrees(entry, length, args, kwargs)
        self._families.settle(trial, is_right)
        trial.is_new = False
        if is_right and length > compiled.proved_on[-1]:
            entry.lengths.checked_to = max(entry.lengths.checked_to, length)
        return not is_right

    def _agrees(self, entry: Entry, count: int, args: Any, kwargs: Any) -> bool:
        """Whether so many segments of these arguments give what the model gives, but for rounding."""
        part = of_segments(args, kwargs, entry.segmentation, count)
        with entry.executor.uncompiled():
            return self.difference(entry, count, *part, tolerance=rounding(entry.compiled)) is None

    def _compare(self, entry: Entry, args: Any, kwargs: Any) -> None:
        """Compare the program of rules with the model, short lengths too; see `Families`.

        Raises:
            UnsupportedError: the model itself fails on these arguments.
        """
        compiled = entry.compiled
        with explained(self.model, args, kwargs):
            if compiled.fixed is not None or self.is_refuted(entry, CHECKED, args, kwargs):
                return
            for count in range(1, compiled.proved_on[0]):
                part = of_segments(args, kwargs, entry.segmentation, count)
                self._lengths.settle_short(entry, count, *part)

    def difference(
        self, entry: Entry, count: int, args: Any, kwargs: Any, tolerance: float = 0.0, amplified: float = 0.0
    ) -> str | None:
        """Run the program and the model and compare; the model is left as it was. Returns the difference in
        words, or None; see `verify.difference` for those that are none."""
        executor, is_small = entry.executor, count <= self.options.max_segments_captured
        is_timed = executor.device.type == "cpu" and executor.backend == "eager" and not is_small
        took = partial(self.told.took, count) if is_timed else None
        given = self.model, entry.compiled, executor, count, args, kwargs
        return difference(*given, tolerance, amplified, took)

    def _is_alike(self, one: tuple[Any, Any], other: tuple[Any, Any], count: int) -> bool | None:
        return is_alike(self.model, one, other, count)

    def choose_plan(self, entry: Entry, args: Any, kwargs: Any) -> None:
        """Once a program has run on CUDA: keep its wavefronts only if they are measured to pay. A saved one
        keeps the plan that it was saved with."""
        is_kept = entry.executor.costs is not None or is_loaded(entry.compiled)
        if self.options.plan != "auto" or is_kept:
            return
        costs = entry.executor.measure(tensors_of(args, kwargs))
        if costs is not None and not costs.wavefront_pays:
            self._families.run_in_order(entry, costs)
        elif costs is not None and entry.trial is not None:
            entry.trial.rules.costs = costs

    # ---- compiling -----------------------------------------------------------------------------------------

    def _compile_options(self, args: Any, kwargs: Any) -> Options:
        """The options, less the passes that pay for compiled cells alone where the cells are not compiled."""
        given = (tensor.device for tensor in tensors_of(args, kwargs))
        device = next(iter((*self.options.devices, *given)), torch.device("cpu"))
        if backend_for(self.options.backend, device) != "eager":
            return self.options
        return replace(self.options, passes_off=self.options.passes_off | FOR_COMPILED_CELLS)

    def _compile(
        self, args: Any, kwargs: Any, segmentation: Segmentation, only: int | None, fewest: int
    ) -> Compiled:
        self.shelf.missed()
        options = self._compile_options(args, kwargs)
        if fewest > options.min_segments_captured:
            longest = max(options.max_segments_captured + LONGER, fewest + 2)
            options = replace(options, min_segments_captured=fewest, max_segments_captured=longest)
        with said_when_long(_CAPTURING) if self.progress is None else nullcontext():
            given = (self.model, args, kwargs, segmentation, options, self.progress)
            try:
                compiled = compile_forward(*given, only)
            except BoundedError:
                if fewest > self.options.min_segments_captured:
                    raise
                count, _ = segmentation.count([tensor.shape for tensor in tensors_of(args, kwargs)])
                compiled = compile_forward(*given, count)
        self.captures += 1
        if any(compiled.capture.guard.are_sums) and not self._is_itself(compiled, args, kwargs, segmentation):
            for module, name in compiled.capture.guard.number_places():
                forget(module, name)
            return self._compile(args, kwargs, segmentation, only, fewest)
        self._layouts.captured(compiled.capture, args, kwargs)
        compiled.origin = self.shelf.origin(self.model, compiled)
        self.told.of(compiled)
        return compiled

    def _is_itself(self, compiled: Compiled, args: Any, kwargs: Any, segmentation: Segmentation) -> bool:
        """Whether a program of a forward whose integers were watched gives what the model gives: the forward
        may have seen that they are no `int`."""
        fixed, proved = compiled.fixed, compiled.proved_on
        entry = Entry(compiled, self._execute(compiled, segmentation, None), segmentation)
        return self._agrees(entry, fixed or proved[0], args, kwargs)

    def _saved_rules(self, key: Key, vector: Vector) -> list[Rules]:
        return self.shelf.rules(self.model, key, vector)

    def _saved_program(self, key: Key, vector: Vector) -> Restored | None:
        saved = self.shelf.program(self.model, key, vector)
        if saved is not None:
            self.told.of(saved.compiled)
        return saved

    def _execute(self, compiled: Compiled, segmentation: Segmentation, like: Executor | None) -> Executor:
        options = self.options
        return executor_for(
            compiled,
            segmentation.steps,
            options.backend,
            options.cuda_graphs,
            like,
            options.recompute,
            options.devices,
            options.group,
            options.layer_counts,
        )


def _empty() -> UnsupportedError:
    return UnsupportedError("the input is empty", remedy="pass at least one token of one sequence")
