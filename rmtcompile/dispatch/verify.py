"""Verify: run the model as it is beside its program, and say where they part.

    model(x)      result, what is left behind        compared: any difference is one sentence
    program(x)    result, what is left behind

    captured graph, on x     A(1, 2) = add_3          compared in the order of the schedule: the first value
    program, cell by cell    A(1, 2) = out0[row]      of a region that differs, with its source line

Requires a compiled program and real inputs. The model is left as it was. Where random numbers are drawn, both
run with each of them at its mean (`means.py`).
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rmtcompile.binding.arguments import tensors_of
from rmtcompile.binding.captured import Capture, Out
from rmtcompile.binding.objects import ATOMS
from rmtcompile.binding.state import Snapshot, roots_of
from rmtcompile.binding.trees import flat
from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.compiler.results import value_of
from rmtcompile.compiler.unrolling import capture_at
from rmtcompile.dispatch.leaving import left_values, written_tensors
from rmtcompile.dispatch.means import without_draws
from rmtcompile.errors import InternalError, UnsupportedError
from rmtcompile.frontend.tracing import as_written
from rmtcompile.ir.modes import autocast_as
from rmtcompile.ir.segmentation import Segmentation
from rmtcompile.options import Options
from rmtcompile.passes.grid.partition import CELL, INIT, Region
from rmtcompile.runtime.contexts import plain_tensors
from rmtcompile.runtime.execute import Executor
from rmtcompile.runtime.stops import STOPS, is_no_fault

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Relative differences that are rounding."""


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


# ---- the whole ---------------------------------------------------------------------------------------------


def difference(
    fn: Callable[..., Any],
    compiled: Compiled,
    executor: Executor,
    count: int,
    args: Any,
    kwargs: Any,
    tolerance: float = 0.0,
    amplified: float = 0.0,
    took: Callable[[float, float], object] | None = None,
) -> str | None:
    """Run both and compare results and what they leave behind; gives the difference in words, or None.

    Args:
        tolerance: relative differences that are none, where those of the dtypes that the forward computes in
            are smaller.
        amplified: the same of differences that the model itself makes of a rounding of its input.
        took: called with the seconds of the model and of the program, which runs twice for this.
    """
    inputs = tensors_of(args, kwargs)
    tolerance = max([tolerance, *(TOLERANCE.get(dtype, 0.0) for dtype in compiled.longest.types)])
    effects = [e for e, _ in compiled.effects]
    written = written_tensors(compiled, inputs)

    def own(args: Any, kwargs: Any) -> tuple[list[float], list[Any]]:
        """When the model itself began and ended, and what it gives, leaves and writes."""
        with without_draws(compiled, executor), _put_back(fn, written), as_written():
            seconds = [time.perf_counter()]
            given = [fn(*args, **kwargs)]
            seconds.append(time.perf_counter())
            changes = [effect.change for effect in effects if effect.change is not None]
            given += [flat(change.now()) for change in changes if not change.is_hook]
            return seconds, given + [tensor.detach().clone() for tensor in written]

    seconds, theirs = own(args, kwargs)
    try:
        with without_draws(compiled, executor):
            for _ in range(1 if took is None else 2):  # the first of a program lays out its memory
                seconds.append(time.perf_counter())
                outputs = executor.run(count, inputs)
            seconds.append(time.perf_counter())
    except STOPS as error:
        if is_no_fault(error):
            raise
        return f"the program does not cover {count} segments ({type(error).__name__}: {first_line(error)})"
    mine: list[tuple[str, Any]] = [("the result", value_of(compiled.result, outputs, compiled.steps(count)))]
    for effect, value in zip(effects, left_values(compiled, count, outputs), strict=True):
        if effect.change is not None and not effect.change.is_hook:
            mine.append((f"what is left in {effect.name}", flat(value)))
    first = len(outputs) - len(compiled.written)
    names = [f"what is written into {name}" for _, name in compiled.written]
    mine += zip(names, outputs[first:], strict=True)
    found = _first_of(mine, theirs, [None] * len(theirs), tolerance)
    if found:
        again: list[Any] = [None] * len(theirs)
        with contextlib.suppress(Exception), _Nudged():  # a forward may want its very arguments
            others = own(*pytree.tree_map(_nudged, (args, kwargs)))[1]
            own_values = len(theirs) - len(written)  # it has written into other inputs than these
            again[:own_values] = others[:own_values]
        found = _first_of(mine, theirs, again, tolerance, amplified)
    if took is not None and not found:
        took(seconds[1] - seconds[0], seconds[-1] - seconds[-2])
    return f"{found}, at {count} segments" if found else None


