"""Gated: a product whose two halves meet in an elementwise expression computes the expression too.

    y = bmm(x, w); g, u = split(y, [M, M], -1); z = silu(g) * u   ->   z = gated_product(x, w, "silu(g) * u")

So a layer's gate and up projections, one product since `fuse_linears`, are stored once and at half the size;
the product itself is never stored.  The kernel is in `gated_kernel.py`; where it is not faster for the sizes
of a graph, nothing is changed.

Requires: an Inductor graph after its own passes.
Ensures: same outputs up to rounding; the halves are not rounded before the expression.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_library = torch.library.Library("rmtcompile", "FRAGMENT")
_library.define("gated_product(Tensor a, Tensor b, str gate, int stages, bool specialised) -> Tensor")


@torch.library.impl(_library, "gated_product", "CUDA")
def _on_cuda(a: torch.Tensor, b: torch.Tensor, gate: str, stages: int, specialised: bool) -> torch.Tensor:
    from rmtcompile.passes.cell.inductor.gated_kernel import Config, gated_product

    if a.dim() == 2:
        return _on_cuda(a[None], b[None], gate, stages, specialised)[0]
    return gated_product(a, b, gate, Config(stages, specialised))


@torch.library.impl(_library, "gated_product", "CPU")
def _on_cpu(a: torch.Tensor, b: torch.Tensor, gate: str, stages: int, specialised: bool) -> torch.Tensor:
    halves = torch.matmul(a, b).to(torch.promote_types(a.dtype, torch.float32)).chunk(2, -1)
    namespace = {name: getattr(torch, name) for name in FUNCTIONS}
    exec(gate, namespace)
    return namespace["gate"](*halves).to(a.dtype)


@torch.library.register_fake("rmtcompile::gated_product", lib=_library)
def _shaped(a: torch.Tensor, b: torch.Tensor, gate: str, stages: int, specialised: bool) -> torch.Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1] // 2)


FUNCTIONS = ("erf", "exp", "relu", "rsqrt", "sigmoid", "sqrt", "tanh")
"""What the text of a gate may call: functions of torch, and those of `gated_kernel.py`."""

_VIEWS = (aten.view.default, aten.reshape.default, aten.unsqueeze.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
_PRODUCTS = (aten.bmm.default, aten.mm.default)

_EXPRESSIONS: dict[Any, str] = {
    aten.add.Tensor: "{} + {}",
    aten.sub.Tensor: "{} - {}",
    aten.mul.Tensor: "{} * {}",
    aten.div.Tensor: "{} / {}",
    aten.reciprocal.default: "1 / {}",
    aten.neg.default: "-{}",
    **{getattr(aten, name).default: f"{name}({{}})" for name in FUNCTIONS},
}


def gated(graph: fx.Graph) -> None:
    """The pass; changes the graph."""
    for node in list(graph.nodes):
        if node.target not in _PRODUCTS or (gate := _gate(node)) is None:
            continue
        if (config := choose(node, gate.text)) is None:
            continue
        with graph.inserting_before(node):  # later on its operands may have been written over
            result = _call(
                graph, torch.ops.rmtcompile.gated_product.default, *node.args, gate.text, *config
            )
        with graph.inserting_before(gate.result):
            for view in gate.views:
                result = _call(graph, view.target, result, _halved(view.args[1]))  # type: ignore[arg-type]
        gate.result.replace_all_uses_with(result)
    graph.eliminate_dead_code()


def choose(product: fx.Node, gate: str) -> tuple[int, bool] | None:
    """How the kernel is to be compiled for a product; None where it does not run or is not faster."""
    a, b = (operand.meta["val"] for operand in product.args)  # type: ignore[union-attr]
    if a.device.type != "cuda" or torch.version.hip is not None or a.dtype.itemsize != 2:
        return None
    if torch.cuda.get_device_capability(a.device) < (9, 0):
        return None
    try:
        from rmtcompile.passes.cell.inductor.gated_kernel import ALIGNMENT, fastest
    except ImportError:  # no Triton, or one without descriptors of tensors
        return None
    sizes = [_hint(size) for size in (1, *a.shape, b.shape[-1] // 2)[-4:]]
    steps = (*a.stride()[:-1], b.stride(-1))
    if a.stride(-1) != 1 or b.stride(-2) != 1 or any(_hint(step) * 2 % ALIGNMENT for step in steps):
        return None
    return fastest(a.device, a.dtype, *sizes, gate)


def _hint(size: int | torch.SymInt) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else size


@dataclass(frozen=True)
class Gate:
    """An elementwise expression of the two halves of a product.

    Attributes:
        text: of a function `gate` of the halves, in Python that is PyTorch's and Triton's alike; it computes
            in float32 at least.
        result: the expression's value.
        views: by which the product is reshaped before it is split, one after another.
    """

    text: str
    result: fx.Node
    views: list[fx.Node]


def _gate(product: fx.Node) -> Gate | None:
    """The expression of a product's halves, where nothing else reads the product."""
    width = product.meta["val"].shape[-1]
    y, views = product, []
    while len(y.users) == 1 and (user := next(iter(y.users))).target in _VIEWS:
        y = user
        views.append(y)
        if y.meta["val"].shape[-1] != width:
            return None
    halves = _halves(y, width)
    if halves is None:
        return None
    lines: list[str] = []
    names = {half: f"x{i}" for i, half in enumerate(halves)}
    for node in product.graph.nodes:
        if node not in names and any(operand in names for operand in node.all_input_nodes):
            if (expression := _expression(node, names)) is not None:
                names[node] = f"y{len(lines)}"
                lines.append(f"    {names[node]} = {expression}\n")
    results = [node for node in names if any(user not in names for user in node.users)]
    if len(results) != 1 or results[0] in halves or not halves[0].users or not halves[1].users:
        return None
    if results[0].meta["val"].dtype != product.meta["val"].dtype:
        return None
    text = f"def gate(x0, x1):\n{''.join(lines)}    return {names[results[0]]}\n"
    return Gate(text, results[0], views)


