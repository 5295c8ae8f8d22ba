"""In-place operations: what they write, out of place."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import fx
from torch.fx.node import map_arg

from rmtcompile.errors import UnsupportedError
from rmtcompile.ir.schema import bind
from rmtcompile.passes.flat.functionalise.memory import Alias, Base, Object, Several
from rmtcompile.passes.flat.functionalise.nodes import (
    attribute,
    functional_overload,
    has_tag,
    is_mutating,
    overload_name,
    where,
)
from rmtcompile.passes.flat.functionalise.sources import object_of

if TYPE_CHECKING:
    from rmtcompile.passes.flat.functionalise.rewrite import Rewriter

aten = torch.ops.aten

# fmt: off
_STORAGE_OPS = {
    "set_", "resize_", "resize_as_", "set_data", "_resize_output_", "requires_grad_", "resize_as_sparse_",
}
# fmt: on


def visit_write(w: Rewriter, node: fx.Node) -> None:
    """Give what an in-place operation writes to the memory that it writes into."""
    target, name = node.target, overload_name(node)
    if not isinstance(target, torch._ops.OpOverload) or name in _STORAGE_OPS:
        refuse(node, "an operation that changes what a tensor is, not only what it holds")
    assert isinstance(target, torch._ops.OpOverload)
    schema, bound = target._schema, bind(node)
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if any(str(a.type) not in ("Tensor", "Optional[Tensor]") for a in written):
        refuse(node, "a write into a list of tensors")
    objects = [w.env[bound[a.name]] for a in written if isinstance(bound.get(a.name), fx.Node)]
    if not objects or not all(isinstance(o, Object) for o in objects):
        refuse(node, "a write into something that is not a tensor of the graph")
    if has_tag(target, "inplace_view"):
        _view_in_place(w, node, objects[0])
    else:
        for item, value in zip(objects, _written_values(w, node, written, objects), strict=True):
            w.write(item.alias, value)
    if not schema.returns or all(r.alias_info is not None for r in schema.returns):
        w.env[node] = Several(node, list(objects), []) if len(schema.returns) > 1 else objects[0]


def _view_in_place(w: Rewriter, node: fx.Node, item: Object) -> None:
    if overload_name(node) != "detach_" and item.external:
        refuse(node, "a change of an input's or attribute's shape in place")
    functional = functional_overload(node)
    if functional is None:
        refuse(node, "a change of a tensor's shape in place")
    parent = item.alias
    old = w.current(parent)
    new = w.call(functional, old, *map_arg(node.args[1:], w.read))
    probe = fx.Graph().create_node("call_function", functional, node.args, node.kwargs)
    made = object_of(w, probe, item, new.meta["val"], None, (), new)
    probe.args, probe.kwargs = (), {}  # the original's nodes must not count it as a user
    item.alias = made.alias
    w.changed = True


def _written_values(
    w: Rewriter, node: fx.Node, written: Sequence[Any], objects: Sequence[Object]
) -> Iterator[fx.Node]:
    """What the written arguments hold afterwards, cast and broadcast to them."""
    name, bound, like = overload_name(node), bind(node), objects[0].alias.val
    if name == "copy_" and isinstance(bound["src"], fx.Node):
        source = w.fit(w.read(bound["src"]), like)
        # What is copied while gradients are off has none, but `source` is the value it was copied from.
        yield w.call(aten.detach.default, source) if w.grad is False else source
        return
    if name == "zero_" or (name == "fill_" and not isinstance(bound["value"], fx.Node)):
        value = 0 if name == "zero_" else bound["value"]
        yield w.call(aten.full.default, list(like.shape), value, dtype=like.dtype, device=like.device)
        return
    if name == "fill_":
        yield w.fit(w.read(bound["value"]), like)
        return
    for value, item in zip(_results(w, node, written, objects), objects, strict=True):
        yield w.fit(value, item.alias.val)


def _results(w: Rewriter, node: fx.Node, written: Sequence[Any], objects: Sequence[Object]) -> list[fx.Node]:
    """What the functional form of an in-place operation gives for the written arguments.

    Results beside them, which the operation returns, become the node's value.
    """
    functional = functional_overload(node)
    if functional is None:
        refuse(node, "an in-place operation that has no functional form")
    outs = {a.name for a in written if a.kwarg_only}
    args = map_arg(node.args, w.read)
    kwargs = map_arg({k: v for k, v in node.kwargs.items() if k not in outs}, w.read)
    result = w.call(functional, *args, **kwargs)
    vals = result.meta["val"]
    several = isinstance(vals, (tuple, list))
    if (len(vals) if several else 1) < len(objects):
        refuse(node, "an in-place operation whose functional form gives fewer results")
    skip = len(vals) - len(objects) if several else 0
    if skip != sum(r.alias_info is None for r in node.target._schema.returns):  # type: ignore[union-attr]
        refuse(node, "an in-place operation whose functional form gives other results")
    values = [
        w.call(operator.getitem, result, skip + i, val=vals[skip + i]) if several else result
        for i in range(len(objects))
    ]
    if outs and any(v.meta["val"].shape != o.alias.val.shape for v, o in zip(values, objects, strict=True)):
        refuse(node, "an out= argument of another shape than the result")
    if several and skip:
        w.env[node] = Several(result, [
            Object(Alias(Base(), v, node=w.call(operator.getitem, result, i, val=v)))
            for i, v in enumerate(vals[:skip])
        ])  # fmt: skip
    return values


def refuse(node: fx.Node, what: str) -> NoReturn:
    """Raise for an operation that has no functional form."""
    raise UnsupportedError(
        f"{what}: {node.target}",
        [where(node)],
        "write it out of place in the model's forward (x = x.op(...)), or assign a new tensor",
    )


def check_hidden_writes(gm: fx.GraphModule, node: fx.Node) -> None:
    """Refuses writes that no schema shows: statistics of norms, bodies of higher-order calls."""
    name = overload_name(node)
    if name in (
        "batch_norm",
        "native_batch_norm",
        "instance_norm",
        "cudnn_batch_norm",
        "miopen_batch_norm",
    ):
        bound = bind(node)
        training = bound.get("training", bound.get("use_input_stats"))
        if training and isinstance(bound.get("running_mean"), fx.Node):
            refuse(node, "running statistics that are updated in training mode")
    if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
        for n in node.all_input_nodes:
            body = attribute(gm, str(n.target)) if n.op == "get_attr" else None
            if isinstance(body, fx.GraphModule) and any(is_mutating(inner) for inner in body.graph.nodes):
                refuse(node, "a higher-order operation whose body writes in place")
