"""Bands: a program cut by layers, and what goes from one part to another.

    layers 0 .. 7 | 8 .. 15        band 0 sends the hidden state of layer 7, of each segment, to band 1
    band 0          band 1

Each band is a program of its own over some of the layers; their levels are those of the whole program.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rmtcompile.ir.program import Program


@dataclass(frozen=True)
class Sent:
    """A value that one band makes on a level and another reads on a later one.

    Attributes:
        target: number of the band that reads it.
        name: of the lane that it is put in, or of the tap that it is.
        layer: the cell that makes it; -1 for a tap of a prologue or an epilogue.
        group, source: of a lane: which output of which group; group "": the lane that it moves from.
        place: of a lane: the layer whose place it is put in; -1 for a tap.
    """

    target: int
    name: str
    layer: int
    group: str = ""
    source: str = ""
    place: int = -1

    @property
    def is_tap(self) -> bool:
        """Whether it is a value kept outside the cells."""
        return self.place < 0


@dataclass(frozen=True)
class Band:
    """Some of the layers, and what they send.

    Attributes:
        program: of these layers; its cells are those of the whole program.
        sends: what leaves the band.
        makes: taps whose values are made here.
        reads: taps that are read here.
    """

    index: int
    layers: range
    program: Program
    sends: tuple[Sent, ...]
    makes: frozenset[str]
    reads: frozenset[str]

    def on(self, device: object) -> Band:
        """The same with its lanes on a device."""
        lanes = tuple(replace(lane, device=device) for lane in self.program.lanes)
        return replace(self, program=replace(self.program, lanes=lanes))


@dataclass(frozen=True)
class LayerCosts:
    """Seconds that the layers of one segment take, and what comes before and after them, as measured.

    Attributes:
        kinds: of one cell, by the name of its group.
        groups: the group of each layer; one that is not among the kinds costs nothing.
    """

    kinds: Mapping[str, float]
    groups: tuple[str, ...]
    prologue: float = 0.0
    epilogue: float = 0.0

    @property
    def layers(self) -> tuple[float, ...]:
        """Of one cell of each layer."""
        return tuple(self.kinds.get(name, 0.0) for name in self.groups)

    def share(self, own: range) -> float:
        """Of a band of these layers, as a part of the whole."""
        mine = sum(self.layers[own.start : own.stop])
        mine += self.prologue if own.start == 0 else 0.0
        mine += self.epilogue if own.stop == len(self.groups) else 0.0
        return mine / (sum(self.layers) + self.prologue + self.epilogue)

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {_us(seconds)} a layer" for name, seconds in self.kinds.items())
        ends = f"prologue {_us(self.prologue)}, epilogue {_us(self.epilogue)}"
        return f"a segment takes, measured: {kinds}, {ends}"


@dataclass(frozen=True)
class Division:
    """Which layers each band has.

    Attributes:
        how: they were found, in words.
        costs: by which they were balanced, if they were.
    """

    layers: tuple[range, ...]
    how: str = ""
    costs: LayerCosts | None = None


@dataclass(frozen=True)
class Cut:
    """A program cut into bands."""

    whole: Program
    bands: tuple[Band, ...]
    division: Division

    @property
    def goes_down(self) -> bool:
        """Whether a band reads what a later one has made: then none runs ahead of another."""
        return any(sent.target < band.index for band in self.bands for sent in band.sends)

    def levels(self, segments: int, lag: int = 0) -> int:
        """Levels of a run, one after the other, where each band is so many levels behind the one before."""
        return self.whole.grid(segments).n_levels + lag * (len(self.bands) - 1)

    def described(self, places: Sequence[object] = ()) -> list[str]:
        """The cut in words, a line a band.

        Args:
            places: where each band runs, if that is known.
        """
        how, costs = self.division.how, self.division.costs
        count, layers = len(self.bands), self.whole.n_layers
        lines = [f"{layers} layers in {count} band{'s' * (count > 1)}{f', {how}' if how else ''}"]
        for band in self.bands:
            on = f" on {places[band.index]}" if places else ""
            on += f": {100 * costs.share(band.layers):.0f} % of the cost" if costs is not None else ""
            lines.append(f"{band.index}  layers {_span(band.layers)}{on}{_sent(band.sends)}")
        lines += [str(costs)] if costs is not None else []
        if self.goes_down:
            lines.append("values go down from band to band: all bands are on the same level")
        return lines

    def __str__(self) -> str:
        return "bands     " + "\n  ".join(self.described())


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f} us"


def _span(layers: range) -> str:
    return str(layers.start) if len(layers) == 1 else f"{layers.start}..{layers.stop - 1}"


def _sent(sends: Iterable[Sent]) -> str:
    targets: dict[int, list[str]] = {}
    for sent in sends:
        name = sent.name if sent.is_tap else f"{sent.name} of layer {sent.layer}"
        targets.setdefault(sent.target, []).append(name)
    return "".join(
        f"; to {target}: {', '.join(sorted(set(names)))}" for target, names in sorted(targets.items())
    )


__all__ = ["Band", "Cut", "Division", "LayerCosts", "Sent"]
