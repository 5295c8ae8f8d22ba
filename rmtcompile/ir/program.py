"""The program representation: a segment-recurrent forward as a loop over a layer x segment grid.

    Body       the operations of one region (init, a prologue, a cell, an epilogue) as a list, live-ins apart
    Rolled     what `reroll` proves: which body each region has at segment s of S, and whence its live-ins
    Program    what `emit` prints: functions for init, prologue and epilogue, one cell graph a kind, lanes

Words: a *class* says which segments share one body; a *kind* is a set of layers whose cells have the same
bodies; a *lane* is the storage of one live-in for every cell of a kind, indexed by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from rmtcompile.ir.size import Size
from rmtcompile.schedule.grid import Grid


@dataclass(frozen=True)
class Affine:
    """An integer that depends on the segment s and on the number of segments S: const + by_segment*s +
    by_count*S."""

    const: int
    by_segment: int = 0
    by_count: int = 0

    def at(self, segment: int, count: int) -> int:
        """The integer at segment `segment` of `count`."""
        return self.const + self.by_segment * segment + self.by_count * count

    @property
    def is_constant(self) -> bool:
        return not (self.by_segment or self.by_count)

    def __str__(self) -> str:
        return self.text("s", "S")

    def text(self, segment: str, count: str) -> str:
        """The same as an expression of variables of these names."""
        terms = [(segment, self.by_segment), (count, self.by_count)]
        text = " + ".join(_times(k, name) for name, k in terms if k)
        if not text:
            return str(self.const)
        if isinstance(self.const, Size):
            text += f" + {self.const}"
        elif self.const:
            text += f" {'+' if self.const > 0 else '-'} {abs(self.const)}"
        return text


def _times(factor: int, name: str) -> str:
    if isinstance(factor, Size):
        return f"({factor}) * {name}"
    return name if factor == 1 else f"{factor} * {name}"


@dataclass(frozen=True)
class Source:
    """Where a value comes from, seen from a consumer at segment s.

    Attributes:
        kind: "leaf" (parameter, buffer, state, constant), "input" (argument of the forward), "init",
            "prologue", "cell" or "epilogue".
        name: leaf or input name, for "leaf" and "input".
        segment: producer's segment: absolute, or relative (s - segment) where `relative` is set. Init, leaf,
            input: 0.
        layer: producer's layer, for "cell".
        node: index of the value in the producer's body.
        nodes: in a rule: that index for each class of the producer, as (class, index).
    """

    kind: str
    name: str = ""
    segment: int = 0
    relative: bool = False
    layer: int = -1
    node: int = -1
    nodes: tuple[tuple[int, int], ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        """In the user's words: "layer 2 of segment 4", "layer 2, one segment before"."""
        if self.kind in ("leaf", "input"):
            return self.name
        where = f"layer {self.layer}" if self.kind == "cell" else self.kind
        if self.kind == "init":
            return "what is computed before the segments"
        if not self.relative:
            return f"{where} of segment {self.segment}"
        if not self.segment:
            return f"{where} of the same segment"
        return f"{where}, {self.segment} segment{'s' * (self.segment > 1)} before"

    @property
    def way(self) -> tuple[object, ...]:
        """What stays equal between classes of one producer: everything but the position in its body."""
        return (
            self.kind,
            self.name,
            self.segment,
            self.relative,
            self.layer,
            self.node if self.kind == "init" else -1,
        )

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for rules that give one and the same value."""
        return (*self.way, self.nodes)

    def segment_from(self, segment: int) -> int:
        """Producer's segment for a consumer at `segment`."""
        return segment - self.segment if self.relative else self.segment


@dataclass(frozen=True)
class Each:
    """A live-in that is a list over segments: one value from each of the segments first .. s - back."""

    first: int
    back: int
    kind: str
    layer: int
    nodes: tuple[tuple[int, int], ...] = field(default=(), compare=False)  # (class, index) as in `Source`

    def __str__(self) -> str:
        """In the user's words."""
        where = f"layer {self.layer}" if self.kind == "cell" else self.kind
        if self.first < 0:
            return f"values of {where} that several operations of the same code give"
        last = "the same one" if not self.back else f"the one {self.back} before"
        return f"a value of {where} of each segment from {self.first} to {last}"


@dataclass(frozen=True)
class Body:
    """The operations of one region.

    Attributes:
        key: hashable form: two regions with equal keys do the same with their live-ins.
        nodes: the operations, in order, as nodes of the capture they were read from.
        live_ins: values from outside, in order of first use; a tuple of nodes is a list over segments; None
            is the live-in of an operation whose result nobody reads in this segment.
    """

    key: Any
    nodes: tuple[fx.Node, ...]
    live_ins: tuple[fx.Node | tuple[fx.Node, ...] | None, ...]
    ints: tuple[int, ...]
    lender: Body | None = field(default=None, compare=False)



@dataclass(frozen=True)
class Value:
    """A value of one region as its consumers see it: in each class of the region, the index of an operation.

    Attributes:
        kind: "init", "prologue", "cell" or "epilogue".
        layer: for "cell".
        nodes: (class, index) pairs.
    """

    kind: str
    layer: int
    nodes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Port:
    """A live-in of a group's cells.

    Attributes:
        name: placeholder name in the group's graph.
        role: "lane" (differs from cell to cell), "weight" (stacked by layer), "shared" (one value for all
            cells), "stacked" (one init value a layer), "rows" (the model's own stacked weight, a row a
            layer), "mask" (whether a cell belongs to a class), "layer" (alpha = 0: what all cells of a layer
            share, a parameter or an init value).
        source: by role: the weight, the shared source, the sources by layer, or the class number of a mask.
    """

    name: str
    role: str
    source: Any = None

    @property
    def is_weight(self) -> bool:
        """Whether the layers' parameters stand here, stacked or not."""
        return self.role in ("weight", "rows") or (self.role == "layer" and self.source[0].kind == "leaf")

    @property
    def sources(self) -> tuple[Source, ...]:
        """Of what all cells share, or all cells of a layer: where it comes from."""
        if self.role == "shared":
            return (self.source,)
        return tuple(self.source) if self.role in ("stacked", "layer") else ()

    @property
    def has_axis(self) -> bool:
        """Whether a grouped call gets one value a cell."""
        return self.role not in ("shared", "layer")


