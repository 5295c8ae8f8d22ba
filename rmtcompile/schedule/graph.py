"""The cells as a graph: networkx, and Graphviz with proper escaping."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx as nx

    from rmtcompile.schedule.data import Schedule
    from rmtcompile.schedule.parts import Operation
    from rmtcompile.schedule.paths import Cell, Offset

_FILL = {"ramp-up": "#fde8c8", "steady": "#cfe9e5", "ramp-down": "#e2dcf3"}


def to_networkx(schedule: Schedule) -> nx.DiGraph[Cell]:
    """Cells and dependences, producer to consumer; see `Schedule.to_networkx`."""
    import networkx as nx

    carried = _carried(schedule)
    phases = schedule.phases
    graph: nx.DiGraph[Cell] = nx.DiGraph(n_layers=schedule.n_layers, n_segments=schedule.n_segments)
    for level, cells in enumerate(schedule.levels):
        phase = phases.of(level)
        for cell in cells:
            band = {"band": schedule.band_of(cell[1])} if schedule.bands else {}
            names = {"variant": schedule.variant_of(cell), "kind": schedule.kind_of(cell)}
            graph.add_node(cell, level=level, phase=phase, **names, **band)
    for before, after, offset in _edges(schedule):
        graph.add_edge(before, after, offset=offset, carries=carried.get((offset, before[1]), ()))
    return graph


def _carried(schedule: Schedule) -> dict[tuple[Offset, int], tuple[str, ...]]:
    """Names of the carries by offset and by the layer that writes them."""
    names: dict[tuple[Offset, int], tuple[str, ...]] = {}
    for carry in schedule.carries:
        for layer in carry.writers(schedule.n_layers):
            names[carry.offset, layer] = (*names.get((carry.offset, layer), ()), carry.name)
    return names


def _edges(schedule: Schedule) -> Iterator[tuple[Cell, Cell, Offset]]:
    for ds, dl in sorted(schedule.offsets):
        readers = set(schedule.readers((ds, dl)))
        for cells in schedule.levels:
            for s, layer in cells:
                if s >= ds and layer in readers:
                    yield (s - ds, layer - dl), (s, layer), (ds, dl)


def quoted(text: str) -> str:
    """A Graphviz string: quotes and backslashes escaped, line ends as `\\n`."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "")
    return f'"{escaped}"'


def _name(cell: Cell) -> str:
    return f"c_{cell[0]}_{cell[1]}"


def opened_cells(
    schedule: Schedule, expand: Iterable[Cell] | Mapping[Cell, Sequence[Operation]]
) -> Mapping[Cell, Sequence[Operation]]:
    """The cells to open with their operations; see `Schedule.to_dot`."""
    given = dict(expand) if isinstance(expand, Mapping) else {}
    opened: dict[Cell, Sequence[Operation]] = {}
    for cell in expand:
        if not (0 <= cell[0] < schedule.n_segments and 0 <= cell[1] < schedule.n_layers):
            size = f"{schedule.n_segments} segments x {schedule.n_layers} layers"
            raise ValueError(f"there is no cell (segment, layer) = {cell} in {size}")
        if cell in given:
            opened[cell] = given[cell]
        elif schedule.operations is not None:
            opened[cell] = schedule.operations(cell)
        else:
            raise ValueError(
                "this schedule belongs to no program, so its cells have no operations: "
                "take fast.schedule, or pass a mapping from cells to operations"
            )
    return opened


def to_dot(schedule: Schedule, expand: Iterable[Cell] | Mapping[Cell, Sequence[Operation]]) -> str:
    """Graphviz text: a box a cell, a rank a level, a cluster for each cell in `expand`."""
    expand = opened_cells(schedule, expand)
    phases = schedule.phases
    lines = [
        "digraph schedule {",
        f"  label={quoted(repr(schedule)[1:-1])};",
        "  rankdir=LR; compound=true; newrank=true; fontname=Helvetica;",
        "  node [shape=box, style=filled, fontname=Helvetica, fontsize=10];",
        "  edge [color=gray40, arrowsize=0.6, fontname=Helvetica, fontsize=8];",
    ]
    for level, cells in enumerate(schedule.levels):
        fill = _FILL[phases.of(level)]
        for cell in cells:
            if expand.get(cell):
                lines += _cluster(cell, expand[cell], fill)
            else:
                lines.append(_box(schedule, cell, level, fill))
        if not any(expand.get(cell) for cell in cells):
            lines.append(f"  {{ rank=same; {' '.join(_name(cell) + ';' for cell in cells)} }}")
    carried = _carried(schedule)
    lines += [_edge(before, after, offset, carried, expand) for before, after, offset in _edges(schedule)]
    return "\n".join([*lines, "}", ""])


def _box(schedule: Schedule, cell: Cell, level: int, fill: str) -> str:
    label = f"({cell[0]},{cell[1]})\nlevel {level}"
    tip = f"segment {cell[0]}, layer {cell[1]}, {schedule.variant_of(cell)} {schedule.kind_of(cell)}"
    return f"  {_name(cell)} [label={quoted(label)}, tooltip={quoted(tip)}, fillcolor={quoted(fill)}];"


def _cluster(cell: Cell, operations: Sequence[Operation], fill: str) -> list[str]:
    index = {operation.name: i for i, operation in enumerate(operations)}
    node = _name(cell)
    lines = [
        f"  subgraph cluster_{node} {{",
        f"    label={quoted(f'({cell[0]},{cell[1]})')}; style=filled; color={quoted(fill)};",
    ]
    for i, operation in enumerate(operations):
        text = f"{operation.name}\n{operation.op}" if operation.op != operation.name else operation.name
        lines.append(f"    {node}_{i} [label={quoted(text)}, fillcolor=white];")
    for i, operation in enumerate(operations):
        lines += [f"    {node}_{index[name]} -> {node}_{i};" for name in operation.inputs if name in index]
    return [*lines, "  }"]


def _edge(
    before: Cell,
    after: Cell,
    offset: Offset,
    carried: Mapping[tuple[Offset, int], Sequence[str]],
    expand: Mapping[Cell, Sequence[Operation]],
) -> str:
    source, target, attributes = _name(before), _name(after), []
    if expand.get(before):
        attributes.append(f"ltail=cluster_{source}")
        source = f"{source}_{len(expand[before]) - 1}"
    if expand.get(after):
        attributes.append(f"lhead=cluster_{target}")
        target = f"{target}_0"
    names = carried.get((offset, before[1]))
    if names:
        attributes += ["style=bold", f"tooltip={quoted(', '.join(names))}"]
    elif offset[0] > 0:
        attributes.append("style=bold")
    return f"  {source} -> {target} [{', '.join(attributes)}];" if attributes else f"  {source} -> {target};"
