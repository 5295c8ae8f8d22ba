"""Sizes: programs of one forward that differ in integers only become one program for any sizes.

    B = 2:  reshape(v0, [-1, 6, 4])              reshape(v0, [-1, 3 * B, 4])
    B = 3:  reshape(v0, [-1, 9, 4])      ->

    B = 2, R = 1:  reshape(v0, [-1, 2, 4])
    B = 2, R = 3:  reshape(v0, [-1, 6, 4])       reshape(v0, [-1, B * R, 4])
    B = 3, R = 1:  reshape(v0, [-1, 3, 4])  ->
    B = 3, R = 3:  reshape(v0, [-1, 9, 4])

The programs are walked side by side. Operations, edges, constants, lanes, taps, results and what is left
behind have to be the same; integers that differ are fitted as multilinear functions of the free sizes, with
integer coefficients. One free size needs two programs, two need the four corners of a rectangle, so that a
product of both is told from a sum. Integers that the model keeps from call to call (a position, say) come as
they come, in no rectangle: these only enter in sums. Integers that count dims or name types are no sizes:
they may not differ.

Requires: programs compiled by the same passes, under the same state of the model.  Ensures: at the sizes of
each given program the result prints the same operations. For other sizes nothing is proved here; whoever uses
it there checks (`rmtcompile/dispatch/families.py`).
Reference: anti-unification; the coefficients are finite differences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from rmtcompile.binding.captured import Leaf
from rmtcompile.ir.program import Affine, Body, Lane, Program
from rmtcompile.ir.size import Size
from rmtcompile.passes.cell.lift import cell_by_cell, vmapped
from rmtcompile.passes.emit import CellFunction, Sized
from rmtcompile.passes.grid.partition import CELL
from rmtcompile.passes.grid.reroll import ClassRule, Rolled

Sizes = Mapping[str, int]


class SizesDiffer(Exception):
    """The programs differ in more than integers that follow from the sizes; the message says where."""


@dataclass(frozen=True)
class Sample:
    """One compiled program, and the free sizes that it was compiled for.

    Attributes:
        extras: further values that have to agree up to integers: results, what is left behind.
        names: further values that have to be equal.
    """

    sizes: Sizes
    program: Program
    cells: tuple[CellFunction, ...]
    leaves: Mapping[str, Leaf]
    extras: Any = ()
    names: Any = ()


@dataclass(frozen=True)
class Unified:
    """The program of all samples: as the first one, with `Size`s for the integers that differ."""

    program: Program
    sized: Sized
    extras: Any


def unify(samples: Sequence[Sample], exact: bool = True, counts: Collection[str] = ()) -> Unified:
    """Make one program of several; see the module docstring.

    Args:
        counts: the free sizes that only enter in sums.
        exact: False only checks that nothing but integers differs; the sizes are not read.

    Raises:
        SizesDiffer: the first place where they differ in another way.
    """
    first, walk = samples[0], _Walk([sample.sizes for sample in samples], exact, counts)
    programs = [sample.program for sample in samples]
    _equal([sample.names for sample in samples], "what is left behind")
    _equal([_outline(program) for program in programs], "the shape of the schedule")
    _check_leaves([sample.leaves for sample in samples])
    rolled, shapes = _regions(walk, [program.rolled for program in programs])
    lanes = tuple(
        replace(same[0], shape=walk.value([lane.shape for lane in same], f"lane {same[0].name}"))
        for same in zip(*(program.lanes for program in programs), strict=True)
    )
    ports = [(group.name, port) for group in first.program.groups for port in group.ports]
    lasting = {(group, port.name) for group, port in ports if port.role in ("lane", "weight", "rows")}
    cells = tuple(
        _cell(walk, same, lasting) for same in _rows([s.cells for s in samples], "the cell functions")
    )
    extras = walk.value([sample.extras for sample in samples], "the result")
    program = replace(first.program, lanes=lanes, rolled=rolled)
    return Unified(program, Sized(dict(first.sizes), cells, shapes), extras)


def at(value: Any, sizes: Sizes) -> Any:
    """A value of a unified program (lanes, results) with its integers at given sizes."""
    if isinstance(value, Size):
        return value.at(sizes)
    if isinstance(value, (list, tuple)):
        return type(value)(at(item, sizes) for item in value)
    if isinstance(value, dict):
        return {key: at(item, sizes) for key, item in value.items()}
    if _is_plain(value):
        return replace(value, **{f.name: at(getattr(value, f.name), sizes) for f in fields(value) if f.init})
    return value


def _is_plain(value: Any) -> bool:
    """Whether a value is a dataclass of this package: rules of results, lanes."""
    ours = type(value).__module__.startswith("rmtcompile")
    return ours and is_dataclass(value) and not isinstance(value, type)


# ---- integers ----------------------------------------------------------------------------------------------


class _Fit:
    """Multilinear functions of the sizes through the values at the samples, sums in `counts`."""

    def __init__(self, points: Sequence[Sizes], counts: Collection[str] = ()) -> None:
        names = sorted(set(points[0]) - set(counts))
        self.points = points
        self.products = [c for k in range(len(names) + 1) for c in itertools.combinations(names, k)]
        self.products += [(name,) for name in sorted(counts)]
        self.rows = [[Fraction(math.prod(p[n] for n in c)) for c in self.products] for p in points]

    def __call__(self, values: Sequence[int], where: str) -> int:
        """The integer itself if it is the same everywhere, else a `Size`."""
        if all(value == values[0] for value in values):
            return int(values[0])
        factors = _solve([[*row, Fraction(v)] for row, v in zip(self.rows, values, strict=True)])
        if factors is None or any(factor.denominator != 1 for factor in factors):
            shown = ", ".join(f"{value} at {dict(p)}" for value, p in zip(values, self.points, strict=True))
            raise SizesDiffer(f"{where}: an integer does not follow from the sizes: {shown}")
        terms = [(c, int(factor)) for c, factor in zip(self.products, factors, strict=True) if factor]
        return Size(values[0], tuple(sorted(terms, key=lambda term: (-len(term[0]), term[0]))))


def _solve(rows: list[list[Fraction]]) -> list[Fraction] | None:
    """The solution of a linear system with its right-hand side as last column; None unless there is exactly
    one."""
    width = len(rows[0]) - 1
    for column in range(width):
        pivot = next((i for i in range(column, len(rows)) if rows[i][column]), None)
        if pivot is None:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [x / rows[column][column] for x in rows[column]]
        for i, row in enumerate(rows):
            if i != column and row[column]:
                rows[i] = [x - row[column] * y for x, y in zip(row, rows[column], strict=True)]
    return [row[-1] for row in rows[:width]] if not any(row[-1] for row in rows[width:]) else None


class _Walk:
    """Walks equal structures side by side; `twins` says which nodes of the samples stand for each other."""

    def __init__(self, points: Sequence[Sizes], exact: bool, counts: Collection[str]) -> None:
        self.fit = _Fit(points, counts) if exact else lambda values, where: int(values[0])
        self.twins: list[dict[fx.Node, fx.Node]] = [{} for _ in points]  # node of the sample -> merged node

    def value(self, values: Sequence[Any], where: str, free: bool = True) -> Any:
        """One value for all samples; `free` lets integers differ."""
        first = values[0]
        other = next((value for value in values if type(value) is not type(first)), first)
        if other is not first:
            raise SizesDiffer(f"{where}: {first!r} against {other!r}")
        if type(first) is int:
            return self.fit(values, where) if free else _equal(values, where)
        if isinstance(first, fx.Node):
            found = [twins.get(node) for twins, node in zip(self.twins, values, strict=True)]
            if any(node is None or node is not found[0] for node in found):
                raise SizesDiffer(f"{where}: it reads {first.format_node()} or something else")
            return found[0]
        if isinstance(first, (list, tuple)):
            return type(first)(self.value(row, where, free) for row in _rows(values, where))
        if isinstance(first, dict):
            _equal([list(value) for value in values], where)
            return {key: self.value([value[key] for value in values], where, free) for key in first}
        if isinstance(first, slice):
            ends = [(value.start, value.stop, value.step) for value in values]
            return slice(*self.value(ends, where, free))
        if _is_plain(first):
            merged = {
                f.name: self.value([getattr(value, f.name) for value in values], where, free)
                for f in fields(first)
                if f.init
            }
            return replace(first, **merged)
        return _equal(values, where)

    def arguments(self, nodes: Sequence[fx.Node]) -> tuple[Any, dict[str, Any]]:
        """Arguments of one operation for all samples."""
        first = nodes[0]
        where = f"{first.format_node()}   {first.meta.get('source', '')}"
        _equal([node.target for node in nodes], where)
        _equal([tuple(node.kwargs) for node in nodes], where)
        args = [
            self.value(row, where, free)
            for row, free in zip(_rows([n.args for n in nodes], where), _free(first), strict=True)
        ]
        kwargs = {
            key: self.value([node.kwargs[key] for node in nodes], where, _is_size(first.target, key))
            for key in first.kwargs
        }
        return tuple(args), kwargs

    def shape(self, nodes: Sequence[fx.Node]) -> tuple[int, ...] | None:
        """Shape of a tensor for all samples, if it depends on the sizes."""
        found, where = [node.meta.get("val") for node in nodes], nodes[0].name
        vals = [val for val in found if isinstance(val, torch.Tensor)]
        if len(vals) < len(found):
            return None
        _equal([(val.dtype, val.device, val.dim()) for val in vals], where)
        shape = self.value([tuple(map(int, val.shape)) for val in vals], where)
        return shape if any(isinstance(n, Size) for n in shape) else None


def _free(node: fx.Node) -> list[bool]:
    """Which positional arguments may hold sizes."""
    if node.target in (vmapped, cell_by_cell):  # (operation, dims, arguments, keyword arguments)
        return [False, False, True, True]
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    return [_is_size(node.target, name) for name in names[: len(node.args)]] or [False] * len(node.args)


def _is_size(target: Any, name: str) -> bool:
    """Whether an argument takes sizes or numbers, and no dims, types or options."""
    schema = getattr(target, "_schema", None)
    argument = next((a for a in schema.arguments if a.name == name), None) if schema is not None else None
    kind = argument.real_type if argument is not None else None
    while kind is not None and kind.kind() in ("OptionalType", "ListType"):
        kind = kind.getElementType()
    return kind is not None and kind.kind() in ("SymIntType", "NumberType", "TensorType")


def _rows(columns: Sequence[Any], where: str) -> Iterator[tuple[Any, ...]]:
    _equal([len(column) for column in columns], f"{where}: number of values")
    return zip(*columns, strict=True)


def _equal(values: Sequence[Any], where: str) -> Any:
    """The one value; floats by their bits, so that nan equals itself."""
    first = values[0]
    for other in values[1:]:
        same = other is first or (repr(other) == repr(first) if isinstance(first, float) else other == first)
        if not same:
            raise SizesDiffer(f"{where}: {first!r} against {other!r}")
    return first


# ---- programs ----------------------------------------------------------------------------------------------


def _outline(program: Program) -> str:
    """All of a program but shapes, operations and integers of regions, as text."""
    lanes = [replace(lane, shape=()) for lane in program.lanes]
    groups = [(g.name, g.layers, g.classes, g.ports, g.outputs) for g in program.groups]
    rolled = program.rolled
    regions = {key: by_class for key, by_class in rolled.rules.items() if key[0] != CELL}
    rules = [(key, c, rule.sources) for key, by_class in regions.items() for c, rule in by_class.items()]
    schedule = (program.n_layers, program.alpha, sorted(program.offsets), rolled.minimum, rolled.fixed)
    return repr((schedule, groups, lanes, program.taps, rolled.classes, rules, rolled.outputs))


def _check_leaves(all_leaves: Sequence[Mapping[str, Leaf]]) -> None:
    """Tensors that the programs read are the model's own, or equal constants."""
    first = all_leaves[0]
    for leaves in all_leaves[1:]:
        _equal([set(first), set(leaves)], "the tensors that are read")
        for name, leaf in leaves.items():
            mine = first[name]
            if leaf.is_constant != mine.is_constant:
                raise SizesDiffer(f"{name}: a constant or not")
            if leaf.is_constant and leaf.tensor is not mine.tensor:
                if leaf.tensor.shape != mine.tensor.shape or not torch.equal(leaf.tensor, mine.tensor):
                    raise SizesDiffer(f"{name}: a constant that changes with the sizes")