def _first_of(
    named: Sequence[tuple[str, Any]],
    theirs: Sequence[Any],
    again: Sequence[Any],
    tolerance: float,
    amplified: float = 0.0,
) -> str | None:
    """The first difference of several values; see `compare`."""
    for (what, mine), expected, other in zip(named, theirs, again, strict=True):
        if text := compare(expected, mine, what, tolerance, other, amplified):
            return text
    return None


@contextlib.contextmanager
def _put_back(fn: Callable[..., Any], written: Sequence[torch.Tensor]) -> Iterator[None]:
    """Leave the modules of `fn` and the contents of these tensors as they were before the block. What the
    model warns of there is about our call (inputs without gradients), not the user's."""
    snapshot = Snapshot(roots_of(fn))
    kept = [tensor.detach().clone() for tensor in written]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        snapshot.restore()
        with torch.no_grad():
            for tensor, value in zip(written, kept, strict=True):
                tensor.copy_(value)


class _Nudged(TorchDispatchMode):
    """What the model looks up in tables differs by roundings."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return _nudged(found) if func is torch.ops.aten.embedding.default else found


def _nudged(x: Any) -> Any:
    """A tensor that differs by roundings, where it holds no integers; else the same."""
    is_one = isinstance(x, torch.Tensor) and x.is_floating_point()
    return x.detach() * (1 + torch.finfo(x.dtype).eps) if is_one else x


NOISE = 0.1
"""The relative difference, after a rounding of the input, of values that say nothing. They are also as small
as what rounding leaves (`_is_noise`)."""


MARGIN = 10
"""How many times as large as what a rounding of the input makes a difference may be. Measured for ARMTs of 32
and 48 layers with random weights in float32, results and what is left in each layer: 0.3 to 6 times."""


def compare(
    expected: Any, got: Any, what: str, tolerance: float = 0.0, nudged: Any = None, amplified: float = 0.0
) -> str | None:
    """The first difference between two nested values in words, or None; see `difference`.

    Args:
        nudged: what was expected for an input that differs by roundings: values that are nothing but
            rounding (the mean of what was normalised) are others then, and differ from nothing.
    """
    a, spec_a = pytree.tree_flatten(expected)
    b, spec_b = pytree.tree_flatten(got)
    others = a if nudged is None else pytree.tree_leaves(nudged)
    others = others if len(others) == len(a) else a
    if len(a) != len(b) or spec_a != spec_b:
        return f"{what} has {len(b)} leaves in another structure instead of {len(a)}"
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        name = what if len(a) == 1 else f"{what}, leaf {i},"
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            if type(x) is not type(y) or (isinstance(x, ATOMS) and x != y):
                return f"{name} is {y!r} instead of {x!r}"
        elif x.shape != y.shape or x.dtype != y.dtype:
            return f"{name} is {y.dtype}{list(y.shape)} instead of {x.dtype}{list(x.shape)}"
        elif (error := error_of(x, y)) > max(tolerance, TOLERANCE.get(x.dtype, 1e-3)):
            own = error_of(x, others[i])
            says_nothing = _is_noise(x, y) and own >= NOISE
            if (says_nothing or error <= amplified) and error <= MARGIN * own < float("inf"):
                continue
            return f"{name} differs from the sequential forward by {error:.1e} relative"
    return None


def _is_noise(*values: torch.Tensor) -> bool:
    """Whether values are as small as what rounding leaves of values around one."""
    return all(
        x.is_floating_point() and x.numel() and float(x.detach().abs().max()) < 64 * torch.finfo(x.dtype).eps
        for x in values
    )


def error_of(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Relative difference of two tensors of one shape and type; 0 for equal values, infinity for a NaN on one
    side or for integers that differ."""
    x, y = expected.detach(), got.detach()
    if not (x.is_floating_point() or x.is_complex()):
        return 0.0 if torch.equal(x, y) else float("inf")
    if not torch.equal(x.isnan(), y.isnan()):
        return float("inf")
    wide = torch.complex128 if x.is_complex() else torch.float64 if x.device.type == "cpu" else torch.float32
    x, y = (t.to(wide).nan_to_num() for t in (x, y))
    return float((x - y).norm() / x.norm().clamp_min(1e-30)) if x.numel() else 0.0


