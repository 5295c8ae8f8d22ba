"""Enter and leave: the code that runs a segment's prologue and epilogue.

    enter_parts(run, s)    views of the inputs that depend on s: no work for the device
    enter(run, s)          the prologue's body on them; what others read is kept
    enter_rest(run, s)     what reads sizes or lists over all segments: joins of results, mostly

`enter` alone is what a recorded block of levels holds: nothing in it depends on s or S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from rmtcompile.passes.emit.bodies import COUNT, SEGMENT, Parts, parts_of, write_operations
from rmtcompile.passes.emit.counted import inner
from rmtcompile.passes.emit.regions import Regions
from rmtcompile.passes.emit.text import Writer, values
from rmtcompile.passes.grid.partition import EPILOGUE, PROLOGUE
from rmtcompile.passes.grid.reroll import ClassRule


@dataclass(frozen=True)
class Case:
    """What a region does for one class of segments.

    Attributes:
        test: the condition under which segment s is of this class; the last case needs none.
        function: name of the body's function.
        results: (value, tap) of what is kept.
    """

    test: str
    function: str
    rule: ClassRule
    parts: Parts
    results: tuple[tuple[fx.Node, str], ...]

    @property
    def handed(self) -> tuple[fx.Node, ...]:
        """Values of the body that the operations after it read."""
        read = set(self.parts.rest_inputs)
        return tuple(node for node in self.parts.body if node in read)

    def kept(self, after: bool) -> list[tuple[fx.Node, str]]:
        """The results that are made before or in the body, or after it."""
        late = set(self.parts.after)
        return [(node, tap) for node, tap in self.results if (node in late) == after]


class Calls:
    """Prints `enter` or `leave`.

    Args:
        name: "enter" or "leave".
    """

    def __init__(self, regions: Regions, name: str) -> None:
        self.regions = regions
        self.name = name
        self.kind, self.doc = {
            "enter": (PROLOGUE, "Segment s enters: its prologue."),
            "leave": (EPILOGUE, "Segment s leaves the last layer: its epilogue."),
        }[name]
        self.cases = self._cases()
        known = regions.program.segmented, regions.inner_init
        self._inner = {case.function: inner(case.rule, *known) for case in self.cases}

    def _cases(self) -> list[Case]:
        """The classes, those from the end first, then the first segments, then all others."""
        head = self.regions.rolled.classes[(self.kind, -1)].head
        found = sorted(self.regions.functions(self.kind), key=lambda case: (case[0] >= 0, case[0] >= head))
        cases = []
        for number, function, rule in found:
            results = [(rule.body.nodes[i], tap) for i, tap in self.regions.results(self.kind, number)]
            test = f"s == S - {-number}" if number < 0 else f"s == {number}"
            parts = parts_of(rule, [node for node, _ in results])
            cases.append(Case(test, function, rule, parts, tuple(results)))
        return cases

    @property
    def has_parts(self) -> bool:
        """Whether any class takes views that depend on the segment."""
        return any(case.parts.views for case in self.cases)

    @property
    def has_rest(self) -> bool:
        """Whether any class does something after its body."""
        return any(case.parts.after for case in self.cases)

    def write(self, writer: Writer) -> None:
        """The functions, as many as are needed."""
        if self.has_parts:
            doc = "What segment s reads of values that hold all segments."
            self._function(writer, f"{self.name}_parts", doc, self._parts, lambda case: case.parts.before)
        self._function(writer, self.name, self.doc, self._body)
        if self.has_rest:
            doc = "What depends on the number of segments, or reads all of them."
            self._function(writer, f"{self.name}_rest", doc, self._rest, lambda case: case.parts.after)

    def write_call(self, writer: Writer) -> None:
        """Code that runs them for segment s."""
        writer.line(f"{self.name}(run, s)")
        if self.has_rest:
            writer.line(f"run.rest({self.name}_rest, s)")

    def _function(
        self,
        writer: Writer,
        name: str,
        doc: str,
        body: Callable[[Writer, Case], None],
        nodes: Callable[[Case], tuple[fx.Node, ...]] = lambda _: (),
    ) -> None:
        """One function; `nodes` are the operations of a case that it shows."""
        writer.function(name, ["run", "s"], doc)
        writer.line("S = run.segments")
        if any(self._counts(case, nodes(case)) for case in self.cases):
            writer.line(f"{SEGMENT}, {COUNT} = s - run.first, S - run.first")
        for i, case in enumerate(self.cases):
            if len(self.cases) > 1:
                is_last = i == len(self.cases) - 1
                writer.line("else:" if is_last else ("if " if not i else "elif ") + case.test + ":")
                writer.depth += 1
            before = len(writer.lines)
            body(writer, case)
            if len(writer.lines) == before:
                writer.line("pass")
            writer.depth -= len(self.cases) > 1
        writer.end()

    def _counts(self, case: Case, nodes: tuple[fx.Node, ...]) -> bool:
        """Whether an operation counts segments from the start of the input."""
        ints, found = case.rule.integers(), self._inner[case.function]
        return any(node in found and not all(a.is_constant for a in ints[node]) for node in nodes)

    def _names(self, case: Case) -> dict[object, str]:
        return dict(zip(case.rule.body.live_ins, self.regions.arguments(case.rule), strict=True))

    def _parts(self, writer: Writer, case: Case) -> None:
        self._operations(writer, case.parts.before, case)
        writer.line(f"return ({values(case.parts.views)})")

    def _operations(self, writer: Writer, nodes: tuple[fx.Node, ...], case: Case) -> None:
        write_operations(writer, nodes, case.rule, self._names(case), self._inner[case.function])

    def _take_parts(self, writer: Writer, case: Case, nodes: set[fx.Node]) -> None:
        if nodes.intersection(case.parts.views):
            writer.line(f"{values(case.parts.views)} = run.parts({self.name}_parts, s)")

    def _body(self, writer: Writer, case: Case) -> None:
        parts, names, kept = case.parts, self._names(case), case.kept(after=False)
        self._take_parts(writer, case, {*parts.inputs, *(node for node, _ in kept)})
        made = parts.outputs([node for node, _ in case.results])
        if made:
            given = ", ".join(names.get(node, node.name) for node in parts.inputs)
            call = f"run.region({case.function}, {given})" if parts.compiled else f"{case.function}({given})"
            writer.line(f"{values(made)} = {call}")
        if kept:
            taps = [tap for _, tap in kept]
            writer.line(f"run.keep({taps!r}, s, ({values([node for node, _ in kept])}))")
        if case.handed:
            writer.line(f"run.hand({self.name!r}, s, ({values(case.handed)}))")

    def _rest(self, writer: Writer, case: Case) -> None:
        parts, kept = case.parts, case.kept(after=True)
        if not parts.after:
            return
        self._take_parts(writer, case, set(parts.rest_inputs))
        if case.handed:
            writer.line(f"{values(case.handed)} = run.handed({self.name!r}, s)")
        self._operations(writer, parts.after, case)
        if kept:
            taps = [tap for _, tap in kept]
            writer.line(f"run.keep({taps!r}, s, ({values([node for node, _ in kept])}))")


__all__ = ["Calls", "Case"]
