"""Results: what every rank gets of a run that has ended.

    rank 0    hidden states of segments 0 1 2 ──┐
    rank 1    logits of segments 0 1 2 .........─┴── both, on both; or what has gone wrong on one of them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.passes.emit.readers import CALLER
from rmtcompile.runtime.bands.faults import Fault, raise_any, said
from rmtcompile.runtime.bands.mail import kinds_of
from rmtcompile.runtime.base import BaseRun
from rmtcompile.runtime.crossing import Key

if TYPE_CHECKING:
    from rmtcompile.runtime.bands.ranks import RankExecutor

_TENSOR = object()


def shared(
    ranks: RankExecutor,
    run: BaseRun | None,
    found: dict[Key, torch.Tensor],
    stays: set[Key],
    stopped: Fault | None,
    is_off: bool,
) -> bool:
    """Give every rank what the caller reads, and what segments after the run do; whether all ranks have run
    it to its end.

    Args:
        run: this rank's part; None where it has not begun.
        found: what segments after the run read, of this rank; of all ranks afterwards.
        stays: what of it no other rank gets.
        is_off: whether the run has to be made again, for what has happened on this rank.

    Raises:
        RankError: something has gone wrong on one of them, which all of them say.
    """
    mine: dict[Any, Any] = {("", key): value for key, value in found.items() if key not in stays}
    for name in sorted(ranks.cut.bands[ranks.rank].makes):
        if run is not None and CALLER in ranks.compiled.emitted.readers.get(name, ()):
            mine |= {(name, segment): value for segment, value in run.taps[name].values.items()}
    told = {"stopped": said(stopped), "is off": is_off, "kinds": kinds_of(mine), **ranks.replays.said()}
    everyone = ranks.mail.gathered("end a run", told)
    ranks.replays.heard(everyone)
    raise_any([one["stopped"] for one in everyone], stopped)
    if any(one["is off"] for one in everyone):
        return False
    assert run is not None
    for rank, one in enumerate(everyone):
        values = ranks.mail.spread(rank, mine if rank == ranks.rank else {}, one["kinds"])
        for (where, key), value in values.items():
            kept = run.taps[where].values if where else found
            kept[key] = value
    return True


def flat_of(found: Any, shape: list[Any]) -> list[torch.Tensor]:
    """The tensors in what a run gives, for `unflat`."""
    leaves, spec = pytree.tree_flatten(found)
    shape[:] = [spec, [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def unflat(flat: Sequence[torch.Tensor], shape: list[Any]) -> Any:
    """What `flat_of` was given, with other tensors in it."""
    spec, others = shape
    values = iter(flat)
    return pytree.tree_unflatten([next(values) if other is _TENSOR else other for other in others], spec)


__all__ = ["flat_of", "shared", "unflat"]
