"""The pipeline for the viewer: each stage with the operations before it and after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.passes.grid.partition import EPILOGUE, INIT, PROLOGUE
from rmtcompile.report.names import op_name
from rmtcompile.report.stages import cell_counts, counts_of, programs
from rmtcompile.viewer import PassView


def passes_of(compiled: Compiled, switched_off: frozenset[str]) -> Iterator[PassView]:
    """The stages of the last capture and what follows, each with the operations before it and after it."""
    stages = list(compiled.stages)
    start = max((i for i, s in enumerate(stages) if s.name.startswith("capture")), default=0)
    counts: dict[str, int] = {}
    if start:
        last = next(s for s in reversed(stages[:start]) if s.after)
        took = sum(s.seconds for s in stages[:start])
        yield PassView(
            stages[0].name, {}, _plain(last.after), took, "with the stages below it, up to partition"
        )
    around = _outside(compiled)
    for stage in stages[start:]:
        steps = _steps(compiled, stage.name, switched_off) or [(stage.name, stage.after or counts)]
        for i, (name, after) in enumerate(steps):
            if stage.name.startswith(_ON_CELLS):
                after = dict(around + Counter(after))
            before = _plain(stage.before) or counts
            after = _plain(after)
            yield PassView(name, before, after, stage.seconds if not i else 0.0, _note(name))
            counts = after


def _plain(counts: Mapping[str, int]) -> dict[str, int]:
    """`getitem` for `<built-in function getitem>`."""
    return {name.removeprefix("<built-in function ").removesuffix(">"): n for name, n in counts.items()}


_ON_CELLS = ("route", "align", "optimise", "lift", "emit")


def _steps(compiled: Compiled, name: str, switched_off: frozenset[str]) -> list[tuple[str, dict[str, int]]]:
    """The operations after a stage that does not work on one graph; its passes one by one."""
    if name.startswith("reroll"):
        bodies = {rule.body.key: rule.body for by in compiled.rolled.rules.values() for rule in by.values()}
        total = Counter(op_name(node) for body in bodies.values() for node in body.nodes)
        return [(name, dict(total))]
    if name.startswith(("route", "align", "optimise")):
        first = name.startswith("optimise")
        found = [(n, cell_counts(program)) for n, program in programs(compiled, switched_off)]
        return found[1:] if first else [(name, found[0][1])]
    if name.startswith(("lift", "emit")):
        return [(name, counts_of(cell.graph for cell in compiled.emitted.cells))]
    return []


def _outside(compiled: Compiled) -> Counter[str]:
    total: Counter[str] = Counter()
    for kind in (INIT, PROLOGUE, EPILOGUE):
        for rule in compiled.rolled.rules[(kind, -1)].values():
            total.update(op_name(node) for node in rule.body.nodes)
    return total


_NOTES = {
    "capture": "the model's own forward, traced once on tensors without memory",
    "functionalise": "no operation writes into its operands any more",
    "forward": "a read of a stored value is the value, past stacks, slices and rolls",
    "number": "equal operations become one: what is the same for all segments is found here",
    "tiles": "a list that holds the same for every segment says how often",
    "drop": "what nothing reads is not computed",
    "partition": "each operation gets its place on the grid; the operations stay",
    "reroll": "one body for each class of segments instead of one for each segment",
    "dependence": "offsets between cells; the operations stay",
    "wavefront": "a level for each cell; the operations stay",
    "route": "one graph for each kind of layer, its variants merged",
    "causal": "a mask that lets each token see those before it becomes a flag of the attention",
    "cast_weights": "weights that cells convert are converted once a run",
    "grouped_query": "key and value heads are no longer repeated for the query heads that share them",
    "fuse_linears": "linears over the same input become one",
    "lift": "each cell function computes n cells; one function for each mixture of variants",
}


def _note(name: str) -> str:
    return next((text for key, text in _NOTES.items() if name.startswith(key)), "")
