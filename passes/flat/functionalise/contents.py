"""What memory holds: views are replayed on the newest version of their base; writes go back through them."""

from __future__ import annotations

import operator

import torch
from torch import fx

from rmtcompile.errors import InternalError, UnsupportedError
from rmtcompile.passes.flat.functionalise.builder import Builder
from rmtcompile.passes.flat.functionalise.memory import Alias, Link, Parent
from rmtcompile.passes.flat.functionalise.nodes import where
from rmtcompile.passes.flat.functionalise.values import same_strides

aten = torch.ops.aten


class Contents(Builder):
    """Reads and writes memory; `changed` says whether the new graph differs from the old one."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.changed = False

    def current(self, alias: Alias) -> fx.Node:
        """The present content of a view, replayed on the newest version of its base if need be."""
        if alias.node is not None and alias.version == alias.base.version:
            return alias.node
        if alias.parent is None or alias.link is None:
            if alias.base.version or alias.base.name is None:
                raise InternalError(f"functionalise: no content for a base read by {where(self.reader)}")
            alias.node = self.emit("get_attr", alias.base.name, val=alias.val)
            return alias.node
        key = (alias.base.version, repr(self.reader.meta.get("scope")), self.grad is False)
        if key not in alias.replays:
            node = self._replay(alias.link, self.current(alias.parent), alias.val)
            if alias.link.grad is False and self.grad is not False:
                node = self.call(aten.detach.default, node, val=alias.val)
            alias.replays[key] = node
        return alias.replays[key]

    def _replay(self, link: Link, parent: fx.Node, val: torch.Tensor | None) -> fx.Node:
        match link.kind:
            case "identity":
                return parent
            case "select":
                return self.call(aten.select.int, parent, *link.args, val=val)
            case "slice":
                return self.call(aten.slice.Tensor, parent, *link.args, val=val)
            case "reshape":
                return self.call(aten.reshape.default, parent, list(link.args[0]), val=val)
            case "permute":
                return self.call(aten.permute.default, parent, list(link.args[0]), val=val)
            case "expand":
                return self.call(aten.expand.default, parent, list(link.args[0]), val=val)
            case "detach":
                return self.call(aten.detach.default, parent, val=val)
            case "diagonal":
                return self.call(aten.diagonal.default, parent, *link.args, val=val)
            case "dtype":
                return self.call(aten.view.dtype, parent, *link.args, val=val)
            case "as_strided":
                return self.call(aten.as_strided.default, self.own(parent), *link.args, val=val)
        assert link.call is not None
        target, args, kwargs = link.call
        fill = lambda x: parent if isinstance(x, Parent) else x  # noqa: E731
        args, kwargs = fx.node.map_aggregate(args, fill), fx.node.map_aggregate(kwargs, fill)
        if link.args[0] is None:
            return self.call(target, *args, val=val, **kwargs)
        several = self.call(target, *args, **kwargs)
        return self.call(operator.getitem, several, link.args[0], val=val)

    def write(self, alias: Alias, value: fx.Node) -> None:
        """Makes `value` the content of a view, and so of its base."""
        if alias.base.tangled:
            raise UnsupportedError(
                "a write into memory that another attribute sees in a way that is no plain view",
                [where(self.reader), *alias.base.tangled],
                "keep one tensor attribute for this memory and take views of it in forward",
            )
        contents: list[tuple[Alias, fx.Node]] = []
        step: Alias | None = alias
        while step is not None:
            if step.parent is None:
                value = self.restride(value, step.val)
            contents.append((step, value))
            if step.parent is not None:
                value = self._inverse(step, value)
            step = step.parent
        root = contents[-1][0]
        root.base.version += 1
        self.changed = True
        for view, content in contents:
            view.replays.clear()
            if view is root or same_strides(content.meta["val"], view.val):
                view.node, view.version = content, root.base.version

    def _inverse(self, alias: Alias, value: fx.Node) -> fx.Node:
        """The new content of the viewed tensor, given the new content of the view."""
        link, parent = alias.link, alias.parent
        assert link is not None and parent is not None
        shape = tuple(parent.val.shape)
        kind, args = link.kind, link.args
        if kind == "slice" and args[3] == 1 and tuple(alias.val.shape) == shape:
            return value
        scatters = {"select": aten.select_scatter.default, "slice": aten.slice_scatter.default,
                    "diagonal": aten.diagonal_scatter.default}  # fmt: skip
        if kind in scatters:
            return self.call(scatters[kind], self.current(parent), value, *args, val=parent.val)
        if kind in ("identity", "detach"):
            return value
        if kind == "reshape" or (kind == "expand" and alias.val.numel() == parent.val.numel()):
            return self.call(aten.reshape.default, value, list(shape))
        if kind == "permute":
            back = sorted(range(len(args[0])), key=lambda d: args[0][d])
            return self.call(aten.permute.default, value, back)
        if kind == "dtype":
            return self.call(aten.view.dtype, value, parent.val.dtype)
        if kind == "as_strided":
            own = self.own(self.current(parent))
            return self.call(aten.as_strided_scatter.default, own, value, *args, val=parent.val)
        inverses = {aten._conj.default: aten._conj.default, aten._neg_view.default: aten._neg_view.default,
                    aten.view_as_real.default: aten.view_as_complex.default,
                    aten.view_as_complex.default: aten.view_as_real.default}  # fmt: skip
        target = link.call[0] if link.call else None
        if target in inverses:
            return self.call(inverses[target], value)
        raise UnsupportedError(
            f"a write through a view that cannot be undone: {target or kind}",
            [where(self.reader)],
            "write into the tensor itself, or into a slice, selection or reshape of it",
        )
