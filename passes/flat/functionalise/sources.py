"""Whose memory a result is: a view of an argument, or memory of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_arg

from rmtcompile.ir.schema import bind
from rmtcompile.passes.flat.functionalise.memory import PARENT, Alias, Base, Link, Object
from rmtcompile.passes.flat.functionalise.nodes import (
    UNDECLARED,
    fill,
    has_tag,
    nodes_in,
    overload_name,
)
from rmtcompile.passes.flat.functionalise.values import storage_of
from rmtcompile.passes.flat.functionalise.views import link_of

if TYPE_CHECKING:
    from rmtcompile.passes.flat.functionalise.rewrite import Rewriter

aten = torch.ops.aten


def object_of(
    w: Rewriter,
    node: fx.Node,
    source: Object | None,
    val: Any,
    item: int | None,
    vals: Sequence[Any],
    new: fx.Node | None,
) -> Any:
    """The tensor that a node gives: a view of `source`, or memory of its own."""
    if not isinstance(val, torch.Tensor):
        return new
    if source is None:
        return Object(Alias(Base(), val, node=new))
    parent = source.alias
    link = link_of(node, parent.val, val, item, vals)
    if node.target is aten.as_strided.default:
        parent, link = _strided(w, node, parent, link)
    if link.kind == "generic":
        target, args, kwargs = link.call or (None, (), {})
        content = lambda n: PARENT if w.env[n] is source else w.read(n)  # noqa: E731
        link = Link("generic", link.args, (target, fill(args, content), fill(kwargs, content)))
    link = Link(link.kind, link.args, link.call, w.grad)
    return Object(Alias(parent.base, val, parent, link, new, parent.base.version))


def _strided(w: Rewriter, node: fx.Node, parent: Alias, link: Link) -> tuple[Alias, Link]:
    """`as_strided` counts from the start of the storage, so it is a view of the base."""
    bound, root = bind(node), parent.root
    offset = bound["storage_offset"]
    if offset is None and parent is not root:
        return parent, link
    start = w.roots.offset(root)
    offset = 0 if offset is None else offset - start
    return root, (Link("as_strided", (bound["size"], bound["stride"], offset)) if offset >= 0 else link)


def source_of(w: Rewriter, node: fx.Node, val: Any, item: int | None) -> Object | None:
    """The argument whose memory a result shares, or None if the result has memory of its own."""
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(val, torch.Tensor):
        return None
    schema, name = node.target._schema, overload_name(node)
    declared = any(r.alias_info is not None for r in schema.returns)
    doubtful = declared or name in UNDECLARED or has_tag(node.target, "maybe_aliasing_or_mutating")
    arguments = [n for n in nodes_in((node.args, node.kwargs)) if isinstance(w.env[n], Object)]
    storage = storage_of(val)
    objects: dict[fx.Node, Object] = {n: w.env[n] for n in arguments}
    for n in arguments:
        if storage is not None and storage_of(n.meta.get("val")) == storage:
            return objects[n]
    if not doubtful:
        return None
    # What the capture recorded for constants, and for what in-place operations returned, does not share
    # storage with the original; so ask the operation itself.
    fakes = {n: w.values.local(objects[n].alias.val) for n in arguments}
    get = lambda n: fakes.get(n, n.meta.get("val"))  # noqa: E731
    with w.values.mode, torch.no_grad():
        result = node.target(*map_arg(node.args, get), **map_arg(node.kwargs, get))
    storage = storage_of(result if item is None else result[item])
    return next((objects[n] for n in arguments if storage_of(fakes[n]) == storage), None)
