"""Python source of values and operations, and a writer of indented lines."""

from __future__ import annotations

import operator
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rmtcompile.ir.program import Source
from rmtcompile.ir.size import KEPT
from rmtcompile.passes.cell.lift.growing import PerCell
from rmtcompile.schedule import short_type

_KEPT = re.compile(rf"\b{KEPT}\d*\b")


class Writer:
    """Lines of Python with indentation."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0

    def line(self, text: str = "") -> int:
        self.lines.append("    " * self.depth + text if text else "")
        return len(self.lines)

    def block(self, text: str) -> None:
        for line in text.splitlines():
            self.line(line)

    def function(self, name: str, params: list[str], doc: str) -> None:
        self.line()
        self.line()
        head = f"def {name}({', '.join(params)}):"
        if len(head) > 110:
            self.line(f"def {name}(")
            self.block(
                textwrap.fill(", ".join(params) + ",", 106, initial_indent="    ", subsequent_indent="    ")
            )
            self.line("):")
        else:
            self.line(head)
        self.depth += 1
        self.line(f'"""{doc}"""')

    def end(self) -> None:
        self.depth -= 1

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def literal(value: Any, name: Callable[[Any], str]) -> str:
    """Python source of an argument; `name` gives the source of nodes and integers."""
    if isinstance(value, (fx.Node, Named)) or type(value) is int:
        return name(value)
    if isinstance(value, (list, tuple)):
        items = ", ".join(literal(item, name) for item in value)
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {literal(v, name)}" for k, v in value.items()) + "}"
    if isinstance(value, float):
        return repr(value) if abs(value) != float("inf") and value == value else f'float("{value}")'
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, torch._ops.OpOverload):
        return target_name(value)
    if isinstance(value, PerCell):
        return value.text(lambda one: literal(one, name))
    if isinstance(value, slice):
        return f"slice({', '.join(literal(v, name) for v in (value.start, value.stop, value.step))})"
    return repr(value)


@dataclass(frozen=True)
class Named:
    """A value under a name that is no node."""

    text: str


def target_name(target: Any) -> str:
    """How an operation is called in the emitted module: `aten.linear`, `aten.add.Tensor`,
    `torch.ops.ns.op`."""
    if isinstance(target, torch._ops.OpOverload):
        overload = "" if target._overloadname == "default" else f".{target._overloadname}"
        space = "aten" if target.namespace == "aten" else f"torch.ops.{target.namespace}"
        return f"{space}.{target._opname}{overload}"
    return str(getattr(target, "__name__", target))


def operation(node: fx.Node, name: Callable[[Any], str]) -> str:
    """Right-hand side of one operation."""
    if node.target is operator.getitem:
        return f"{literal(node.args[0], name)}[{literal(node.args[1], name)}]"
    parts = [literal(arg, name) for arg in node.args]
    parts += [f"{k}={literal(v, name)}" for k, v in node.kwargs.items()]
    return call(node.target, parts)


def call(target: Any, parts: Sequence[str]) -> str:
    """An operation with its arguments. A slice that an integer of the model moves is no shorter elsewhere."""
    is_moved = target is torch.ops.aten.slice.Tensor and any(map(_KEPT.search, parts[2:4]))
    return f"{'within' if is_moved else target_name(target)}({', '.join(parts)})"


def comment(node: fx.Node, batched: bool = False) -> str:
    val = node.meta.get("val")
    kind = ""
    if isinstance(val, torch.Tensor):
        shape = node.meta.get("sizes", val.shape)
        sizes = ("n", *shape[1:]) if batched and val.dim() else shape
        kind = short_type(str(val.dtype), sizes)
    source = node.meta.get("source", "")
    return "  # " + "   ".join(part for part in (kind, source) if part) if kind or source else ""


def write_nodes(
    writer: Writer, nodes: list[fx.Node], name: Callable[[Any], str], batched: bool = False
) -> None:
    context: tuple[str, ...] = ()
    for node in nodes:
        wanted = tuple(node.meta.get("context", ()))
        if wanted != context:
            writer.depth -= len(context) > 0
            if wanted:
                writer.line(f"with {', '.join(wanted)}:")
                writer.depth += 1
            context = wanted
        text = f"{node.name} = {operation(node, name)}"
        writer.line(text + comment(node, batched))
    writer.depth -= len(context) > 0


def values(nodes: Sequence[fx.Node]) -> str:
    """`a, b,`: names of values, as a tuple without parentheses."""
    return "".join(f"{node.name}, " for node in nodes).strip()


def write_return(writer: Writer, nodes: Sequence[fx.Node]) -> None:
    writer.line(f"return ({values(nodes)})")


def plain_name(value: Any) -> str:
    return (
        value.name if isinstance(value, fx.Node) else value.text if isinstance(value, Named) else repr(value)
    )


def source_comment(node: fx.Node) -> str:
    source = node.meta.get("source", "")
    return f"  # {source}" if source else ""


def outside(source: Source) -> str:
    if source.kind == "leaf":
        return f"run.leaves[{source.name!r}]"
    if source.kind == "input":
        return f"run.inputs[{source.name!r}]"
    return f"run.init[{source.node!r}]"


def segment_of(source: Source, segment: str = "s") -> str:
    """The segment that a source lies in, for a reader at `segment`."""
    if not source.relative:
        return str(source.segment)
    return f"{segment} - {source.segment}" if source.segment else segment
