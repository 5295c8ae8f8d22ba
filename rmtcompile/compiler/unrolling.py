"""The front half: a forward and example inputs in, its regions for one number of segments out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from rmtcompile.binding.arguments import tensors_of
from rmtcompile.binding.captured import Capture
from rmtcompile.compiler.checks import check_flat
from rmtcompile.compiler.stages import Log
from rmtcompile.errors import CaptureError, PartitionError, UnsupportedError
from rmtcompile.frontend.capture import capture
from rmtcompile.frontend.literals import literals, merge_literals
from rmtcompile.ir.layouts import strides_like
from rmtcompile.ir.modes import autocast_as
from rmtcompile.ir.randomness import drop_dead
from rmtcompile.ir.segmentation import Cuts, Segmentation
from rmtcompile.options import Options
from rmtcompile.passes.flat.aliases import aliases
from rmtcompile.passes.flat.decompose import decompose
from rmtcompile.passes.flat.foreach import foreach
from rmtcompile.passes.flat.functionalise import alias_root, functionalise, is_mutating
from rmtcompile.passes.flat.nest import NESTED, grows, nest, slides
from rmtcompile.passes.flat.pieces import pieces
from rmtcompile.passes.flat.segments import Segments
from rmtcompile.passes.flat.spread import spread
from rmtcompile.passes.flat.store_forwarding import forward_stores
from rmtcompile.passes.flat.stream import stream
from rmtcompile.passes.flat.strip_mine import strip_mine
from rmtcompile.passes.flat.tiles import tiles
from rmtcompile.passes.flat.value_numbering import number_values
from rmtcompile.passes.grid.layer_major import cells_by_segment, layer_major
from rmtcompile.passes.grid.partition import Layers, partition
from rmtcompile.passes.grid.repeats import inside_layers, layers_of
from rmtcompile.passes.grid.reroll import Unrolled, unroll


def capture_at(
    fn: Callable[..., Any],
    args: Any,
    kwargs: Any,
    segmentation: Segmentation,
    options: Options,
    count: int,
) -> tuple[Capture, Unrolled]:
    """The functional capture of `count` segments, and its regions.

    Raises:
        UnsupportedError: as `compile_forward`.
    """
    captured, unrolled, _, _ = unrolled_forward(fn, args, kwargs, segmentation, count, options, Log(None))
    return captured, unrolled


def unrolled_forward(
    fn: Callable[..., Any],
    args: Any,
    kwargs: Any,
    segmentation: Segmentation,
    count: int,
    options: Options,
    log: Log,
) -> tuple[Capture, Unrolled, tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Capture `count` segments and give every operation its place.

    Returns:
        The functional capture; its regions; the layers' paths; ("leaf" | "input", name) of each tensor that
        the forward writes in place, whose values are the last outputs.

    Raises:
        UnsupportedError: with the evidence and a remedy.
    """
    args, kwargs = resize(args, kwargs, segmentation, count)
    with log.stage(f"capture, {count} segments") as box:
        captured = capture(fn, args, kwargs)
        box.append(captured.module)
    first = segmentation.axes[0]
    length = tensors_of(args, kwargs)[first.leaf].shape[first.dim]
    count = segmentation.pieces(length)
    are_parts = segmentation.parts > 1
    try:
        return _placed(captured, count, options, log, segmentation, is_mined=are_parts)
    except PartitionError as error:
        error.parts = walked_parts(captured, segmentation, length)
        is_named = are_parts or options.layers is not None
        if is_named or layer_major(captured.graph, captured.calls, count) is not None:
            raise
        try:  # layers that are no modules may walk the segments themselves, too
            return _placed(capture(fn, args, kwargs), count, options, log, segmentation, is_mined=True)
        except UnsupportedError:
            pass
        raise


