"""Passes inside Inductor: on its graphs of compiled cells.

    accumulate   a product adds to what it is added to, in place
    gated        a product of two halves that meet elementwise computes that expression too
    turned       the gradient of a weight is made in the layout of the weight

The first two run where it is settled what each kernel stores, as Inductor's `post_grad_custom_post_pass`, one
after the other; the third on the graph of forward and backward, as its `joint_custom_post_pass`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._inductor.config
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from rmtcompile.passes.cell.inductor.accumulate import accumulate
from rmtcompile.passes.cell.inductor.gated import gated
from rmtcompile.passes.cell.inductor.turned import turned

LATE, JOINT = "post_grad_custom_post_pass", "joint_custom_post_pass"

PASSES: dict[str, dict[str, Callable[[fx.Graph], None]]] = {
    LATE: {"accumulate": accumulate, "gated": gated},
    JOINT: {"turned": turned},
}
"""By the option of `torch.compile` that they are given as."""


class Passes(CustomGraphPass):
    """Those of one option that are not switched off."""

    def __init__(self, switched_off: frozenset[str] = frozenset(), option: str = LATE) -> None:
        self.passes = {name: run for name, run in PASSES[option].items() if name not in switched_off}

    def __call__(self, graph: fx.Graph) -> None:
        for run in self.passes.values():
            run(graph)

    def uuid(self) -> Any:
        files = sorted(str(path) for path in Path(__file__).parent.glob("*.py"))
        return get_hash_for_files(tuple(files), ",".join(self.passes))


def options(switched_off: frozenset[str]) -> dict[str, Passes]:
    """Options of `torch.compile`; where the user has given Inductor a pass, that one stays."""
    free = [option for option in PASSES if getattr(torch._inductor.config, option) is None]
    return {option: Passes(switched_off, option) for option in free}


__all__ = ["JOINT", "LATE", "PASSES", "Passes", "options"]
