"""What the schema of an operation says about a node: its arguments, what it writes, what it views."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

# fmt: off
# Composite operations whose schema does not say that the result may be a view of an argument.
UNDECLARED = {
    "type_as", "einsum", "broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d",
    "sum_to_size", "data", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout",
    "conj_physical",
}
RESHAPES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
    "reshape_as", "_reshape_alias", "ravel",
}
PERMUTES = {"permute", "transpose", "t", "numpy_T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis"}
# fmt: on
_POINTWISE = {"where", "masked_fill", "isclose", "hardswish", "floor_divide", "rsub", "log_sigmoid"}
"""Operations that treat each element by itself and are not tagged so."""
_PYTHON_WRITES = {operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul}


def overload_name(node: fx.Node) -> str:
    """`aten.select.int` → "select"; "" for anything that is not an operator overload."""
    return _name(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""


@cache
def _name(target: torch._ops.OpOverload) -> str:
    return str(target._schema.name.split("::")[1])


def is_pointwise(node: fx.Node) -> bool:
    """Whether an operation treats each element by itself, after broadcasting."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or overload_name(node) in _POINTWISE


def grad_mode(node: fx.Node, before: bool | None) -> bool | None:
    """Whether gradients are recorded at a node: what its context says, or the last marker before it; None if
    neither is there."""
    if node.target is torch._C._set_grad_enabled:
        return bool(node.args[0])
    return "torch.no_grad()" not in node.meta["context"] if "context" in node.meta else before


def is_mutating(node: fx.Node) -> bool:
    """Whether a call writes into an argument."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    return node.target in _PYTHON_WRITES or (
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    )


def is_removable(node: fx.Node) -> bool:
    """Whether a node without users may be deleted: it only computes (no marker)."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") in (
            "_operator",
            "math",
            "torch.fx.experimental.symbolic_shapes",
        )
    schema = target._schema
    return not (
        schema.is_mutable
        or not schema.returns
        or "assert" in schema.name
        or schema.name.startswith("aten::sym_con")
    )


def remove_dead(graph: fx.Graph) -> int:
    """Deletes computation that nothing uses; gives the number of nodes deleted."""
    dead = [node for node in reversed(graph.nodes) if not node.users and is_removable(node)]
    count = 0
    while dead:
        node = dead.pop()
        sources = node.all_input_nodes
        graph.erase_node(node)
        count += 1
        dead += [source for source in sources if not source.users and is_removable(source)]
    return count


def alias_root(node: fx.Node) -> fx.Node:
    """The node whose memory a node is a view of, as far as schemas tell; itself if it is no view."""
    while node.op == "call_function" and node.all_input_nodes:
        target = node.target
        if target is not operator.getitem:
            if not isinstance(target, torch._ops.OpOverload):
                break
            views = any(
                r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns
            )
            if not views and overload_name(node) not in UNDECLARED:
                break
        node = node.all_input_nodes[0]
    return node


def where(node: fx.Node) -> str:
    """A node as one line of evidence: its text, and the user's file:line if the capture recorded it."""
    trace = str(node.meta.get("stack_trace") or "").splitlines()
    files = [line.strip() for line in trace if line.strip().startswith("File")]
    return f"{node.format_node()}  {files[-1] if files else ''}".rstrip()


def taken_over(node: fx.Node) -> dict[str, Any]:
    """The metadata that nodes made for this one take over: what the output makes comes from the line of what
    it returns."""
    found = {key: value for key, value in node.meta.items() if key != "val"}
    if node.op == "output":
        lines = (operand.meta.get("source") for operand in node.all_input_nodes)
        found.setdefault("source", next(filter(None, lines), "?"))
    return found


def nodes_in(args: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(args, found.append)
    return found


def fill(args: Any, function: Callable[[fx.Node], Any]) -> Any:
    """`map_arg` for results that are no FX arguments."""
    if isinstance(args, fx.Node):
        return function(args)
    if isinstance(args, (list, tuple)):
        items = [fill(a, function) for a in args]
        return tuple(items) if isinstance(args, tuple) else items
    if isinstance(args, dict):
        return {k: fill(v, function) for k, v in args.items()}
    return args


def has_tag(target: Any, name: str) -> bool:
    tag = getattr(torch.Tag, name, None)
    return tag is not None and tag in target.tags


def attribute(gm: fx.GraphModule, path: str) -> Any:
    return reduce(getattr, path.split("."), gm)


def functional_overload(node: fx.Node) -> Any:
    """The operation that computes what a mutating one writes, by the naming rules of ATen, or None."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    space, name = target._schema.name.split("::")
    wanted = _types([a for a in target._schema.arguments if not (a.kwarg_only and _writes(a))])
    plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    if name.startswith("__i") and name.endswith("__"):
        plain = "__" + name[3:]
    library = getattr(torch.ops, space)
    for candidate in (plain, plain + "_functional", name + "_functional"):
        packet = getattr(library, candidate, None)
        for overload in packet.overloads() if packet is not None else ():
            functional = getattr(packet, overload)
            schema = functional._schema
            if schema.is_mutable or _types(schema.arguments) != wanted:
                continue
            return functional
    return None


def _types(arguments: Sequence[Any]) -> list[tuple[str, str]]:
    """Names and types of arguments; `dropout` calls "input" what `dropout_` calls "self"."""
    return [("self" if a.name == "input" else a.name, str(a.type)) for a in arguments]


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