def _cell(
    walk: _Walk, cells: Sequence[CellFunction], lasting: Collection[tuple[str, str]]
) -> CellFunction:
    """One cell function for all samples; `lasting` are the (group, placeholder)s whose shapes no number of
    segments changes."""
    first = cells[0]
    _equal([(cell.name, cell.group, cell.classes) for cell in cells], "the cell functions")
    graph = fx.Graph()
    for nodes in _rows([list(cell.graph.nodes) for cell in cells], first.name):
        node = nodes[0]
        _equal([n.op for n in nodes], first.name)
        _equal([n.meta.get("context", ()) for n in nodes], node.name)
        if node.op == "placeholder":
            _equal([n.name for n in nodes], first.name)
            merged = graph.placeholder(node.name)
        elif node.op == "output":
            graph.output(walk.value([n.args[0] for n in nodes], first.name, free=False))
            continue
        else:
            args, kwargs = walk.arguments(nodes)
            merged = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        merged.meta = dict(node.meta)
        if (shape := walk.shape(nodes)) is not None:
            outside = node.op == "placeholder" and (first.group, node.name) not in lasting
            merged.meta["sizes"] = _unsolvable(shape, range(len(shape))) if outside else shape
        for twins, twin in zip(walk.twins, nodes, strict=True):
            twins[twin] = merged
    return replace(first, graph=graph)