# ---- the first cell ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A value that left a region of a run; `index` is its place in the region's body."""

    region: Region
    index: int
    value: Any

    @property
    def place(self) -> tuple[Region, int]:
        return self.region, self.index

    def __str__(self) -> str:
        if self.region.kind == CELL:
            return f"segment {self.region.segment}, layer {self.region.layer}"
        return f"the {self.region.kind}" + (
            "" if self.region.kind == INIT else f" of segment {self.region.segment}"
        )


class Observer:
    """Keeps everything that leaves a region of a run, in the order in which it is computed."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def __call__(self, kind: str, segment: int, layer: int, index: int, value: Any) -> None:
        """Keep a value that has left a region; see `OnValue`."""
        kept = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), value)
        self.seen.append(Seen(Region(kind, segment, layer), index, kept))


def first_difference(
    fn: Callable[..., Any],
    compiled: Compiled,
    executor: Executor,
    segmentation: Segmentation,
    options: Options,
    count: int,
    args: Any,
    kwargs: Any,
) -> list[str]:
    """Where the program parts from the model, as lines of a message: segment, layer, operation, source."""
    try:
        options = replace(options, joins=compiled.joins)
        captured, unrolled = capture_at(fn, args, kwargs, segmentation, options, count)
    except UnsupportedError as error:
        return [f"where it begins is not known: {error.what}"]
    inputs = tensors_of(args, kwargs)
    node_at = {place: node for node, place in unrolled.place.items()}
    with torch.no_grad(), without_draws(compiled, executor):
        observer, stopped = Observer(), ""
        try:
            with plain_tensors():
                executor.launch(compiled.steps(count), inputs, on_value=observer)
        except STOPS as error:
            stopped = f"{type(error).__name__}: {first_line(error)}"
        pairs = [(seen, node_at[seen.place]) for seen in observer.seen if seen.place in node_at]
        values, outputs = replay(captured, inputs, {node for _, node in pairs})
    for seen, node in pairs:
        found = compare(values[node], seen.value, "its value")
        if found is not None:
            name = getattr(node.target, "__name__", str(node.target))
            return [f"first in {seen}: {node.name} = {name}  {node.meta.get('source', '?')}", found]
    if stopped:
        return [f"what the program computes before it stops agrees; it stops with {stopped}"]
    leaves, spec = captured.result
    flat = [outputs[leaf.index] if isinstance(leaf, Out) else leaf for leaf in leaves]
    with without_draws(compiled, executor), _put_back(fn, written_tensors(compiled, inputs)), as_written():
        again = compare(fn(*args, **kwargs), pytree.tree_unflatten(flat, spec), "the result")
    if again:
        return ["all cells give what was captured: the capture itself differs from the model", again]
    return ["all cells agree when they run without CUDA graphs: the difference is made by replaying them"]


def replay(
    captured: Capture, inputs: list[torch.Tensor], wanted: set[fx.Node]
) -> tuple[dict[fx.Node, Any], tuple[Any, ...]]:
    """Run a captured graph on real inputs; gives the values of the wanted nodes, and the outputs."""
    values: dict[fx.Node, Any] = {}
    last_use = {operand: node for node in captured.graph.nodes for operand in node.all_input_nodes}
    arguments = iter(inputs)
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(arguments)
        elif node.op == "get_attr":
            values[node] = captured.leaves[str(node.target)].fetch()
        elif node.op == "output":
            return values, tuple(fx.node.map_arg(node.args[0], values.__getitem__))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            with autocast_as(), _contexts(node):
                values[node] = node.target(*args, **kwargs)
        for operand in node.all_input_nodes:
            if last_use[operand] is node and operand not in wanted:
                del values[operand]
    raise InternalError("a captured graph has no output")


@contextlib.contextmanager
def _contexts(node: fx.Node) -> Iterator[None]:
    """The regions (autocast, no_grad) in which the operation was captured."""
    with contextlib.ExitStack() as stack:
        for text in node.meta.get("context", ()):
            stack.enter_context(eval(text, {"torch": torch}))  # written by `capture`
        yield
