"""Programs of free sizes: several compiled programs made one, and that one loaded for other sizes.

`passes/sizes.py` finds the rule; here it becomes a `Compiled` whose module has the sizes as constants.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from rmtcompile.compiler.loading import load, unload
from rmtcompile.compiler.pipeline import TITLE, Compiled
from rmtcompile.passes.cell.open_attention import open_attention
from rmtcompile.passes.emit import emit
from rmtcompile.passes.emit.sizes import names_in
from rmtcompile.passes.sizes import Sample, Sizes, at, unify


def sized(
    samples: Sequence[tuple[Sizes, Compiled]],
    rests: frozenset[str] = frozenset(),
    counts: frozenset[str] = frozenset(),
) -> tuple[Compiled, Any]:
    """One program for all sizes, to be loaded by `instance`, and the shapes of its outputs over the
    number of segments of its smallest capture.

    Args:
        rests: those sizes that whole segments leave over.
        counts: those that are integers which the model keeps from call to call.

    Raises:
        SizesDiffer: the programs differ in more than integers that follow from the sizes.
    """
    base = samples[0][1]
    found = unify([_sample(sizes, compiled) for sizes, compiled in samples], counts=counts)
    result, rules, input_names, written, shapes = found.extras
    unified = replace(found.sized, rests=rests)
    if "open_attention" not in base.passes_off:
        cells = tuple(replace(cell, graph=open_attention(cell.graph)) for cell in unified.cells)
        unified = replace(unified, cells=cells)
    emitted = emit(found.program, TITLE, unified)
    known = emitted.borders.sizes
    open_lanes = frozenset(lane.name for lane in found.program.lanes if set(names_in(lane.shape)) - known)
    program = replace(found.program, opened=emitted.opened, open_lanes=open_lanes, counts=counts)
    effects = [(effect, rule) for (effect, _), rule in zip(base.effects, rules, strict=True)]
    return replace(
        base,
        program=program,
        emitted=emitted,
        rolled=program.rolled,
        result=result,
        effects=effects,
        namespace={},
        input_names=input_names,
        written=written,
    ), shapes


def differ(a: Compiled, b: Compiled) -> None:
    """Raise `SizesDiffer` if two programs differ in more than integers."""
    unify([_sample({}, a), _sample({}, b)], exact=False)


def _sample(sizes: Sizes, compiled: Compiled) -> Sample:
    shapes = [_shapes(output) for output in compiled.rolled.base.outputs]
    rules = [rule for _, rule in compiled.effects]
    names = [effect.name for effect, _ in compiled.effects]
    extras = (compiled.result, rules, compiled.input_names, compiled.written, shapes)
    return Sample(sizes, compiled.program, compiled.emitted.cells, compiled.leaves, extras, names)


def _shapes(output: fx.Node | tuple[fx.Node, ...]) -> Any:
    if isinstance(output, tuple):
        return [_shapes(node) for node in output]
    return tuple(map(int, output.meta["val"].shape))


def instance(compiled: Compiled, sizes: Sizes, numbers: tuple[int, ...] | None = None) -> Compiled:
    """A program of free sizes at these sizes: the same module, loaded with other constants.

    Args:
        numbers: see `Compiled`.
    """
    program = compiled.program
    lanes = tuple(replace(lane, shape=at(lane.shape, sizes)) for lane in program.lanes)
    module = load(compiled.emitted.source, sizes)
    made = replace(
        compiled,
        program=replace(program, lanes=lanes),
        result=at(compiled.result, sizes),
        effects=[(effect, at(rule, sizes)) for effect, rule in compiled.effects],
        namespace=vars(module),
        sizes=dict(sizes),
        numbers=numbers,
    )
    weakref.finalize(made, unload, module.__name__)
    return made
