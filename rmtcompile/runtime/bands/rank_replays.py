"""What one rank has recorded: the levels of its own band, for runs of any length.

All ranks record after the same run, and replay only together: whether each of them can is told before a run's
first level, whether all went well after its last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from rmtcompile.runtime.bands.levels import Replayed, Traffic
from rmtcompile.runtime.bands.posted import Posts
from rmtcompile.runtime.bands.recorded import RecordedBand
from rmtcompile.runtime.bands.replays import BandReplays
from rmtcompile.runtime.bands.run import BandRun
from rmtcompile.runtime.graphs import Started

if TYPE_CHECKING:
    from rmtcompile.runtime.bands.execute import Member
    from rmtcompile.runtime.bands.ranks import RankExecutor

_DOWN = "values go down from band to band, and NCCL keeps an order between what two ranks send each other"


class RankReplays(BandReplays):
    """The recordings of one rank's executor."""

    def __init__(self, executor: RankExecutor) -> None:
        super().__init__(executor)
        self._ranks = executor
        self._obstacle = self._obstacle or (_DOWN if executor.cut.goes_down and executor.is_cuda else "")
        self._posts: Posts | None = None
        self._others = ""  # why other ranks cannot
        self._all_want = False

    def __str__(self) -> str:
        """See `BandReplays`."""
        if self._others and not self._obstacle:
            return f"levels are launched one by one: {self._others}"
        return super().__str__()

    # ---- what ranks tell each other ------------------------------------------------------------------------

    def can_replay(self, segments: int) -> bool:
        """Whether this rank has recorded what a run of this length needs."""
        return bool(self._bands) and self._bands[self._ranks.rank].blocks(segments) is not None

    def said(self) -> dict[str, Any]:
        """What others have to know after a run."""
        return {"wants": super().wants, "obstacle": self._obstacle}

    def heard(self, everyone: list[Mapping[str, Any]]) -> None:
        """Take what all ranks say after a run, this one included."""
        self._all_want = all(one["wants"] for one in everyone)
        others = (f"rank {rank}: {one['obstacle']}" for rank, one in enumerate(everyone) if one["obstacle"])
        self._others = next(others, "")

    @property
    def wants(self) -> bool:
        """Whether all ranks record now."""
        return self._all_want and super().wants

    # ---- recording -----------------------------------------------------------------------------------------

    def _example(self, inputs: list[torch.Tensor]) -> list[tuple[Member, BandRun]]:
        self._all_want = False
        ranks, count = self._ranks, self.example_segments
        named, leaves = ranks.named(ranks.resized(count, inputs)), ranks.held()
        return [(ranks.members[ranks.rank], ranks.example(count, named, leaves))]

    def _recorded(self, member: Member, run: BandRun) -> RecordedBand:
        band = super()._recorded(member, run)
        for sent in member.band.sends:
            band.like(sent)  # whether it can be sent without a word
        self._posts = Posts(self._ranks.mail, band.like)
        return band

    # ---- running -------------------------------------------------------------------------------------------

    def start(self, segments: int, inputs: list[torch.Tensor]) -> Started | None:
        """None: a run starts when all ranks have agreed on it."""
        return None

    def levels(
        self,
        segments: int,
        inputs: Mapping[str, torch.Tensor],
        leaves: Mapping[str, torch.Tensor],
        traffic: Traffic,
    ) -> tuple[Any, Replayed]:
        """This rank's part of a replayed run, and its levels."""
        ranks, band = self._ranks, self._bands[self._ranks.rank]
        member, blocks = ranks.members[ranks.rank], band.blocks(segments)
        assert blocks is not None
        assert self._posts is not None
        host = self.host(member, segments, inputs)
        return host, Replayed(
            band,
            blocks,
            host,
            lambda: self.begin(member, host, leaves),
            ranks.compiled.emitted.borders.outer,
            traffic,
            ranks.mail,
            self._posts,
            not ranks.cut.goes_down,
        )

    def own(self, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The outputs of a replayed run; copies where they are memory that later runs overwrite."""
        return self._bands[self._ranks.rank]._own(outputs)


__all__ = ["RankReplays"]