def walked_parts(captured: Capture, segmentation: Segmentation, length: int) -> int:
    """Into how many equal parts each segment is cut, if modules are called once for each of these; 0 else.

    Args:
        length: of the input.
    """
    segment = segmentation.axes[0].length
    called = Counter(Counter(call.module for call in captured.calls).values())
    parts = [n for n in range(2, segment + 1) if segment % n == 0]
    found = {n: called[-(-length * n // segment)] for n in parts}
    best = max(found, key=lambda n: found[n], default=0)
    return best if best and found[best] > 1 and segmentation.is_own else 0


@dataclass
class Flat:
    """What the passes on the flat graph work on.

    Attributes:
        captured: its module is the graph; each pass replaces it.
        count: segments, or steps of these.
        layers: the user's path of the layers, if there is one.
        cuts: where inputs are cut, by placeholder.
        is_mined: whether operations on the whole input are taken apart in any case.
        are_parts: whether these segments are parts of the model's own.
        joins: how joins of values of several segments are written; see `Options`.
        written: ("leaf" | "input", name) of each tensor that the forward writes in place.
    """

    captured: Capture
    count: int
    layers: str | None
    cuts: Cuts
    is_mined: bool = False
    are_parts: bool = False
    joins: str = ""
    written: tuple[tuple[str, str], ...] = ()

    @property
    def module(self) -> fx.GraphModule:
        """The graph as it is now."""
        return self.captured.module

    @cached_property
    def outer(self) -> Layers | None:
        """The layers, where each is called once and walks the segments itself."""
        return layer_major(self.captured.graph, self.captured.calls, self.count, self.layers)

    @cached_property
    def inside(self) -> Callable[[fx.Node], bool]:
        """Whether an operation lies inside a layer."""
        if (outer := self.outer) is not None:
            return lambda node: any(call in outer.cell_of_call for call in node.meta.get("scope", ()))
        return inside_layers(self.captured.graph, self.captured.calls, self.count, self.layers)


def _functional(flat: Flat) -> fx.GraphModule:
    """No operations over lists, no writes in place; one name for each operation; splits by one length; equal
    literals are one."""
    captured = flat.captured
    literal = literals(captured)
    captured.module = foreach(captured.module)
    functional = functionalise(captured.module)
    flat.written = _flatten_writes(functional.module, tuple(functional.writes), captured, literal)
    captured.module = pieces(aliases(functional.module))
    merge_literals(captured, literal)
    return captured.module


def _mined(flat: Flat) -> fx.GraphModule:
    """What is computed of the whole input taken apart, where layers walk the segments themselves."""
    is_mined = flat.is_mined or flat.outer is not None
    given = flat.module, flat.cuts, flat.count, flat.are_parts
    return strip_mine(*given) if is_mined else flat.module


def _streamed(flat: Flat) -> fx.GraphModule:
    """Parts of values taken before they are computed, and heads on the parts of a join."""
    return spread(stream(flat.module, flat.inside, flat.joins, flat.cuts), flat.inside)


def _alive(flat: Flat) -> fx.GraphModule:
    """Nothing that nobody reads."""
    drop_dead(flat.module.graph)
    return flat.module


PASSES: tuple[tuple[str, Callable[[Flat], fx.GraphModule]], ...] = (
    ("functionalise", _functional),
    ("forward", lambda flat: forward_stores(flat.module, flat.joins, flat.cuts)),
    ("strip-mine", _mined),
    ("stream, spread", _streamed),
    ("decompose", lambda flat: decompose(flat.module)),
    ("number", lambda flat: number_values(flat.module, flat.inside)),
    ("tiles", lambda flat: tiles(flat.module, flat.inside)),
    ("nest", lambda flat: nest(flat.module, flat.inside) if flat.joins == NESTED else flat.module),
    ("drop", _alive),
)
"""The passes on the flat graph, in order."""


@autocast_as()
def _placed(
    captured: Capture,
    count: int,
    options: Options,
    log: Log,
    segmentation: Segmentation,
    is_mined: bool = False,
) -> tuple[Capture, Unrolled, tuple[str, ...], tuple[tuple[str, str], ...]]:
    """See `unrolled_forward`: from the capture on.

    Args:
        count: segments of the model, or steps of these.
        is_mined: whether operations on the whole input are taken apart though no module call shows that this
            is called for.
    """
    inputs = [str(node.target) for node in captured.graph.nodes if node.op == "placeholder"]
    steps = segmentation.steps
    own = [(axis, axis.length // steps.period) for axis in reversed(steps.axes)]
    cuts = {inputs[axis.leaf]: (axis.dim, length) for axis, length in own}
    are_parts = segmentation.parts > 1
    flat = Flat(captured, count, options.layers, cuts, is_mined, are_parts, options.joins)
    for name, run in PASSES:
        with log.stage(name, captured.module) as box:
            captured.module = run(flat)
            box.append(captured.module)
        if log.checks:
            check_flat(captured.graph, name, captured.leaves, functional=True)
    with log.stage("partition"):
        graph = captured.module.graph
        if are_parts or flat.outer is None:
            layers = layers_of(graph, captured.calls, count, options.layers)
        else:
            layers = cells_by_segment(graph, flat.outer, cuts, count)
        segments = Segments(cuts, count)
        parts = partition(graph, layers, segments, segmentation.period, may_join=options.layers is None)
        unrolled = unroll(graph, parts, {target: leaf.name for target, leaf in captured.leaves.items()})
    return captured, unrolled, parts.layers.paths, flat.written


@dataclass(frozen=True)
class Joins:
    """What layers join of values of several segments.

    Attributes:
        grow: lists to which each segment adds.
        slide: windows of the last few segments.
    """

    grow: bool = False
    slide: bool = False


def joins_of(captured: Capture, count: int, options: Options) -> Joins:
    """What layers of a capture of `count` segments join."""
    inside = Flat(captured, count, options.layers, {}).inside
    is_plain = not options.joins
    return Joins(is_plain and grows(captured.graph, inside), is_plain and slides(captured.graph))


def resize(args: Any, kwargs: Any, segmentation: Segmentation, count: int) -> tuple[Any, Any]:
    """Inputs like the given ones, with another number of segments; values are not kept."""
    flat = pytree.tree_leaves((args, kwargs))
    shapes = [value.shape for value in flat if isinstance(value, torch.Tensor)]
    return reshaped(args, kwargs, segmentation.shapes(shapes, count))


def reshaped(args: Any, kwargs: Any, shapes: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Inputs like the given ones, with other shapes, in their layouts; values are not kept."""
    values, spec = pytree.tree_flatten((args, kwargs))
    positions = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor)]
    with FakeTensorMode():
        for position, shape in zip(positions, shapes, strict=True):
            old = values[position]
            if tuple(old.shape) != tuple(shape):
                like = tuple(shape), strides_like(old, shape)
                made = torch.empty_strided(*like, dtype=old.dtype, device=old.device)
                values[position] = made.requires_grad_(old.requires_grad)
    return pytree.tree_unflatten(values, spec)


def _flatten_writes(
    module: fx.GraphModule, names: tuple[str, ...], captured: Capture, literal: frozenset[str]
) -> tuple[tuple[str, str], ...]:
    """Turn (outputs, writes) into one flat tuple; return ("leaf" | "input", name) for each written tensor.
    Writes into literals are dropped."""
    if not names:
        return ()
    output = next(node for node in module.graph.nodes if node.op == "output")
    results, writes = output.args[0]
    output.args = ((*results, *(w for name, w in zip(names, writes, strict=True) if name not in literal)),)
    names = tuple(name for name in names if name not in literal)
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
                [f"{leaf.name} at {_written_at(captured.graph, name)}"],
                "run the model once before optimizing it if this happens on the first call only",
            )
        else:
            found.append(("leaf", leaf.name))
    return tuple(found)


def _written_at(graph: fx.Graph, name: str) -> str:
    """The user's line that writes first into what `get_attr` calls `name`."""
    for node in graph.nodes:
        if is_mutating(node) and any(alias_root(op).target == name for op in node.all_input_nodes):
            return str(node.meta.get("source"))
    return "?"
