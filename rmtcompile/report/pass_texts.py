"""The program after each pass as text, by the pass's name, for the viewer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rmtcompile.report import texts
from rmtcompile.report.dump import front
from rmtcompile.report.findings import inputs_of
from rmtcompile.report.names import model_name
from rmtcompile.report.stages import programs

if TYPE_CHECKING:
    from rmtcompile.optimized import Optimized


def texts_of(fast: Optimized, *, capture: bool = False) -> dict[str, str]:
    """The texts of the last call's program by `key_of` the pass.

    Args:
        capture: capture the forward once more, for the texts of the passes before partition, which are
            not kept.
    """
    compiled, schedule = fast.compiled, fast.schedule
    found = {key_of(name): text for name, text in front(fast)} if capture else {}
    found |= {
        "partition": texts.partition_text(compiled),
        "reroll": texts.rules_text(compiled),
        "dependence": texts.dependence_text(compiled),
        "wavefront": texts.program_text(compiled, schedule, model_name(fast.model), inputs_of(fast)[0]),
        "lift": texts.lift_text(compiled),
    }
    for name, program in programs(compiled, compiled.passes_off):
        found[key_of(name)] = texts.route_text(compiled, program)
    return found


def key_of(name: str) -> str:
    """`route` for "route, align", `reroll` for "reroll 2 -> 3", `capture` for "capture.txt"."""
    return re.split(r"[ ,._]", name)[0]
