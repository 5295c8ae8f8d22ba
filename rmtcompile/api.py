"""What users call: `optimize` a model, `explain` what was found in it."""

from __future__ import annotations

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from rmtcompile.beyond import (
    CHECKED,
    LONGER,
    Followed,
    first_segments,
    followed,
    is_affordable,
    length_to_check,
    rounding,
    unexplained,
)
from rmtcompile.boundary import explained
from rmtcompile.errors import (
    FallbackWarning,
    RecaptureWarning,
    RerollError,
    RMTCompileError,
    SequentialScheduleWarning,
    UnsupportedError,
    VerificationError,
)
from rmtcompile.families import Entry, Families, is_current
from rmtcompile.guard import call_key, program_key
from rmtcompile.kinds import refuse_model, refuse_odd_arguments
from rmtcompile.leaving import leave_effects, write_back
from rmtcompile.objects import Opaque
from rmtcompile.options import Options, check_options
from rmtcompile.passes.optimise import FOR_COMPILED_CELLS
from rmtcompile.passes.wavefront import blocking
from rmtcompile.pipeline import Compiled, compile_forward
from rmtcompile.probe import Segmentation, probe
from rmtcompile.results import value_of
from rmtcompile.runtime.execute import Executor, backend_for
from rmtcompile.runtime.graphs import Started
from rmtcompile.runtime.rows import executor_for
from rmtcompile.schedule import Schedule
from rmtcompile.stages import Progress
from rmtcompile.verify import STOPS, difference, first_difference, is_no_fault, tensors_of

if TYPE_CHECKING:
    from rmtcompile.report import Explanation, Profile


def optimize(
    model: Callable[..., Any],
    *,
    segment_size: int | None = None,
    layers: str | None = None,
    plan: str = "auto",
    backend: str | Callable[..., Any] = "auto",
    cuda_graphs: str | bool = "auto",
    fallback: str | None = None,
    verify: bool = False,
    progress: bool | Progress = False,
) -> Optimized:
    """Make a recurrent-memory model run a diagonal at a time, with the same inputs, outputs and recurrence.

    Nothing is traced yet: the forward is captured at the first call, from the shapes of its inputs.

    Args:
        model: an `nn.Module` or any callable on tensors whose forward walks segments and, in each segment,
            layers. It is not changed, except that its parameters become views of stacked storage (same names,
            shapes and values).
        segment_size: override: tokens in a segment along the axis that the forward walks; found from the
            graph by default.
        layers: override: path of the container of the layers, `"model.layers"`, or a regular expression for
            their paths.
        plan: "auto" (the widest legal wavefront; on CUDA the sequential plan where a cell alone is measured
            to cost less than one in company), "diagonal" (the widest, but refuse a model whose wavefronts are
            one cell wide) or "sequential" (one cell after the other, compiled).
        backend: "eager", "inductor" or any `torch.compile` backend for the cell functions; "auto" is inductor
            on CUDA and eager elsewhere.
        cuda_graphs: record a run of a length that comes again as one CUDA graph; "auto" does so on CUDA when
            no gradients are recorded.
        fallback: "sequential" runs the model as it is, with a warning, where it cannot be compiled, and does
            not try again for inputs of these shapes; None raises.
        verify: run the model as it is, too, at the first call of each program, and raise on a difference.
        progress: print what is being done on long work, or call a function with each line.

    Returns:
        A callable with the signature of `model`, and `schedule`, `code`, `explain()`.

    Raises:
        ValueError: an option has no such value.

    Source: "Diagonal Batching Unlocks Parallelism in Recurrent Memory Transformers for Long Contexts", arXiv
    2506.05229.
    """
    check_options(segment_size, layers, plan, backend, cuda_graphs, fallback, verify, progress)
    if not callable(model):
        raise ValueError(f"model must be callable, not {type(model).__name__}")
    if isinstance(model, Optimized):
        model = model.model
    report = print if progress is True else progress if callable(progress) else None
    options = Options(layers, segment_size, plan)
    return Optimized(model, options, backend, cuda_graphs, fallback, verify, report)


class _TooFewSegments(UnsupportedError):
    """An input so short that the program does not cover it, and for which there is none of its own."""


@dataclass(frozen=True)
class _Call:
    """One call's segmentation, number of segments, and the key of the programs that may run it."""

    segmentation: Segmentation
    count: int
    key: Any


