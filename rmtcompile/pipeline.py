"""The pipeline: a forward and example inputs in, a compiled program out. Each stage is one line of
`compile_forward`."""

from __future__ import annotations

import itertools
import linecache
import sys
import time
import types
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from rmtcompile.capture import Capture, Effect, Leaf, capture
from rmtcompile.errors import CaptureError, RerollError
from rmtcompile.passes.decompose import decompose
from rmtcompile.passes.dependence import Dependence, dependences
from rmtcompile.passes.emit import Emitted, emit
from rmtcompile.passes.forward import forward
from rmtcompile.passes.functionalise import functionalise
from rmtcompile.passes.number import is_random, number
from rmtcompile.passes.optimise import optimise
from rmtcompile.passes.partition import call_sizes, find_layers, partition
from rmtcompile.passes.reroll import Rolled, Unrolled, fixed, reroll, unroll
from rmtcompile.passes.route import route
from rmtcompile.passes.wavefront import skew
from rmtcompile.probe import Segmentation
from rmtcompile.program import Program
from rmtcompile.results import Aligner, Pairs

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What the user may choose; see `rmtcompile.optimize`."""

    layers: str | None = None
    segment_size: int | None = None
    plan: str = "auto"
    passes_off: frozenset[str] = frozenset()
    max_segments_captured: int = 5


@dataclass(frozen=True)
class Stage:
    """What one stage did: seconds, and operations by name before and after."""

    name: str
    seconds: float
    before: dict[str, int]
    after: dict[str, int]

    @property
    def difference(self) -> str:
        """`linear: 24 -> 6, cat: 2 -> 0`."""
        names = sorted(self.before.keys() | self.after.keys())
        changed = [(n, self.before.get(n, 0), self.after.get(n, 0)) for n in names]
        return ", ".join(f"{n}: {a} -> {b}" for n, a, b in changed if a != b)


@dataclass
class Compiled:
    """A compiled forward.

    Attributes:
        program, emitted: the scheduled program and its source.
        captures: the captures that the rules were proved on, smallest first.
        dependences: offsets with their witnesses.
        final: for each Python value that the forward leaves behind, its value as a function of the number of
            segments.
        stages: what each stage did.
        passes_off: passes of `optimise` that were switched off.
    """

    program: Program
    emitted: Emitted
    captures: tuple[Capture, ...]
    rolled: Rolled
    dependences: dict[tuple[int, int], Dependence]
    layer_paths: tuple[str, ...]
    effects: list[tuple[Effect, Any]]
    result: Any
    leaves: dict[str, Leaf]
    input_names: tuple[str, ...]
    written: tuple[tuple[str, str], ...]
    namespace: dict[str, Any]
    stages: list[Stage] = field(default_factory=list)
    passes_off: frozenset[str] = frozenset()

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


class _Log:
    """Times stages, counts operations and reports progress."""

    def __init__(self, progress: Progress | None) -> None:
        self.stages: list[Stage] = []
        self.progress = progress

    @contextmanager
    def stage(self, name: str, module: fx.GraphModule | None = None) -> Any:
        before = op_counts(module.graph) if module is not None else {}
        box: list[fx.GraphModule] = []
        start = time.perf_counter()
        if self.progress:
            self.progress(name)
        yield box
        after = op_counts(box[0].graph) if box else before
        self.stages.append(Stage(name, time.perf_counter() - start, before, after))


def op_counts(graph: fx.Graph) -> dict[str, int]:
    """Operations of a graph by name."""
    return dict(
        Counter(getattr(n.target, "_opname", str(n.target)) for n in graph.nodes if n.op == "call_function")
    )


def compile_forward(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    segmentation: Segmentation,
    options: Options,
    progress: Progress | None = None,
    only: int | None = None,
) -> Compiled:
    """Capture `fn` with few segments and compile it for any number of them.

    Args:
        only: compile for exactly this number of segments, without rerolling.

    Raises:
        UnsupportedError: with the evidence and a remedy.
    """
    log = _Log(progress)
    captures: tuple[Capture, ...]
    if only is not None:
        single, small, paths, written = _unrolled(fn, args, kwargs, segmentation, only, options, log)
        result, effects, pairs = _results(single, single, (only, only), len(written))
        rolled, captures = fixed(_grouped(small, pairs, 0)), (single,)
    else:
        found_rules = _reroll(fn, args, kwargs, segmentation, options, log)
        rolled, captures, paths, written, result, effects = found_rules
    with log.stage("dependence"):
        found = dependences(rolled)
    with log.stage("wavefront"):
        n_layers = rolled.n_layers
        alpha = n_layers if options.plan == "sequential" else max(1, min(n_layers, skew(found, n_layers)))
        alpha = max(alpha, skew(found, n_layers))
    with log.stage("route, align"):
        program = route(rolled, frozenset(found), alpha)
    with log.stage("optimise"):
        program = optimise(program, options.passes_off)
    with log.stage("lift, emit"):
        emitted = emit(program, "Generated by rmtcompile: what print(fast.code) shows is what runs.")
    leaves = {leaf.name: leaf for one in captures for leaf in one.leaves.values()}
    names = tuple(str(n.target) for n in captures[0].graph.nodes if n.op == "placeholder")
    module = load(emitted.source)
    compiled = Compiled(
        program,
        emitted,
        captures,
        rolled,
        found,
        paths,
        effects,
        result,
        leaves,
        names,
        written,
        vars(module),
        log.stages,
        options.passes_off,
    )
    weakref.finalize(compiled, unload, module.__name__)
    return compiled


_numbers = itertools.count(1)


def load(source: str) -> types.ModuleType:
    """Import emitted source, under a name that torch can import and that tracebacks and debuggers can read.

    The module stays until `unload`.
    """
    name = f"rmtcompile_program_{next(_numbers)}"
    module = types.ModuleType(name)
    module.__file__ = f"<{name}>"
    linecache.cache[module.__file__] = (len(source), None, source.splitlines(keepends=True), module.__file__)
    sys.modules[name] = module
    exec(compile(source, module.__file__, "exec"), module.__dict__)  # our own emitted module
    return module


def unload(name: str) -> None:
    """Forget an emitted module."""
    sys.modules.pop(name, None)
    linecache.cache.pop(f"<{name}>", None)


def _reroll(
    fn: Callable[..., Any], args: Any, kwargs: Any, segmentation: Segmentation, options: Options, log: _Log
) -> tuple[
    Rolled, tuple[Capture, ...], tuple[str, ...], tuple[tuple[str, str], ...], Any, list[tuple[Effect, Any]]
]:
    """Capture two lengths that follow one rule, the shortest that do."""
    failure: RerollError | None = None
    capture_a, small, paths, written = _unrolled(fn, args, kwargs, segmentation, 2, options, log)
    for count in range(3, options.max_segments_captured + 1):
        capture_b, large, _, again = _unrolled(fn, args, kwargs, segmentation, count, options, log)
        try:
            _same_leaves(capture_a, capture_b)
            if written != again:
                raise RerollError(
                    "other tensors are written in place with one more segment", [f"{written} {again}"]
                )
            with log.stage(f"reroll {small.count} -> {large.count}"):
                counts = (small.count, large.count)
                result, effects, pairs = _results(capture_a, capture_b, counts, len(written))
                rolled = reroll(_grouped(small, pairs, 0), _grouped(large, pairs, 1))
            return rolled, (capture_a, capture_b), paths, written, result, effects
        except RerollError as error:
            failure = error
        capture_a, small, written = capture_b, large, again
    assert failure is not None
    raise failure


def _unrolled(
    fn: Callable[..., Any],
    args: Any,
    kwargs: Any,
    segmentation: Segmentation,
    count: int,
    options: Options,
    log: _Log,
) -> tuple[Capture, Unrolled, tuple[str, ...], tuple[tuple[str, str], ...]]:
    args, kwargs = resize(args, kwargs, segmentation, count)
    with log.stage(f"capture, {count} segments") as box:
        captured = capture(fn, args, kwargs)
        box.append(captured.module)
    _refuse_random(captured)
    with log.stage("functionalise", captured.module) as box:
        functional = functionalise(captured.module)
        written = _flatten_writes(functional.module, tuple(functional.writes), captured)
        captured.module = functional.module
        box.append(captured.module)
    with log.stage("forward", captured.module) as box:
        captured.module = forward(captured.module)
        box.append(captured.module)
    with log.stage("decompose", captured.module) as box:
        captured.module = decompose(captured.module)
        box.append(captured.module)
    with log.stage("number", captured.module) as box:
        captured.module = number(captured.module)
        box.append(captured.module)
    with log.stage("drop", captured.module) as box:
        captured.module.graph.eliminate_dead_code()
        box.append(captured.module)
    with log.stage("partition"):
        graph = captured.module.graph
        layers = find_layers(captured.calls, call_sizes(graph, captured.calls), count, options.layers)
        parts = partition(graph, layers, count)
        unrolled = unroll(graph, parts, {target: leaf.name for target, leaf in captured.leaves.items()})
    return captured, unrolled, layers.paths, written


def resize(args: Any, kwargs: Any, segmentation: Segmentation, count: int) -> tuple[Any, Any]:
    """Inputs like the given ones, with another number of segments; values are not kept."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    positions = [i for i, value in enumerate(flat) if isinstance(value, torch.Tensor)]
    shapes = segmentation.shapes([flat[i].shape for i in positions], count)
    values = list(flat)
    with FakeTensorMode():
        for position, shape in zip(positions, shapes, strict=True):
            old = flat[position]
            if old.shape != shape:
                values[position] = torch.empty(shape, dtype=old.dtype, device=old.device)
    return pytree.tree_unflatten(values, spec)