def _regions(walk: _Walk, rolled: Sequence[Rolled]) -> tuple[Rolled, dict[fx.Node, tuple[int, ...]]]:
    """Rules of init, prologues and epilogues, and the shapes in them that depend on sizes."""
    first, rules = rolled[0], dict(rolled[0].rules)
    shapes: dict[fx.Node, tuple[int, ...]] = {}
    for key in first.rules:
        if key[0] != CELL:
            same = {number: [r.rules[key][number] for r in rolled] for number in first.rules[key]}
            rules[key] = {number: _rule(walk, found, shapes) for number, found in same.items()}
    return replace(first, rules=rules), shapes


def _rule(walk: _Walk, rules: Sequence[ClassRule], shapes: dict[fx.Node, tuple[int, ...]]) -> ClassRule:
    first = rules[0].body
    _same_body([rule.body for rule in rules])
    nodes = [(*(n for n in rule.body.live_ins if isinstance(n, fx.Node)), *rule.body.nodes) for rule in rules]
    for same in _rows(nodes, "a region"):
        if (shape := walk.shape(same)) is not None:
            shapes[same[0]] = _unsolvable(shape, rules[0].varying.get(same[0], ()))
    free = [flag for node in first.nodes for flag in _free_integers(node)]
    ints = tuple(
        Affine(*(walk.value(part, "a region", is_free) for part in zip(*map(_parts, same), strict=True)))
        for same, is_free in zip(zip(*(rule.ints for rule in rules), strict=True), free, strict=True)
    )
    return replace(rules[0], ints=ints)


