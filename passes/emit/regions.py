"""Init, prologue and epilogue: their functions, what they read, and what is filled into lanes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from rmtcompile.ir.program import Each, LaneEntry, Program, Source
from rmtcompile.passes.emit.bodies import COUNT, parts_of, write_operations
from rmtcompile.passes.emit.counted import inner_places
from rmtcompile.passes.emit.sizes import Opening, Shape, opening
from rmtcompile.passes.emit.text import Writer, outside, segment_of, write_return
from rmtcompile.passes.grid.if_conversion import class_name
from rmtcompile.passes.grid.partition import EPILOGUE, INIT, PROLOGUE
from rmtcompile.passes.grid.reroll import ClassRule


class Regions:
    """Functions for the regions that are not cells, and the code that calls them."""

    def __init__(self, program: Program, shapes: Mapping[fx.Node, Shape] | None = None) -> None:
        self.program = program
        self.shapes = shapes or {}
        self.openings: dict[str, Opening] = {}
        self.rolled = program.rolled
        self.init_nodes = sorted(self._init_reads())
        self.inner_init = inner_places(self.rolled.rules[(INIT, -1)][0], program.segmented)
        self.taps = {(t.value.kind, t.value.layer, t.value.nodes): t for t in program.taps}

    def _sources(self) -> Iterator[Source]:
        """What cells, prologues, epilogues and the caller read from outside."""
        for (kind, _), by_class in self.rolled.rules.items():
            if kind in (PROLOGUE, EPILOGUE):
                for rule in by_class.values():
                    for live_in in rule.sources:
                        read = (*live_in.early.values(), live_in.steady)
                        yield from (source for source in read if isinstance(source, Source))
        for group in self.program.groups:
            for port in group.ports:
                yield from port.sources
        for lane in self.program.lanes:
            for entry in lane.entries:
                yield from entry.sources
        yield from (source for source in self.rolled.outputs if isinstance(source, Source))

    def _init_reads(self) -> set[int]:
        return {source.node for source in self._sources() if source.kind == INIT}

    def tap_name(self, source: Source | Each) -> str:
        nodes = dict(source.nodes)
        for (kind, layer, known), tap in self.taps.items():
            if (kind, layer) == (source.kind, source.layer) and all(
                dict(known).get(c) == i for c, i in nodes.items()
            ):
                return tap.name
        raise AssertionError(f"no tap for {source}")

    def expression(self, source: Source, segment: str = "s") -> str:
        """Source of a value, read from the run, for a reader at `segment`."""
        if source.kind in ("leaf", "input", INIT):
            return outside(source)
        return f"run.taps[{self.tap_name(source)!r}][{segment_of(source, segment)}]"

    def _given(self, source: Source) -> str:
        """The condition under which segment s finds the source's value; empty if it always does. Classes of
        segments that do not read it may come before it is made."""
        if source.kind in ("leaf", "input", INIT):
            return ""
        there = f"{segment_of(source)} in run.taps[{self.tap_name(source)!r}]"
        if not source.relative:
            return f"s > {source.segment} or {there}"
        if not set(dict(source.nodes)) >= set(self.rolled.rules[(source.kind, source.layer)]):
            return there
        return f"s >= {source.segment}" if source.segment else ""

    def write_cases(
        self,
        writer: Writer,
        early: tuple[tuple[int, Source], ...],
        steady: Source | None,
        names: list[str],
        place: str,
    ) -> None:
        """Fill `place` of the lanes `names` with what segment s reads there."""
        cases = [(f"s == {segment}", source) for segment, source in early]
        cases += [(self._given(steady), steady)] if steady is not None else []
        for i, (test, source) in enumerate(cases):
            if test:
                writer.line(("if " if not i else "elif ") + test + ":")
            elif i:
                writer.line("else:")
            for name in names:
                text = f"run.lanes[{name!r}].fill({place}, {self.expression(source)})"
                writer.line("    " * bool(test or i) + text)

    def functions(self, kind: str) -> list[tuple[int, str, ClassRule]]:
        classes = self.rolled.classes[(kind, -1)]
        found = []
        for number, rule in sorted(self.rolled.rules[(kind, -1)].items()):
            suffix = "" if number == classes.head else "_" + class_name(number)
            found.append((number, kind + suffix, rule))
        return found

    def write_functions(self, writer: Writer) -> None:
        self._init(writer)
        for kind, doc in (
            (PROLOGUE, "What happens to a segment before layer 0."),
            (EPILOGUE, "What follows the last layer."),
        ):
            for number, name, rule in self.functions(kind):
                nodes = [rule.body.nodes[i] for i, _ in self.results(kind, number)]
                self._function(writer, name, rule, nodes, doc)

    def results(self, kind: str, number: int) -> list[tuple[int, str]]:
        """(operation index, tap name) of what a region's function returns in one class."""
        found = []
        for tap in self.program.taps:
            index = dict(tap.value.nodes).get(number)
            if tap.value.kind == kind and index is not None:
                found.append((index, tap.name))
        return found

    def _function(self, writer: Writer, name: str, rule: ClassRule, results: list[fx.Node], doc: str) -> None:
        """The function of a region's body."""
        parts = parts_of(rule, results)
        if not parts.body:
            return
        ints = rule.integers()
        shapes = [(node.name, self.shapes.get(node, ())) for node in parts.inputs]
        if (found := opening(shapes, [ints[node] for node in parts.body])) is not None and parts.compiled:
            self.openings[name] = found
        writer.function(name, [node.name for node in parts.inputs], doc)
        for line in self.openings[name].lines if name in self.openings else ():
            writer.line(line)
        write_operations(writer, parts.body, rule, {})
        write_return(writer, parts.outputs(results))
        writer.end()

    def _init(self, writer: Writer) -> None:
        rule = self.rolled.rules[(INIT, -1)][0]
        results = [rule.body.nodes[i] for i in self.init_nodes]
        names = {live_in: f"x{j}" for j, live_in in enumerate(rule.body.live_ins)}
        counted = {rule.body.nodes[i] for i in self.inner_init}
        sizes = ["S", COUNT] if counted else ["S"]
        writer.function("init", [*sizes, *names.values()], "What is the same for all segments.")
        write_operations(writer, parts_of(rule, results, whole=True).body, rule, names, counted)
        write_return(writer, results)
        writer.end()

    def arguments(self, rule: ClassRule) -> list[str]:
        found = []
        for live_in, node in zip(rule.sources, rule.body.live_ins, strict=True):
            if isinstance(live_in.steady, Each):
                each = live_in.steady
                own = isinstance(node, tuple) and node[-1] in rule.body.nodes
                back = max(each.back, 1) if own else each.back
                last = f"s - {back}" if back else "s"
                found.append(f"run.taps[{self.tap_name(each)!r}].between({each.first}, {last})")
                continue
            assert live_in.steady is not None
            text = self.expression(live_in.steady)
            for segment, source in sorted(live_in.early.items(), reverse=True):
                text = f"{self.expression(source)} if s == {segment} else {text}"
            found.append(text)
        return found

    def write_fill(self, writer: Writer) -> None:
        writer.function("fill", ["run", "t"], "What the cells of level t read that no cell has written.")
        writer.line("S = run.segments")
        entries: dict[Any, list[tuple[str, LaneEntry]]] = {}
        for lane in self.program.lanes:
            for entry in lane.entries:
                entries.setdefault((lane.classes, entry.key), []).append((lane.name, entry))
        for (classes, _), found in entries.items():
            early, steady = found[0][1].early, found[0][1].steady
            places = [(name, entry.layer) for name, entry in found]
            by_layers: dict[tuple[int, ...], list[str]] = {}
            for name in dict.fromkeys(name for name, _ in places):
                by_layers.setdefault(tuple(layer for n, layer in places if n == name), []).append(name)
            for layers, names in by_layers.items():
                self._write_entry(writer, classes, early, steady, layers, names)
        if not entries:
            writer.line("pass")
        writer.end()

    def _write_entry(
        self,
        writer: Writer,
        classes: Any,
        early: Any,
        steady: Source | None,
        layers: tuple[int, ...],
        names: list[str],
    ) -> None:
        only = "" if classes is None else f", classes={classes!r}"
        only += f", last={max(s for s, _ in early)}" if steady is None else ""
        writer.line(f"for s, layer in run.alive(t, {list(layers)!r}{only}):")
        writer.depth += 1
        self.write_cases(writer, early, steady, names, "layer")
        writer.depth -= 1

    def write_setup(self, writer: Writer) -> None:
        writer.function("setup", ["run"], "What is the same for all segments, and what is stacked by layer.")
        rule = self.rolled.rules[(INIT, -1)][0]
        lines = []
        if self.init_nodes:
            given = "".join(f", {argument}" for argument in self.arguments(rule))
            sizes = "run.segments, run.segments - run.first" if self.inner_init else "run.segments"
            lines.append(f"run.set_init({self.init_nodes!r}, init({sizes}{given}))")
        for group in self.program.groups:
            for port in group.ports:
                if port.role == "stacked":
                    parts = ", ".join(outside(source) for source in port.source)
                    lines.append(f"run.stacked[{group.name + '.' + port.name!r}] = torch.stack([{parts}])")
                elif port.role == "rows":
                    rows = f"run.leaves[{port.source.leaf!r}]{port.source.index}"
                    lines.append(f"run.stacked[{group.name + '.' + port.name!r}] = {rows}")
        writer.block("\n".join(lines or ["pass"]))
        writer.end()

    def write_outputs(self, writer: Writer) -> None:
        writer.function("outputs", ["run"], "What the forward returns and leaves behind.")
        writer.line("S = run.segments")
        writer.line("return (")
        for source in self.rolled.outputs:
            if isinstance(source, Each):
                text = f"run.taps[{self.tap_name(source)!r}].between({source.first}, S - 1 - {source.back})"
                writer.line(f"    {text},")
            else:
                writer.line(f"    {self.expression(source, 'S - 1')},")
        writer.line(")")
        writer.end()
