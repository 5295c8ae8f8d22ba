"""Balance: which layers each band gets, by what they cost.

    layers      a  a  a  a  b  b  head       one cell of each kind, one prologue and one epilogue are timed
    cost        1  1  1  1  3  3  2
    bands       a  a  a  a  b | b  head      and the largest band is made as small as it can be

A steady level runs a cell of each layer, a prologue and an epilogue: the level takes as long as the band that
has most to do. What is timed runs by itself on a band's device, on values that are made up for it, of the
shapes and types of the capture: neither the model nor the generators of random numbers are touched. Where all
layers are of one kind and little happens around them, nothing is timed, and layers are divided by number.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from statistics import fmean
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.bands import Division, LayerCosts
from rmtcompile.ir.program import Group, Program
from rmtcompile.passes.bands import balanced, even
from rmtcompile.passes.emit.bodies import is_view, parts_of
from rmtcompile.passes.emit.regions import Regions
from rmtcompile.passes.grid.partition import CELL, EPILOGUE, PROLOGUE
from rmtcompile.runtime.bands.control import words_of
from rmtcompile.runtime.contexts import own_modes, plain_tensors, same_numbers
from rmtcompile.runtime.costs import seconds

_LITTLE = 0.1
"""Share of a cell's floating-point operations and of the bytes that it writes, below which a prologue or an
epilogue is not worth a border of its own: it moves none by more than a tenth of a layer."""

_NOISE = 0.02
"""By which share of its cost a band may be larger than the best one: what two measurements differ by."""

_FILL = 1 / 64
"""What values are made of: neither zeros, which sums would be divided by, nor memory that may hold nan."""

BY_NUMBER, BY_COST, AS_GIVEN = "divided by their number", "balanced by measured cost", "divided as was asked"


def divided(
    program: Program, devices: Sequence[torch.device], group: Any = None, counts: Sequence[int] = ()
) -> Division:
    """The layers of each band.

    Args:
        devices: of each band, in order.
        group: the processes that run a band each; they divide alike.
        counts: how many layers each band has, where that is given.

    Raises:
        UnsupportedError: more layers are given, or fewer, than there are.
    """
    if counts:
        return Division(_given(program.n_layers, counts), AS_GIVEN)
    by_number = even(program.n_layers, len(devices))
    if len(devices) == 1:
        return Division(by_number)
    work = Work(program)
    with plain_tensors(), own_modes(), same_numbers(devices[0]):
        if work.is_even:
            return Division(by_number, BY_NUMBER)
        costs = _measured(work, devices[0]) if group is None else _agreed(work, devices[0], group)
    if isinstance(costs, str):
        return Division(by_number, f"{BY_NUMBER}: a cell by itself does not run ({costs})")
    layers = balanced(costs.layers, len(devices), costs.prologue, costs.epilogue, _NOISE)
    return Division(layers, BY_COST, costs)


def _given(n_layers: int, counts: Sequence[int]) -> tuple[range, ...]:
    if sum(counts) != n_layers:
        raise UnsupportedError(
            f"devices share out {sum(counts)} layers, and there are {n_layers}",
            remedy="give each device its number of layers, or a list of devices: then costs are measured",
        )
    return tuple(range(stop - count, stop) for count, stop in zip(counts, accumulate(counts), strict=True))


# ---- what there is to do -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """Operations that can run by themselves."""

    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]

    def on(self, home: torch.device, device: torch.device) -> Callable[[], Any]:
        """The operations on made-up values, on another device than the captured one (home)."""

        def there(value: Any) -> Any:
            return device if value == home and isinstance(value, torch.device) else value

        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in self.inputs}
        for node in self.nodes:
            copy = copies[node] = graph.node_copy(node, copies.__getitem__)
            copy.args, copy.kwargs = fx.node.map_aggregate((copy.args, copy.kwargs), there)
        graph.output(tuple(copies[node] for node in self.results))
        given = pytree.tree_map_only(
            torch.Tensor, lambda x: _made_up(x, there(x.device)), [node.meta["val"] for node in self.inputs]
        )
        return partial(fx.GraphModule({}, graph).forward, *given)

    def work(self, home: torch.device) -> tuple[int, int]:
        """Floating-point operations of products and attentions, and bytes that are written."""
        from torch.utils.flop_counter import FlopCounterMode

        run = self.on(home, torch.device("meta"))
        with FlopCounterMode(display=False) as counter:
            run()
        made = (x for node in self.nodes if not is_view(node) for x in _tensors(node))
        return counter.get_total_flops(), sum(x.numel() * x.element_size() for x in made)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor)]


def _made_up(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the same shape, strides and type, full of small numbers, or of the number 0."""
    spans = [(n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True)]
    room = torch.empty(1 + sum(spans) if like.numel() else 0, dtype=like.dtype, device=device)
    room.fill_(_FILL if like.is_floating_point() or like.is_complex() else 0)
    return room.as_strided(like.shape, like.stride())


