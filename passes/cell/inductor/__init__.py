"""Passes inside Inductor: on its graphs of compiled cells, where it is settled what each kernel stores.

    accumulate   a product adds to what it is added to, in place
    gated        a product of two halves that meet elementwise computes that expression too

They run one after another as Inductor's `post_grad_custom_post_pass`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from rmtcompile.passes.cell.inductor.accumulate import accumulate
from rmtcompile.passes.cell.inductor.gated import gated

PASSES: dict[str, Callable[[fx.Graph], None]] = {"accumulate": accumulate, "gated": gated}


class Passes(CustomGraphPass):
    """Those that are not switched off, to be given to `torch.compile` as its option
    `post_grad_custom_post_pass`."""

    def __init__(self, switched_off: frozenset[str] = frozenset()) -> None:
        self.names = tuple(name for name in PASSES if name not in switched_off)

    def __call__(self, graph: fx.Graph) -> None:
        for name in self.names:
            PASSES[name](graph)

    def uuid(self) -> Any:
        files = sorted(str(path) for path in Path(__file__).parent.glob("*.py"))
        return get_hash_for_files(tuple(files), ",".join(self.names))


__all__ = ["PASSES", "Passes"]
