"""Placeholders and attributes that are the same memory, and what each is a view of."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rmtcompile.passes.flat.functionalise.memory import Alias, Base, Object
from rmtcompile.passes.flat.functionalise.nodes import attribute
from rmtcompile.passes.flat.functionalise.values import Values, geometry, overlap, storage_of
from rmtcompile.passes.flat.functionalise.views import path_between


class Roots:
    """One base for the placeholders and attributes that are the same memory.

    Attributes:
        objects: what each placeholder or attribute is, by name;  tensors: their values at capture.
    """

    def __init__(self, gm: fx.GraphModule, values: Values) -> None:
        self.values = values
        self.objects: dict[str, Object] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        for node in gm.graph.nodes:
            value = node.meta.get("val") if node.op == "placeholder" else None
            if node.op == "get_attr":
                value = attribute(gm, str(node.target))
            if isinstance(value, torch.Tensor):
                self.tensors.setdefault(str(node.target), value)
        groups: dict[Any, list[str]] = {}
        for name, value in self.tensors.items():
            groups.setdefault(storage_of(value) or name, []).append(name)
        for names in groups.values():
            names.sort(key=lambda n: -self.tensors[n].numel())
            for i, name in enumerate(names):
                self._add(name, names[:i])

    def _add(self, name: str, others: list[str]) -> None:
        """The root `name`: one of `others`, a view of one of them, or memory of its own."""
        value = self.tensors[name]
        fake = self.values.local(value)
        for other in others:
            cover, known = self.tensors[other], self.objects[other]
            if geometry(cover) == geometry(value):
                self.objects[name] = known
                return
            path = path_between(cover, value)
            if path is not None:
                alias = known.alias
                for link, val in path:
                    alias = Alias(alias.base, self.values.local(val), alias, link)
                self.objects[name] = Object(alias, external=True)
                return
        root = self.objects[name] = Object(Alias(Base(name), fake), external=True)
        for other in others:
            if overlap(self.tensors[other], value):
                base = self.objects[other].alias.base
                base.tangled += (f"{other} and {name} overlap",)
                root.alias.base.tangled += (f"{name} and {other} overlap",)

    def offset(self, root: Alias) -> int:
        """Where a base starts in its storage, in elements."""
        if root.base.name is not None and root.base.name in self.tensors:
            return int(self.tensors[root.base.name].storage_offset())
        return int(root.val.storage_offset())
