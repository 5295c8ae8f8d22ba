"""What `optimize` gives: a model that runs on wavefronts, and what there is to look at in it."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from rmtcompile.binding.arguments import tensors_of
from rmtcompile.binding.guard import call_key
from rmtcompile.binding.kinds import refuse_odd_arguments
from rmtcompile.binding.objects import Opaque
from rmtcompile.compiler.results import value_of
from rmtcompile.compiler.stages import Progress
from rmtcompile.dispatch.advancing import left, prepared
from rmtcompile.dispatch.boundary import explained
from rmtcompile.dispatch.calls import Call, TooFewSegments
from rmtcompile.dispatch.entries import Entry
from rmtcompile.dispatch.leaving import leave
from rmtcompile.dispatch.programs import Programs
from rmtcompile.documents import Stream
from rmtcompile.errors import (
    FallbackWarning,
    RankError,
    RerollError,
    RMTCompileError,
    UnsupportedError,
    VerificationError,
    warn,
)
from rmtcompile.frontend.tracing import is_as_written
from rmtcompile.inspected import Inspected
from rmtcompile.ir.modes import uncompiled
from rmtcompile.options import Options
from rmtcompile.runtime.contexts import unseen
from rmtcompile.runtime.graphs import Started
from rmtcompile.runtime.state import RunState
from rmtcompile.runtime.stops import STOPS, is_no_fault

if TYPE_CHECKING:
    from rmtcompile.report import Profile


class Optimized(Inspected, Opaque):
    """A callable that runs on wavefronts; made by `optimize`, which makes an `OptimizedModule` of a module.

    Attributes of the callable are reached through it.
    """

    REFUSALS = 32
    """Kinds of calls whose refusal is remembered."""

    def __init__(self, model: Callable[..., Any], options: Options, progress: Progress | None) -> None:
        self._programs = Programs(model, options, progress)
        self._lock = threading.RLock()
        self._last = None
        self._refused = ""  # why the model ran as it is
        self._refusals: OrderedDict[Any, str] = OrderedDict()  # by kind of call
        self._has_told = False
        self._within: Any = None  # what runs the calls that the model makes of itself
        self.last_profile: Profile | None = None

    @property
    def model(self) -> Callable[..., Any]:
        """The model as it is."""
        return self._programs.model

    @property
    def options(self) -> Options:
        """What the user has chosen."""
        return self._programs.options

    @property
    def captures(self) -> int:
        """How many programs were captured."""
        return self._programs.captures

    @contextmanager
    def reporting(self, report: Progress) -> Iterator[None]:
        """Within it, lines of progress go to `report`, too."""
        programs = self._programs
        before = programs.progress

        def both(line: str) -> None:
            report(line)
            if before:
                before(line)

        programs.progress = both
        try:
            yield
        finally:
            programs.progress = before

    # ---- running -------------------------------------------------------------------------------------------

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; same arguments, result and effects as `model(*args, **kwargs)`.

        Inside of a model that is being captured, the model itself runs.
        """
        if is_as_written():
            return self.model(*args, **kwargs)
        if torch.compiler.is_exporting():
            raise _exported()
        with self._lock:
            kind = None
            try:
                with self._in_step():
                    with unseen(), explained(self.model, args, kwargs):
                        if self.options.fallback == "sequential":
                            kind = self._kind(args, kwargs)
                            if kind in self._refusals:
                                raise UnsupportedError(self._refusals[kind])
                        call = replace(self._programs.located(args, kwargs), by_itself=True)
                        started = self._programs.start(call, args, kwargs)
                        call, entry = self._programs.entry(call, args, kwargs)  # the device is at work
                    running = started[1] if started is not None and started[0] is entry else None
                    is_edited = entry.is_edited
                    with nullcontext() if is_edited else explained(self.model, args, kwargs, running=True):
                        entry, outputs = self._outputs(call, entry, args, kwargs, running)
            except TooFewSegments as short:
                return self._as_it_is(str(short), args, kwargs)
            except RMTCompileError as error:
                asked = self.options.verify and isinstance(error, VerificationError)
                asked = asked or isinstance(error, RankError)  # what other ranks do is not known
                if self.options.fallback != "sequential" or asked:
                    raise
                if kind is not None and self.options.group is None:  # else ranks may have other refusals
                    self._refusals[kind] = str(error)
                    while len(self._refusals) > self.REFUSALS:
                        self._refusals.popitem(last=False)
                return self._as_it_is(str(error), args, kwargs)
            leave(entry, call.count, outputs, tensors_of(args, kwargs))
            result = value_of(entry.compiled.result, outputs, entry.compiled.steps(call.count))
            if running is None:
                self._programs.choose_plan(entry, args, kwargs)
                entry.executor.record(tensors_of(args, kwargs))
            self._programs.has_run(call, entry)
            self._keep()
            return result

    @uncompiled
    def run(self, *args: Any, state: RunState | None = None, **kwargs: Any) -> tuple[Any, RunState]:
        """Run the model on the next part of a text; gives its outputs and the state to go on from.

        A border between calls may lie anywhere. What no border between segments can come after is read again
        by the next call: an incomplete segment, and segments that the model treats in another way where they
        are the last. `state.pending_tokens` says how many positions that is: the outputs of the next call
        begin with them. Outputs that gather all segments gather those of this call and those read again.
        `verify` compares the first call of a text with the model; there is no fallback.

        Args:
            args, kwargs: of the forward, the same in each call but for the part of the text.
            state: where an earlier call has stopped; None starts as the forward does. It is not changed.

        Returns:
            (outputs, state).  With gradients, both have a history; `state.detach()` ends it.

        Raises:
            StateError: the state belongs to another model, plan, dtype or batch size.
            UnsupportedError: the forward cannot be compiled, or cannot be run in parts.
        """
        with self._lock, self._in_step():
            with unseen(), explained(self.model, args, kwargs):
                advance = prepared(self._programs, state, args, kwargs)
            entry, inputs = advance.entry, tensors_of(advance.args, advance.kwargs)
            self._last = entry, advance.call.count
            values, part = (state.values, state.part) if state is not None else ({}, None)
            given = advance.call.first, advance.border, values, part
            with explained(self.model, args, kwargs, running=True):
                try:
                    outputs, found, part = entry.executor.advance(advance.call.total, inputs, *given)
                except STOPS as error:
                    again = (advance.call, entry, advance.args, advance.kwargs, error)
                    if is_no_fault(error) or self._programs.instead(*again) is None:
                        raise
                    return self.run(*args, state=state, **kwargs)
            after = left(self._programs, advance, state, found, part)
            leave(entry, advance.call.total, outputs, inputs)
            result = value_of(entry.compiled.result, outputs, advance.call.count)
        with self._lock:
            self._keep()
        return result, after

    def stream(
        self,
        documents: Iterable[Any],
        *,
        together: bool | Literal["auto"] = "auto",
        share_prefixes: bool = False,
    ) -> Stream:
        """Run the model on one document after the other, without gradients.

        Where the program lets cells of several documents run in one call, the segments of each follow right
        behind the last of the one before, so that the wavefront stays full. A document that fails does not
        stop the others: a `FailedDocument` stands for its result, and raises its error when it is used.

        Args:
            documents: each a tensor (of one dim: a batch of one), a dict of keyword arguments, or a tuple of
                arguments; of any lengths, read as there is room; the same on all ranks of a group.
            together: whether documents run in one wavefront where they can. "auto": those that end with a
                segment, where runs are not put together of CUDA graphs, which documents by themselves are.
            share_prefixes: whether whole segments with which several documents begin run once. All documents
                are read first, and run in one wavefront where they can.

        Returns:
            An iterator over the results, in order. `close()` drops what is on its way.

        Raises:
            ValueError: `together` has no such value.
        """
        return Stream(self, documents, together, share_prefixes)

    def map(self, documents: Iterable[Any], *, progress: bool = False, **options: Any) -> list[Any]:
        """The results of all documents, in order; for the other arguments see `stream`.

        Args:
            progress: show a bar of `tqdm`, in a notebook as a widget.

        Raises:
            ImportError: there is no tqdm to show a bar.
        """
        results: Iterable[Any] = self.stream(documents, **options)
        if progress:
            from tqdm.auto import tqdm

            total = len(documents) if isinstance(documents, Sized) else None
            results = tqdm(results, desc="documents", total=total, unit="document")
        return list(results)

    def _in_step(self) -> AbstractContextManager[None]:
        """A call, which other ranks make too where several processes run the program: they are told if it
        fails on this one."""
        if self.options.group is None:
            return nullcontext()
        from rmtcompile.runtime.bands.control import words_of

        return words_of(self.options.group).call()

    def _kind(self, args: Any, kwargs: Any) -> Any:
        """Calls of one kind are refused alike, so that one of them is tried."""
        refuse_odd_arguments(args, kwargs)
        shapes = tuple(tensor.shape for tensor in tensors_of(args, kwargs))
        return call_key(args, kwargs), shapes, getattr(self.model, "training", None)

    def _as_it_is(self, why: str, args: Any, kwargs: Any) -> Any:
        self._refused = why
        warn(f"running the model as it is: {why}", FallbackWarning)
        return self.model(*args, **kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> Optimized:
        """Compile for these arguments without running the program; returns self."""
        with self._lock, self._in_step(), explained(self.model, args, kwargs):
            call = replace(self._programs.located(args, kwargs), by_itself=True)
            call, entry = self._programs.entry(call, args, kwargs)
            self._last = entry, call.count
            self._keep()
        return self

    def save(self, folder: str | Path) -> None:
        """Write the programs that were compiled so far, for `rmtcompile.load` in another process.

        Files of other programs in the folder stay.

        Args:
            folder: made where it is not there.

        Raises:
            RMTCompileError: nothing is compiled yet.
            UnsupportedError: a program depends on something that has no name in another process, or the
                folder cannot be written. The message names it; nothing more is written.
        """
        with self._lock:
            if not self._programs.entries:
                raise RMTCompileError("nothing is compiled yet: call the optimized model once, or prepare it")
            self._programs.shelf.save(self._programs.entries, Path(folder), _report)

    def _keep(self) -> None:
        """Save what is new, where the user has named a folder for that."""
        shelf, folder = self._programs.shelf, self.options.cache
        if folder is not None and shelf.is_dirty:
            shelf.save(self._programs.entries, Path(folder), _report, asked=False)

    def _outputs(
        self, call: Call, entry: Entry, args: Any, kwargs: Any, running: Started | None
    ) -> tuple[Entry, tuple[Any, ...]]:
        """The program that has run, and what it gives; the model and the arguments are as they were.  Where
        it stops, either the model does so too, with its own error, or the rules do not hold for these
        sizes."""
        count = call.count
        self._last = (entry, count)
        outputs = entry.executor.finish(running) if running is not None else None
        if outputs is not None:
            return entry, outputs
        try:
            return entry, entry.executor.run(count, tensors_of(args, kwargs))
        except STOPS as error:
            instead = None if is_no_fault(error) else self._programs.instead(call, entry, args, kwargs, error)
            if instead is not None:
                return self._outputs(*instead, args, kwargs, None)
            proved = entry.compiled.proved_on
            is_proved = count in range(min(proved, default=count), max(proved, default=count) + 1)
            if is_proved or entry.is_edited or is_no_fault(error):
                raise
            found = self._programs.difference(entry, count, args, kwargs)
            if found is None:
                raise
            raise RerollError(
                "the program stops where the model runs",
                [found],
                "fallback='sequential' runs the model as it is",
            ) from error

    # ---- standing in for the callable ----------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name == "__signature__":
            return _signature(self.model)
        if name == "_programs" or (name.startswith(_UNSHARED) and name not in _NAMES):
            raise AttributeError(name)  # or what unwraps functions would get at the model unseen
        value = getattr(self.model, name)
        return self._told(value) if name == "generate" and callable(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        """Attributes of the model are set there."""
        if name in OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.model, name, value)

    def _told(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """The model's own `generate`, which says once that it runs without the program."""

        @functools.wraps(generate)
        def told(*args: Any, **kwargs: Any) -> Any:
            if not self._has_told:
                self._has_told = True
                warn(_GENERATE, FallbackWarning)
            return generate(*args, **kwargs)

        return told

    def __repr__(self) -> str:
        state = "not captured yet" if self._last is None else f"{self.captures} captured"
        bound = getattr(self.model, "__self__", None)
        module = bound if isinstance(bound, nn.Module) else self.model
        name = type(module).__name__ if isinstance(module, nn.Module) else repr(module)
        return f"rmtcompile.Optimized({name}, {state})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimized:
        programs = self._programs
        return type(self)(copy.deepcopy(programs.model, memo), programs.options, programs.progress)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"], state["options"], None)  # type: ignore[misc]


OWN = ("_programs", "_lock", "_last", "_refused", "_refusals", "_has_told", "_within", "last_profile")
_NAMES = ("__name__", "__qualname__")
_UNSHARED = ("__", "_torchdynamo")
_GENERATE = (
    "generate is the model's own and calls it as it is, without the program; rmtcompile.install(model) puts "
    "the program into the model's own calls"
)


def _report(entry: Entry) -> Any:
    """What only reports need of a program, as JSON."""
    from rmtcompile.report.facts import written

    return written(entry.compiled)


def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn)
    except (TypeError, ValueError) as error:
        raise AttributeError("__signature__") from error


def _exported() -> UnsupportedError:
    return UnsupportedError(
        "a program of rmtcompile cannot be exported",
        remedy="export the model itself: torch.export.export(fast.model, ...)",
    )
