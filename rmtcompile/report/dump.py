"""Dump: one numbered file a stage, `00_capture.txt` ... `10_emit.py`; the last one can be imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx

from rmtcompile.compiler.stages import Log
from rmtcompile.errors import RMTCompileError
from rmtcompile.report import texts
from rmtcompile.report.findings import inputs_of
from rmtcompile.report.names import model_name
from rmtcompile.report.stages import changes, programs

if TYPE_CHECKING:
    from rmtcompile.optimized import Optimized


def dump(fast: Optimized, folder: str | Path) -> list[Path]:
    """Write what each stage of the compiler made of the last call's program; returns the files in order.

    The graphs between capture and partition are not kept, so the forward is captured once more, with the
    fewest segments that the rules were read from.

    Raises:
        RMTCompileError: nothing was captured yet.
    """
    if fast._last is None:
        raise RMTCompileError("nothing is captured yet: call the optimized model once")
    entry, _ = fast._last
    compiled, schedule = entry.compiled, fast.schedule
    program = texts.program_text(compiled, schedule, model_name(fast.model), inputs_of(fast)[0])
    stages: list[tuple[str, str]] = [
        *front(fast),
        ("partition.txt", texts.partition_text(compiled)),
        ("reroll.txt", texts.rules_text(compiled)),
        ("dependence.txt", texts.dependence_text(compiled)),
        ("wavefront.txt", program),
        *_cells(fast),
        ("lift.txt", texts.lift_text(compiled)),
        ("emit.py", compiled.emitted.source),
    ]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9]_*"):
        old.unlink()
    paths = []
    for i, (name, text) in enumerate(stages):
        path = folder / f"{i:02d}_{name}"
        path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def use(fast: Optimized, path: str | Path) -> None:
    """Run the functions of a dumped, perhaps edited, module from now on, in the last call's program.

    Tracebacks and debuggers show the file.  Another program (another shape or dtype of the inputs) is not
    touched.

    Raises:
        RMTCompileError: nothing was captured yet, the file defines no `forward`, layers are cut into bands,
            or levels are replayed as CUDA graphs, which hold the functions as they were.
    """
    if fast._last is None:
        raise RMTCompileError("nothing is captured yet: call the optimized model once")
    entry, _ = fast._last
    if fast.options.has_bands:
        raise RMTCompileError("bands have modules of their own: edit the program without devices")
    if fast.options.cuda_graphs is not False and entry.executor.device.type == "cuda":
        raise RMTCompileError(
            "recorded CUDA graphs do not see edited code: optimize(model, cuda_graphs=False)"
        )
    path = Path(path)
    source = path.read_text(encoding="utf-8")
    code, trial = compile(source, str(path), "exec"), {"__name__": path.stem}
    exec(code, trial)  # the user's own file; here first, so that a mistake in it changes nothing
    if not callable(trial.get("forward")):
        raise RMTCompileError(f"{path} defines no forward(run): take the last file of a dump")
    exec(code, entry.compiled.namespace)
    entry.compiled.namespace.update(entry.compiled.sizes)
    entry.compiled.emitted = replace(entry.compiled.emitted, source=source, phases={})
    entry.is_edited = True


def _cells(fast: Optimized) -> list[tuple[str, str]]:
    """The program as it was routed, and after the passes on its cells."""
    found = []
    said = dict(changes(fast.compiled, fast.compiled.passes_off))
    for name, program in programs(fast.compiled, fast.compiled.passes_off):
        head = f"{said[name]}\n\n" if name in said else ""
        found.append((f"{name.partition(',')[0]}.txt", head + texts.route_text(fast.compiled, program)))
    return found


def front(fast: Optimized) -> list[tuple[str, str]]:
    """The graph after capture and after each pass on it."""
    from rmtcompile.compiler.unrolling import unrolled_forward

    assert fast._last is not None
    entry, _ = fast._last
    args, kwargs = entry.example
    base = entry.compiled.capture
    leaves = {target: leaf.name for target, leaf in base.leaves.items()}
    log = _Notes([call.path for call in base.calls], leaves)
    count = entry.compiled.proved_on[0]
    options = replace(fast.options, joins=entry.compiled.joins)
    unrolled_forward(fast.model, args, kwargs, entry.segmentation, count, options, log)
    return log.found


class _Notes(Log):
    """Writes down the graph after each stage.

    Args:
        paths: module path by index of call; the forward makes the same calls each time.
        leaves: names of the tensors that the graph reads.
    """

    def __init__(self, paths: list[str], leaves: dict[str, str]) -> None:
        super().__init__(None)
        self.paths = paths
        self.leaves = leaves
        self.found: list[tuple[str, str]] = []

    @contextmanager
    def stage(self, name: str, module: fx.GraphModule | None = None) -> Iterator[list[fx.GraphModule]]:
        box: list[fx.GraphModule] = []
        yield box
        if box:
            file = name.partition(",")[0].replace(" ", "_")
            self.found.append((f"{file}.txt", texts.graph_text(box[0], self._path, self.leaves)))

    def _path(self, node: fx.Node) -> str:
        scope = node.meta.get("scope", ())
        return self.paths[scope[-1]] if scope and scope[-1] < len(self.paths) else ""