@dataclass(frozen=True)
class Group:
    """Cells that run in one call: the layers of one kind, and the classes merged in one graph.

    Attributes:
        name: "layers", or "layers0", "layers1" ... where there are several kinds.
        layers: layers of this kind, ascending.
        classes: segment classes that this graph computes.
        graph: one cell; placeholders as in `ports`; the output node returns the values of `outputs`.
        outputs: names of what the graph returns, in order.
        ports: live-ins.
        values: what each output is: the index of an operation in each class's body, as (class, index) pairs.
    """

    name: str
    layers: tuple[int, ...]
    classes: tuple[int, ...]
    graph: fx.Graph
    ports: tuple[Port, ...]
    outputs: tuple[str, ...]
    values: tuple[tuple[tuple[int, int], ...], ...] = ()


@dataclass(frozen=True)
class Feed:
    """A write into a lane after a cell ran: from (s, l) to the lane's layer l + up, for a later level.

    Attributes:
        source: output name of `group`, or the name of another lane (group "").
        layers: producer layers for which the write is made.
    """

    group: str
    source: str
    offset: tuple[int, int]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Lane:
    """Storage of one live-in for every layer.

    Attributes:
        layers: consumer layers that have a place here.
        classes: classes of the cells that read it; None where every class does.
        entries: what is put in a layer's place before its cell reads it.
        feeds: writes by cells.
        placement: how cells' results get here: "copy" after all cells of a level have run, "in_place" over
            what the cell has read, or "double", into a second buffer that the next level reads.
        grows: dims along which later segments put larger values in; there `shape` is that of one of them.
        spare: further places, where cells store what nobody reads, so that a window's results are one slice.
    """

    name: str
    layers: tuple[int, ...]
    classes: tuple[int, ...] | None
    shape: tuple[int, ...]
    dtype: Any
    device: Any
    entries: tuple[LaneEntry, ...]
    feeds: tuple[Feed, ...]
    placement: str = "copy"
    spare: tuple[int, ...] = ()
    grows: tuple[int, ...] = ()

    @property
    def places(self) -> tuple[int, ...]:
        """Layers with a place: the consumers' and the spare ones, ascending."""
        return tuple(sorted({*self.layers, *self.spare}))

    @property
    def carries(self) -> bool:
        """Whether the lane carries values from segment to segment."""
        return any(feed.offset[0] for feed in self.feeds)


@dataclass(frozen=True)
class LaneEntry:
    """What cells of one layer find in a lane that no cell has put there.

    Attributes:
        early: (segment, source) for the segments that read something else than later ones: an initial state.
        steady: source for all other segments, or None where cells feed the lane.
    """

    layer: int
    early: tuple[tuple[int, Source], ...]
    steady: Source | None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for entries that put the same values in."""
        early = tuple((segment, source.identity) for segment, source in self.early)
        return (early, self.steady.identity if self.steady is not None else None)

    @property
    def sources(self) -> tuple[Source, ...]:
        return (*(source for _, source in self.early), *((self.steady,) if self.steady is not None else ()))


@dataclass(frozen=True)
class Tap:
    """A value of a region kept for a later reader outside the cells.

    Attributes:
        when: "each" (every segment), or ("end", b): only segment S - 1 - b, or ("at", s): only segment s.
        keep: how many segments back it is read, or None if all segments are collected.
        pinned: segments whose value is read at any later time.
    """

    name: str
    value: Value
    group_outputs: tuple[tuple[str, str], ...]  # for cells: (group, output name)
    when: tuple[Any, ...]
    keep: int | None
    pinned: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Opened:
    """Dims that depend on free sizes, of each argument and of each result of a function."""

    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Program:
    """A scheduled program, ready to be printed as Python.

    Attributes:
        alpha: level(s, l) = alpha * s + l. With 0 the cells of a level are the segments of one layer, and a
            lane has a place for each segment instead of one for each layer.
        block: with alpha 0, how many segments run together at most; else 0.
        offsets: dependence offsets between cells, consumer minus producer.
        rolled: the rules of init, prologue and epilogue.
        opened: functions of the emitted module that are the same for all free sizes, and what depends on
            those; empty where no size is free.
        counts: the free sizes that are integers which the model keeps from call to call.
        segmented: inputs of the forward that hold segments, by name.
        open_lanes: lanes whose shape depends on free sizes that only the last segments know.
        band: the layers that this program runs; None: all of them. Groups and lanes are then those layers'.
    """

    n_layers: int
    alpha: int
    offsets: frozenset[tuple[int, int]]
    groups: tuple[Group, ...]
    lanes: tuple[Lane, ...]
    taps: tuple[Tap, ...]
    rolled: Any
    block: int = 0
    opened: Mapping[str, Opened] = field(default_factory=dict)
    counts: frozenset[str] = frozenset()
    segmented: frozenset[str] = frozenset()
    open_lanes: frozenset[str] = frozenset()
    band: range | None = None

    def grid(self, segments: int, first: int = 0) -> Grid:
        """Which cell of a run of so many segments, of which those before `first` have run, runs on which
        level."""
        return Grid(self.n_layers, segments, self.alpha, self.block, first, self.band)
