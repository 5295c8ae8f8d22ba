"""The schedule of a compiled program, with its carries, variants, kinds of layers and operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.passes.grid.wavefront import wavefront
from rmtcompile.report.cells import operations_of
from rmtcompile.report.facts import Facts, facts_of, is_loaded
from rmtcompile.schedule import Schedule


def schedule_of(
    compiled: Compiled, count: int, facts: Facts | None = None, bands: Sequence[range] = ()
) -> Schedule:
    """The schedule of a compiled program over `count` segments of the model, with its carries, variants and
    kinds. Its own segments are the steps of the grid.

    Args:
        facts: of the program, where they are known already.
        bands: the layers of each band, where it is cut.
    """
    facts = facts or facts_of(compiled)
    program, count = compiled.program, compiled.steps(count)
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
        carries=facts.carries,
        segment_variants=variants,
        layer_kinds=tuple(kinds.get(layer, "unused") for layer in range(program.n_layers)),
    )
    operations = None if is_loaded(compiled) else operations_of(compiled, count)
    return replace(schedule, reads=facts.reads, operations=operations, bands=tuple(bands))


def _variant(number: int, head: int) -> str:
    if number == head:
        return "later" if head else "every"
    return "first" if number == 0 else f"segment{number}" if number > 0 else "last"