def _refuse_random(captured: Capture) -> None:
    random = [node for node in captured.graph.nodes if node.op == "call_function" and is_random(node)]
    if random:
        raise CaptureError(
            "the forward draws random numbers, and cells that run in another order would draw others",
            [f"{node.target} at {node.meta.get('source')}" for node in random[:4]],
            "switch dropout off (model.eval(), or dropout=0)",
        )


def _flatten_writes(
    module: fx.GraphModule, names: tuple[str, ...], captured: Capture
) -> tuple[tuple[str, str], ...]:
    """Turn (outputs, writes) into one flat tuple; return ("leaf" | "input", name) for each written tensor."""
    if not names:
        return ()
    output = next(node for node in module.graph.nodes if node.op == "output")
    results, writes = output.args[0]
    output.args = ((*results, *writes),)
    placeholders = {str(node.target) for node in module.graph.nodes if node.op == "placeholder"}
    found = []
    for name in names:
        leaf = captured.leaves.get(name)
        if name in placeholders:
            found.append(("input", name))
        elif leaf is None:
            found.append(("leaf", name))
        elif isinstance(leaf.tensor, torch.nn.Parameter):
            raise CaptureError(
                "the forward writes into a parameter",
                [leaf.name],
                "run the model once before optimizing it if this happens on the first call only",
            )
        else:
            found.append(("leaf", leaf.name))
    return tuple(found)