def _unsolvable(shape: tuple[int, ...], dims: Collection[int]) -> tuple[int, ...]:
    """A shape whose dims among `dims` depend on the segment too, so that no size can be read from them."""
    return tuple(
        Size(n, (*n.terms, (("s",), 1))) if i in dims and isinstance(n, Size) else n
        for i, n in enumerate(shape)
    )


def _parts(affine: Affine) -> tuple[int, int, int]:
    return (affine.const, affine.by_segment, affine.by_count)


def _same_body(bodies: Sequence[Body]) -> None:
    for body in bodies[1:]:
        for mine, theirs, x, y in zip(bodies[0].key, body.key, bodies[0].nodes, body.nodes, strict=False):
            if mine != theirs:
                raise SizesDiffer(f"{x.format_node()} against {y.format_node()}   {y.meta.get('source', '')}")
        if len(body.key) != len(bodies[0].key) or len(body.live_ins) != len(bodies[0].live_ins):
            raise SizesDiffer("a region has more operations at other sizes")


def _free_integers(node: fx.Node) -> Iterator[bool]:
    """For each integer among an operation's arguments, in order, whether it may be a size."""

    def count(value: Any) -> int:
        if isinstance(value, (list, tuple)):
            return sum(map(count, value))
        if isinstance(value, dict):
            return sum(map(count, value.values()))
        return int(type(value) is int)

    for value, free in zip(node.args, _free(node), strict=True):
        yield from itertools.repeat(free, count(value))
    for key, value in node.kwargs.items():
        yield from itertools.repeat(_is_size(node.target, key), count(value))


__all__ = ["Lane", "Sample", "SizesDiffer", "Unified", "at", "unify"]
