"""The schedule of a compiled program, with its carries, variants, kinds of layers and operations."""

from __future__ import annotations

from dataclasses import replace

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.passes.grid.wavefront import wavefront
from rmtcompile.report.carries import carries_of, reads_of
from rmtcompile.report.cells import operations_of
from rmtcompile.schedule import Schedule


def schedule_of(compiled: Compiled, count: int) -> Schedule:
    """The schedule of a compiled program over `count` segments, with its carries, variants and kinds."""
    program = compiled.program
    classes = [program.rolled.classes[("cell", layer)] for layer in range(program.n_layers)]
    finest = max(classes, key=lambda one: one.head + one.tail)
    variants = tuple(_variant(finest.of(s, count), finest.head) for s in range(count))
    kinds = {layer: group.name for group in reversed(program.groups) for layer in group.layers}
    schedule = wavefront(
        program.offsets,
        program.n_layers,
        count,
        alpha=program.alpha,
        block=program.block,
        carries=carries_of(compiled),
        segment_variants=variants,
        layer_kinds=tuple(kinds.get(layer, "unused") for layer in range(program.n_layers)),
    )
    return replace(schedule, reads=reads_of(compiled), operations=operations_of(compiled, count))


def _variant(number: int, head: int) -> str:
    if number == head:
        return "later" if head else "every"
    return "first" if number == 0 else f"segment{number}" if number > 0 else "last"