def _same_leaves(a: Capture, b: Capture) -> None:
    """Constants have names by position; check that equal names mean equal values."""
    mine = {leaf.name: leaf for leaf in a.leaves.values() if leaf.is_constant}
    for leaf in b.leaves.values():
        other = mine.get(leaf.name)
        if leaf.is_constant and other is not None and other.tensor is not leaf.tensor:
            if other.tensor.shape != leaf.tensor.shape or not torch.equal(other.tensor, leaf.tensor):
                raise RerollError("a constant changes with the number of segments", [leaf.name])


def _results(
    a: Capture, b: Capture, counts: tuple[int, int], n_written: int
) -> tuple[Any, list[tuple[Effect, Any]], Pairs]:
    """Rules for the result and for what is left behind, and which outputs of the two captures correspond."""
    aligner = Aligner(counts)
    result = aligner.align(a.result, b.result, "what the forward returns")
    if [effect.name for effect in a.effects] != [effect.name for effect in b.effects]:
        raise RerollError(
            "what the forward leaves behind changes with the number of segments",
            sorted({e.name for e in a.effects} ^ {e.name for e in b.effects}),
        )
    effects = []
    for x, y in zip(a.effects, b.effects, strict=True):
        if (x.spec is None) != (y.spec is None):
            raise RerollError(f"what the forward leaves in {x.name} changes with the number of segments")
        rule = None
        if x.spec is not None:
            rule = aligner.align(
                (x.leaves, x.spec), (y.leaves, y.spec), f"what the forward leaves in {x.name}"
            )
        effects.append((x, rule))
    total_a, total_b = _output_count(a), _output_count(b)
    for i in range(n_written, 0, -1):
        aligner.pairs.append(((total_a - i,), (total_b - i,), False))
    return result, effects, aligner.pairs


def _output_count(captured: Capture) -> int:
    output = next(node for node in captured.graph.nodes if node.op == "output")
    found: list[fx.Node] = []
    fx.node.map_arg(output.args, found.append)
    return len(found)


def _grouped(unrolled: Unrolled, pairs: Pairs, side: int) -> Unrolled:
    """Outputs in the order of the pairs; a family is a tuple of nodes."""
    outputs: list[Any] = []
    for small, large, is_family in pairs:
        found = [unrolled.outputs[i] for i in (small, large)[side]]
        outputs.append(tuple(found) if is_family else found[0])
    return replace(unrolled, outputs=tuple(outputs))