class Optimized(Opaque):
    """A model that runs on wavefronts; made by `optimize`.

    Attributes of the model (parameters, `state_dict`, `config`, ...) are reached through it.
    """

    MAX_SIZES = 32
    """Sizes of inputs whose programs are kept loaded, and kinds of calls whose refusal is remembered."""

    CHANGES = 8
    """Captures in a row for new states of the model after which the user is told."""

    DOUBTS = 4
    """Longer captures in a row that one call may cost."""

    def __init__(
        self,
        model: Callable[..., Any],
        options: Options,
        backend: str | Callable[..., Any],
        cuda_graphs: str | bool,
        fallback: str | None,
        verify: bool,
        progress: Progress | None,
    ) -> None:
        self.model = model
        self._options = options
        self._backend = backend
        self._cuda_graphs = cuda_graphs
        self._fallback = fallback
        self._verify = verify
        self._progress = progress
        self._lock = threading.RLock()
        self._segmentations: dict[Any, Segmentation] = {}
        self._entries: OrderedDict[Any, list[Entry]] = OrderedDict()
        self._families = Families(self._compile, self._execute)
        self._ready: dict[tuple[Any, int], Entry] = {}  # what ran the last call of a key and length
        self._last: tuple[Entry, int] | None = None
        self._changes = 0  # captures in a row for states of the model that were new
        self._refused = ""  # why the model ran as it is
        self._refusals: OrderedDict[Any, str] = OrderedDict()  # by kind of call
        self.last_profile: Profile | None = None
        self.captures = 0

    # ---- running -------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; same arguments, result and effects as `model(*args, **kwargs)`."""
        with self._lock:
            kind = None
            try:
                with explained(self.model, args, kwargs):
                    if self._fallback == "sequential":
                        kind = self._kind(args, kwargs)
                        if kind in self._refusals:
                            raise UnsupportedError(self._refusals[kind])
                    call = self._located(args, kwargs)
                    started = self._start(call, args, kwargs)
                    call, entry = self._entry(call, args, kwargs)  # the device is at work meanwhile
                running = started[1] if started is not None and started[0] is entry else None
                with nullcontext() if entry.is_edited else explained(self.model, args, kwargs, running=True):
                    outputs = self._outputs(entry, call.count, args, kwargs, running)
            except _TooFewSegments as short:
                return self._as_it_is(str(short), args, kwargs)
            except RMTCompileError as error:
                asked = self._verify and isinstance(error, VerificationError)
                if self._fallback != "sequential" or asked:
                    raise
                if kind is not None:
                    self._refusals[kind] = str(error)
                    while len(self._refusals) > self.MAX_SIZES:
                        self._refusals.popitem(last=False)
                return self._as_it_is(str(error), args, kwargs)
            result = self._left(entry, call.count, outputs, args, kwargs)
            if running is None:
                self._choose_plan(entry, args, kwargs)
                entry.executor.record(tensors_of(args, kwargs))
            self._ready[call.key, call.count] = entry
            return result

    def _kind(self, args: Any, kwargs: Any) -> Any:
        """Calls of one kind are refused alike, so that one of them is tried."""
        refuse_odd_arguments(args, kwargs)
        shapes = tuple(tensor.shape for tensor in tensors_of(args, kwargs))
        return call_key(args, kwargs), shapes, getattr(self.model, "training", None)

    def _as_it_is(self, why: str, args: Any, kwargs: Any) -> Any:
        self._refused = why
        warnings.warn(f"running the model as it is: {why}", FallbackWarning, stacklevel=3)
        return self.model(*args, **kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> Optimized:
        """Compile for these arguments without running the program; returns self."""
        with self._lock, explained(self.model, args, kwargs):
            call, entry = self._entry(self._located(args, kwargs), args, kwargs)
            self._last = entry, call.count
        return self

    def _located(self, args: Any, kwargs: Any) -> _Call:
        """How this call is cut into segments, and the key of the programs that may run it."""
        refuse_odd_arguments(args, kwargs)
        key, tensors = call_key(args, kwargs), tensors_of(args, kwargs)
        empty = UnsupportedError("the input is empty", remedy="pass at least one token of one sequence")
        if tensors and not any(tensor.numel() for tensor in tensors):
            raise empty
        if key not in self._segmentations:
            refuse_model(self.model)
            self._segmentations[key] = probe(self.model, args, kwargs, self._options.segment_size)
        segmentation = self._segmentations[key]
        count, _ = segmentation.count([tensor.shape for tensor in tensors])
        if count == 0:
            raise empty
        return _Call(segmentation, count, program_key(args, kwargs, segmentation))

    def _start(self, call: _Call, args: Any, kwargs: Any) -> tuple[Entry, Started] | None:
        """Start what ran the last such call, if it is recorded; whether it still holds is seen afterwards."""
        entry = self._ready.get((call.key, call.count))
        started = entry.executor.start(call.count, tensors_of(args, kwargs)) if entry is not None else None
        return (entry, started) if entry is not None and started is not None else None

    def _entry(self, call: _Call, args: Any, kwargs: Any) -> tuple[_Call, Entry]:
        """The call and its program, compiled now if there is none.

        Where it cannot be compiled the segments are looked for again: the model may cut its inputs in another
        way by now, or this input may show what an earlier one has hidden.
        """
        try:
            return call, self._entry_of(call, args, kwargs)
        except _TooFewSegments:
            raise
        except UnsupportedError:
            known = self._segmentations.pop(call_key(args, kwargs), call.segmentation)
            again = self._located(args, kwargs)
            if again.segmentation == known:
                raise
            return again, self._entry_of(again, args, kwargs)

    def _entry_of(self, call: _Call, args: Any, kwargs: Any) -> Entry:
        entries = self._entries.setdefault(call.key, [])
        self._entries.move_to_end(call.key)
        entry = next((e for e in entries if is_current(e.compiled)), None)
        if entry is not None:
            self._changes = 0
        else:
            self._count_changes(entries)
            entry = self._made(call, args, kwargs)
            entries.append(entry)
            del entries[:-8]
            while len(self._entries) > self.MAX_SIZES:
                self._entries.popitem(last=False)
            self._ready = {k: e for k, e in self._ready.items() if k[0] in self._entries}
        if self._is_refuted(entry, call.count, args, kwargs):
            entries[entries.index(entry)] = entry = self._made(call, args, kwargs)
        return self._for_length(entry, call, args, kwargs)

    def _count_changes(self, entries: list[Entry]) -> None:
        """Say so where the model's state was another one for each of the last captures."""
        change = entries[-1].compiled.changed() if entries else None
        self._changes += change is not None
        if change is not None and self._changes == self.CHANGES:
            warnings.warn(
                f"captured anew at {self._changes} calls in a row, since what the forward reads has changed: "
                f"{change}. Each such call costs a capture; a number that only counts calls can be a buffer "
                "(a tensor), which is carried from call to call",
                RecaptureWarning,
                stacklevel=5,
            )

    def _made(self, call: _Call, args: Any, kwargs: Any, only: int | None = None, fewest: int = 2) -> Entry:
        """A program captured now, or given by rules for its sizes."""
        entry = self._families.entry(args, kwargs, call.segmentation, only, fewest)
        entry.example = _faked(args, kwargs)
        return entry

    def _is_refuted(self, entry: Entry, count: int, args: Any, kwargs: Any) -> bool:
        """Compare the first use of rules for sizes with the model, or each with `verify`; short lengths have
        no say."""
        rolled, trial = entry.compiled.rolled, entry.trial
        is_short = rolled.fixed is None and count < rolled.proved_on[0]
        if trial is None or trial.is_corner or is_short or not (trial.is_new or self._verify):
            return False
        length = count if self._verify else min(count, max(CHECKED, rolled.proved_on[0]))
        part = first_segments(args, kwargs, entry.segmentation, length)
        with entry.executor.uncompiled():
            tolerance = rounding(entry.compiled)
            is_right = self._difference(entry, length, *part, tolerance=tolerance) is None
        self._families.settle(trial, is_right)
        trial.is_new = False
        return not is_right

    def _compile_options(self, args: Any, kwargs: Any) -> Options:
        """The options, less the passes that pay for compiled cells alone where the cells are not compiled."""
        device = next((tensor.device for tensor in tensors_of(args, kwargs)), torch.device("cpu"))
        if backend_for(self._backend, device) != "eager":
            return self._options
        return replace(self._options, passes_off=self._options.passes_off | FOR_COMPILED_CELLS)

    def _compile(
        self, args: Any, kwargs: Any, segmentation: Segmentation, only: int | None, fewest: int
    ) -> Compiled:
        options = self._compile_options(args, kwargs)
        if fewest > options.min_segments_captured:
            longest = max(options.max_segments_captured + LONGER, fewest + 2)
            options = replace(options, min_segments_captured=fewest, max_segments_captured=longest)
        compiled = compile_forward(self.model, args, kwargs, segmentation, options, self._progress, only)
        self.captures += 1
        n_layers, offsets = compiled.program.n_layers, compiled.program.offsets
        blocked = blocking(offsets, n_layers)
        if blocked and self._options.plan != "sequential":
            witness = "; ".join(
                compiled.dependences[offset].described(compiled.layer_paths) for offset in blocked
            )
            message = (
                f"no two cells can run together, the {n_layers} layers run one after the other: {witness}"
            )
            if self._options.plan == "diagonal":
                raise UnsupportedError(
                    message, remedy="use plan='auto' to run it as a compiled sequential program"
                )
            warnings.warn(message, SequentialScheduleWarning, stacklevel=7)
        return compiled

    def _execute(self, compiled: Compiled, segmentation: Segmentation, like: Executor | None) -> Executor:
        return executor_for(compiled, segmentation, self._backend, self._cuda_graphs, like)

    def _for_length(self, entry: Entry, call: _Call, args: Any, kwargs: Any) -> Entry:
        """The entry itself, or one compiled for just this length where its rules do not cover it."""
        entry = self._followed(entry, call, args, kwargs)
        entry = self._beyond(entry, call, args, kwargs)
        entry = self._followed(entry, call, args, kwargs)
        rolled, count, lengths = entry.compiled.rolled, call.count, entry.lengths
        is_short = rolled.fixed is None and count < rolled.proved_on[0]
        if is_short and count not in lengths.uncovered and count not in lengths.checked:
            if count >= rolled.minimum and self._difference(entry, count, args, kwargs) is None:
                lengths.checked.add(count)
            else:
                lengths.uncovered.add(count)
        chosen = self._for_just(entry, call, args, kwargs) if count in lengths.uncovered else entry
        if self._verify and count not in chosen.verified:
            self._check(chosen, count, args, kwargs)
            chosen.verified.add(count)
        return chosen

    def _check(self, entry: Entry, count: int, args: Any, kwargs: Any) -> None:
        """Raise VerificationError if the program differs from the model; the message says where."""
        found = self._difference(entry, count, args, kwargs)
        if found is not None:
            raise self._located_difference(entry, count, found, args, kwargs)

    def _located_difference(
        self, entry: Entry, count: int, found: str, args: Any, kwargs: Any
    ) -> VerificationError:
        compiled, executor, segmentation = entry.compiled, entry.executor, entry.segmentation
        where = first_difference(
            self.model, compiled, executor, segmentation, self._options, count, args, kwargs
        )
        return VerificationError("\n  ".join([found, *where]))

    def _for_just(self, entry: Entry, call: _Call, args: Any, kwargs: Any) -> Entry:
        """The program for this number of segments alone."""
        if call.count in entry.lengths.refused:
            raise _TooFewSegments(entry.lengths.refused[call.count])
        if call.count not in entry.only:
            try:
                entry.only[call.count] = self._made(call, args, kwargs, only=call.count)
            except UnsupportedError as error:
                if entry.compiled.rolled.fixed is not None:
                    raise
                why = f"{call.count} segments are less than the rules are for. {error}"
                entry.lengths.refused[call.count] = why
                raise _TooFewSegments(why) from error
        if self._is_refuted(entry.only[call.count], call.count, args, kwargs):
            entry.only[call.count] = self._made(call, args, kwargs, only=call.count)
        return entry.only[call.count]

    def _followed(self, entry: Entry, call: _Call, args: Any, kwargs: Any) -> Entry:
        """The entry, its forward followed to the length of the call, or what replaces it."""
        while entry.longer is not None:
            entry = entry.longer
        for _ in range(self.DOUBTS):
            lengths, rolled = entry.lengths, entry.compiled.rolled
            known = max(lengths.followed_to, rolled.proved_on[-1])
            if rolled.fixed is not None or call.count <= max(known, lengths.tried_to):
                return entry
            found = followed(self.model, entry.compiled, args, kwargs, entry.segmentation, call.count, known)
            lengths.followed_to, lengths.unknown = found.to, found.unknown
            if found.unknown:
                lengths.tried_to = max(call.count, 2 * known)
            if found.to < call.count:
                entry = self._settled(entry, found, call, args, kwargs)
        entry.lengths.unknown = "it does something else again and again that no result shows"
        entry.lengths.tried_to = call.count
        return entry

    def _settled(self, entry: Entry, found: Followed, call: _Call, args: Any, kwargs: Any) -> Entry:
        """The entry, or rules of longer captures, where the forward departs from the rules, or cannot be
        followed."""
        fewest = found.to + 1 if found.departs else call.count - 1
        if not is_affordable(entry.compiled, fewest + 1):
            if found.departs:
                raise found.error()
            return entry
        try:
            longer = self._made(call, args, kwargs, fewest=fewest)
        except UnsupportedError as error:
            if found.departs or isinstance(error, RerollError):
                raise found.error(error) from error
            return entry  # these lengths cannot be captured: it stays unknown
        is_same = longer.compiled.rolled.is_like(entry.compiled.rolled)
        if not is_same and fewest >= self._options.max_segments_captured + LONGER:
            raise found.error()
        if is_same and not found.departs:
            entry.lengths.followed_to, entry.lengths.unknown = longer.compiled.rolled.proved_on[-1], ""
            return entry
        entry.longer = longer
        return longer

    def _beyond(self, entry: Entry, call: _Call, args: Any, kwargs: Any) -> Entry:
        """The entry, compared with the model where it is to run longer inputs than it was proved on, or what
        replaces it."""
        longest = self._options.max_segments_captured + LONGER
        length = length_to_check(entry.compiled, call.count, entry.lengths.checked_to)
        while length is not None:
            proved = entry.compiled.rolled.proved_on[-1]
            part = first_segments(args, kwargs, entry.segmentation, length)
            if not entry.lengths.too_short:
                with entry.executor.uncompiled(), torch.no_grad():
                    found = self._difference(entry, length, *part, tolerance=rounding(entry.compiled))
                settled = proved >= longest or length <= proved
                if found is None or (settled and self._is_rounding(entry, length, part)):
                    entry.lengths.checked_to = length
                    break
                if length <= proved:
                    raise self._located_difference(entry, length, found, *part)
                if proved >= longest:
                    raise RerollError(
                        f"what holds for up to {proved} segments does not hold for {length}",
                        [found],
                        "a value must be read at most three segments later; fallback='sequential' runs the "
                        "model as it is",
                    )
            entry.lengths.too_short = True
            entry.longer = self._made(call, args, kwargs, fewest=proved)
            same = entry.longer.compiled.rolled.is_like(entry.compiled.rolled)
            entry = entry.longer
            if same and self._is_rounding(entry, length, part):
                entry.lengths.checked_to = length
                break
            length = max(length, length_to_check(entry.compiled, call.count, 0) or 0)
        return entry

    def _is_rounding(self, entry: Entry, length: int, part: tuple[Any, Any]) -> bool:
        """Whether a difference that the rules of longer captures do not explain is small enough."""
        limit = unexplained(entry.compiled)
        if limit in (0.0, math.inf):
            return limit > 0
        with entry.executor.uncompiled(), torch.no_grad():
            return self._difference(entry, length, *part, tolerance=limit) is None

    def _outputs(
        self, entry: Entry, count: int, args: Any, kwargs: Any, running: Started | None
    ) -> tuple[Any, ...]:
        """What the program gives; the model and the arguments are as they were.  Where it stops, either the
        model does so too, with its own error, or the rules do not hold for this length."""
        self._last = (entry, count)
        outputs = entry.executor.finish(running) if running is not None else None
        if outputs is not None:
            return outputs
        try:
            return entry.executor.run(count, tensors_of(args, kwargs))
        except STOPS as error:
            proved = entry.compiled.rolled.proved_on
            is_proved = count in range(min(proved, default=count), max(proved, default=count) + 1)
            if is_proved or entry.is_edited or is_no_fault(error):
                raise
            found = self._difference(entry, count, args, kwargs)
            if found is None:
                raise
            raise RerollError(
                "the program stops where the model runs",
                [found],
                "fallback='sequential' runs the model as it is",
            ) from error

    def _left(self, entry: Entry, count: int, outputs: tuple[Any, ...], args: Any, kwargs: Any) -> Any:
        """The result, once the model is left as its forward would leave it."""
        leave_effects(entry.compiled, count, outputs)
        if not entry.settled:
            entry.settled = True
            if any(
                effect.change is not None and effect.change.is_hook for effect, _ in entry.compiled.effects
            ):
                entry.compiled.captures[0].guard.settle()
        write_back(entry.compiled, outputs, tensors_of(args, kwargs))
        return value_of(entry.compiled.result, outputs, count)

    def _choose_plan(self, entry: Entry, args: Any, kwargs: Any) -> None:
        """Once a program has run on CUDA: keep its wavefronts only if they are measured to pay."""
        if self._options.plan != "auto" or entry.executor.costs is not None:
            return
        costs = entry.executor.measure(tensors_of(args, kwargs))
        if costs is not None and not costs.wavefront_pays:
            self._families.run_in_order(entry, costs)
        elif costs is not None and entry.trial is not None:
            entry.trial.rules.costs = costs

    def _difference(
        self, entry: Entry, count: int, args: Any, kwargs: Any, tolerance: float = 0.0
    ) -> str | None:
        """Run both and compare; the model is left as it was. Returns the difference in words, or None;
        relative differences up to `tolerance` are none."""
        return difference(self.model, entry.compiled, entry.executor, count, args, kwargs, tolerance)

    # ---- looking -------------------------------------------------------------------------------------------

    @property
    def compiled(self) -> Compiled:
        """The program of the last call."""
        return self._ran[0].compiled

    @property
    def schedule(self) -> Schedule:
        """The schedule of the last call."""
        from rmtcompile.report.scheduled import schedule_of

        entry, count = self._ran
        return schedule_of(entry.compiled, count)

    @property
    def _ran(self) -> tuple[Entry, int]:
        """The program of the last call and its number of segments."""
        if self._last is None and self._refused:
            raise RMTCompileError(f"the model runs as it is, without a program: {self._refused}")
        if self._last is None:
            raise RMTCompileError("nothing is captured yet: call the optimized model once")
        return self._last

    @property
    def code(self) -> str:
        """The generated Python module that the last call ran."""
        return self.compiled.emitted.source

    def explain(self) -> Explanation:
        """What was found in the model, and why it runs as it does, for the last call."""
        from rmtcompile.report import explain_last

        return explain_last(self)

    def dump(self, folder: str | Path) -> list[Path]:
        """Write one numbered file a pass; the last one is the module that runs."""
        from rmtcompile.report import dump

        return dump(self, folder)

    def use(self, path: str | Path) -> None:
        """Run a dumped, perhaps edited, module in place of the generated one, in the last call's program."""
        from rmtcompile.report import use

        use(self, path)

    def view(self, path: str | Path) -> Path:
        """Write the viewer of the last call's program as one HTML file."""
        from rmtcompile.report import save_view

        return save_view(self, path)

    def profile(self, *args: Any, **kwargs: Any) -> Profile:
        """Run the model and measure each level; later `view`s and `explain`s show the times."""
        from rmtcompile.report import profile

        return profile(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "model":
            raise AttributeError(name)
        value = getattr(self.model, name)
        if callable(value) and name in _RETURN_SELF:
            return lambda *args, **kwargs: self._same(value(*args, **kwargs))
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Attributes of the model are set there."""
        if name in _OWN or name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.model, name, value)

    def _same(self, result: Any) -> Any:
        return self if result is self.model else result

    def __repr__(self) -> str:
        state = "not captured yet" if self._last is None else f"{self.captures} captured"
        name = type(self.model).__name__ if isinstance(self.model, nn.Module) else repr(self.model)
        return f"rmtcompile.Optimized({name}, {state})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimized:
        import copy

        return Optimized(
            copy.deepcopy(self.model, memo),
            self._options,
            self._backend,
            self._cuda_graphs,
            self._fallback,
            self._verify,
            self._progress,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "options": self._options,
            "backend": self._backend,
            "graphs": self._cuda_graphs,
            "fallback": self._fallback,
            "verify": self._verify,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = (state[key] for key in ("model", "options", "backend", "graphs", "fallback", "verify"))
        self.__init__(*kept, None)  # type: ignore[misc]


_OWN = ("model", "last_profile", "captures")
_RETURN_SELF = (
    "to", "eval", "train", "cuda", "cpu", "half", "float", "double", "bfloat16", "requires_grad_", "apply"
)  # fmt: skip


def _faked(args: Any, kwargs: Any) -> Any:
    """The arguments without the memory of their tensors."""

    def fake(value: Any) -> Any:
        return torch.empty_like(value) if isinstance(value, torch.Tensor) else value

    with FakeTensorMode(allow_non_fake_inputs=True):
        return pytree.tree_map(fake, (args, kwargs))


__all__ = ["FallbackWarning", "Optimized", "SequentialScheduleWarning", "optimize"]