class Work:
    """What a program does for a segment that is neither among the first nor among the last ones.

    Attributes:
        kinds: a cell, by the name of its group.
        groups: the group of each layer; "" for one that computes nothing.
        prologue, epilogue: what is done before and after the layers.
    """

    def __init__(self, program: Program) -> None:
        found = [_group(program, layer) for layer in range(program.n_layers)]
        self.home = next((lane.device for lane in program.lanes), torch.device("cpu"))
        self.groups = tuple(group.name if group is not None else "" for group in found)
        self.kinds = {group.name: _cell(group) for group in found if group is not None}
        self.prologue, self.epilogue = (_around(program, kind) for kind in (PROLOGUE, EPILOGUE))
        self.lanes = tuple((lane.name, tuple(lane.shape), str(lane.dtype)) for lane in program.lanes)

    @cached_property
    def digest(self) -> str:
        """Equal for the same work, on whatever device."""
        ends = (*self.kinds.values(), self.prologue, self.epilogue)
        nodes = [node.format_node() for region in ends for node in (*region.inputs, *region.nodes)]
        said = re.sub(r"index=\d+|cuda:\d+", "", repr((self.groups, self.lanes, nodes)))
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    @property
    def is_even(self) -> bool:
        """Whether bands of as many layers each have as much to do, as far as that can be told."""
        if len(set(self.groups)) > 1:
            return False
        try:
            (cell,) = (region.work(self.home) for region in self.kinds.values())
            ends = [end.work(self.home) for end in (self.prologue, self.epilogue) if end.nodes]
        except Exception:  # an operation that does not run without values: what it costs is measured
            return False
        return all(mine <= _LITTLE * layer for end in ends for mine, layer in zip(end, cell, strict=True))


def _group(program: Program, layer: int) -> Group | None:
    """The group of a layer's cells of most segments."""
    found = [group for group in program.groups if layer in group.layers]
    steady = program.rolled.classes[(CELL, layer)].head
    return next((group for group in found if steady in group.classes), found[0] if found else None)


def _cell(group: Group) -> Region:
    nodes = {op: tuple(n for n in group.graph.nodes if n.op == op) for op in ("placeholder", "call_function")}
    (output,) = (node for node in group.graph.nodes if node.op == "output")
    return Region(nodes["placeholder"], nodes["call_function"], tuple(output.args[0]))


def _around(program: Program, kind: str) -> Region:
    """The body of the prologue or of the epilogue of most segments."""
    regions, steady = Regions(program), program.rolled.classes[(kind, -1)].head
    for number, _, rule in regions.functions(kind):
        if number == steady:
            results = [rule.body.nodes[i] for i, _ in regions.results(kind, number)]
            parts = parts_of(rule, results)
            return Region(parts.inputs, parts.body, parts.outputs(results))
    return Region((), (), ())


# ---- what it costs -----------------------------------------------------------------------------------------


def _measured(work: Work, device: torch.device) -> LayerCosts | str:
    """What the work costs on a device, or why that cannot be told."""

    def timed(region: Region) -> float:
        if not region.nodes:
            return 0.0
        run = region.on(work.home, device)
        if device.type == "cuda":
            run()  # what is loaded at a first call cannot be recorded
        return seconds(run, device)

    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kinds = {name: timed(cell) for name, cell in work.kinds.items()}
            return LayerCosts(kinds, work.groups, timed(work.prologue), timed(work.epilogue))
    except Exception as error:  # an operation that takes the model's own values only, or no memory
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _agreed(work: Work, device: torch.device, group: Any) -> LayerCosts | str:
    """The mean of what all ranks have measured. What they have agreed on before is not measured again, so
    that a rank whose call has failed since then stays in step.

    Raises:
        RankError: a rank does not answer.
        UnsupportedError: a rank is about to run something else.
    """
    words = words_of(group)
    if work.digest not in words.agreed:
        mine = _measured(work, device)
        everyone = words.gathered("divide layers by what they cost", (work.digest, work.groups, mine))
        if len({digest for digest, *_ in everyone}) > 1:
            told = [f"{digest}, layers of {', '.join(groups)}" for digest, groups, _ in everyone]
            lines = [f"rank {rank}: {text}" for rank, text in enumerate(told)]
            words.differ("rmtcompile's program", lines)
        found = [costs for *_, costs in everyone]
        measured = [costs for costs in found if isinstance(costs, LayerCosts)]
        words.agreed[work.digest] = (
            _mean(measured) if len(measured) == len(found) else next(x for x in found if isinstance(x, str))
        )
    known: LayerCosts | str = words.agreed[work.digest]
    return known


def _mean(found: Sequence[LayerCosts]) -> LayerCosts:
    kinds = {name: fmean(one.kinds[name] for one in found) for name in found[0].kinds}
    ends = fmean(one.prologue for one in found), fmean(one.epilogue for one in found)
    return LayerCosts(kinds, found[0].groups, *ends)


__all__ = ["BY_COST", "BY_NUMBER", "divided"]