def _halved(argument: Any) -> Any:
    """What a view of the product is called with, for a view of half of it."""
    return [*argument[:-1], argument[-1] // 2] if isinstance(argument, list | tuple) else argument


def _halves(y: fx.Node, width: Any) -> tuple[fx.Node, fx.Node] | None:
    """The two halves of a value's last dim, where nothing else reads the value."""
    last = y.meta["val"].dim() - 1
    if not isinstance(width, int) or width % 2:
        return None
    found: dict[int, fx.Node] = {}
    for start, part in _parts(y, last):
        if start < 0 or start in found or part.meta["val"].shape[-1] != width // 2:
            return None
        found[start] = part
    return (found[0], found[width // 2]) if found.keys() == {0, width // 2} else None


def _parts(y: fx.Node, last: int) -> Iterator[tuple[int, fx.Node]]:
    """Where parts of a value's last dim begin, and the parts; -1 for another reader."""
    for user in y.users:
        if user.target in _SPLITS and _dim(user, 2, last) == last:
            starts = list(accumulate((part.shape[-1] for part in user.meta["val"]), initial=0))
            for part in user.users:
                yield starts[part.args[1]] if part.target is operator.getitem else -1, part  # type: ignore[index]
        elif user.target is aten.slice.Tensor and _dim(user, 1, last) == last and len(user.args) < 5:
            yield user.args[2] or 0, user  # type: ignore[misc]
        else:
            yield -1, user


def _dim(node: fx.Node, position: int, last: int) -> Any:
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return dim + last + 1 if dim < 0 else dim  # type: ignore[operator]


def _expression(node: fx.Node, names: dict[fx.Node, str]) -> str | None:
    """The text of an elementwise operation on named values and numbers; None where it is something else."""
    if not all(operand in names for operand in node.all_input_nodes):
        return None
    if node.target is torch.ops.prims.convert_element_type.default:
        is_float = node.args[1].is_floating_point  # type: ignore[union-attr]
        return names[node.args[0]] if is_float else None  # type: ignore[index]
    form = _EXPRESSIONS.get(node.target)
    if form is None or node.kwargs or not all(map(_is_operand, node.args)):
        return None
    return form.format(*(names[x] if isinstance(x, fx.Node) else repr(x) for x in node.args))


def _is_operand(x: Any) -> bool:
    return isinstance(x, fx.Node | int) or (isinstance(x, float) and math.isfinite(x))


def _call(graph: fx.Graph, target: Callable[..., Any], *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    values = fx.map_arg(args, lambda arg: arg.meta["val"])
    node.meta["val"] = target(*values)
    return node


__all__ = ["Gate", "choose", "gated"]
