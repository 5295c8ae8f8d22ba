"""Moment: a model as it is now, with a name for each thing in it that a program may depend on.

    model.layers[0].scale      (("module", "layers.0"), ("attr", "scale"))

Names are ways from modules, so that they mean the same in another process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import nn

from rmtcompile.binding.captured import Leaf
from rmtcompile.binding.objects import Path, path_name
from rmtcompile.binding.state import Held, Snapshot, roots_of
from rmtcompile.binding.surroundings import Surroundings
from rmtcompile.saved.contents import Contents
from rmtcompile.saved.encode import decode, encode


class Moment:
    """A callable and what it reaches, as they are now.

    Attributes:
        roots: the modules that it reaches, by name.
        snapshot: their state.
        around: what its code names.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.roots = roots_of(fn)
        self.snapshot = Snapshot(self.roots)
        self.around = Surroundings(fn, self.roots)

    def told(self) -> Contents:
        """What tells values of this moment, none of which it has met yet."""
        return Contents(self._names, self.around.functions)

    @cached_property
    def _names(self) -> dict[int, str]:
        names = {id(held.tensor): held.name for held in reversed(list(self.snapshot.tensors()))}
        names |= {id(one.target): path_name(one.path) or "the model" for one in self.snapshot.records()}
        return names | {id(module): label or "the model" for label, module in self.modules.items()}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Modules by name; one that has several has the first."""
        found: dict[int, tuple[str, nn.Module]] = {}
        for name, root in self.roots.items():
            for path, module in root.named_modules(remove_duplicate=False):
                found.setdefault(id(module), (f"{name}.{path}" if name and path else name or path, module))
        return dict(found.values())

    @cached_property
    def labels(self) -> dict[int, str]:
        """Names of modules, by identity."""
        return {id(module): label for label, module in self.modules.items()}

    @cached_property
    def places(self) -> dict[int, Path]:
        """The ways to recorded objects, by identity."""
        return {id(record.target): record.path for record in self.snapshot.records()}

    @cached_property
    def records(self) -> dict[Path, Any]:
        """Recorded objects by the way to them."""
        return {record.path: record for record in self.snapshot.records()}

    @cached_property
    def owners(self) -> dict[int, list[Held]]:
        """Where each tensor is kept, by its identity."""
        found: dict[int, list[Held]] = {}
        for held in self.snapshot.tensors():
            found.setdefault(id(held.tensor), []).append(held)
        return found

    @cached_property
    def held(self) -> dict[Path, Held]:
        """Tensors by the way to them."""
        return {held.path: held for held in self.snapshot.tensors()}

    def leaf(self, name: str, paths: list[Path]) -> Leaf:
        """The tensor that is kept in all of these places.

        Raises:
            LookupError: it is not kept there, or in other places, too.
        """
        found = [self.held[path] for path in paths]
        now = self.owners[id(found[0].tensor)]
        if {held.path for held in now} != set(paths):
            raise LookupError(f"{name} is one tensor with others now, or is none with others any more")
        held, *ties = found
        others = tuple(Leaf(tie.name, tie.tensor, tie.holder, tie.key, tie.way) for tie in ties)
        return Leaf(name, held.tensor, held.holder, held.key, held.way, others)

    @cached_property
    def surrounding(self) -> dict[str, torch.Tensor]:
        """Tensors in closures, globals and the like; those of one name are numbered."""
        found: dict[str, torch.Tensor] = {}
        cells = ((name, value) for _, value, name in self.around.cells)
        for name, value in (*((slot.name, slot.value) for slot in self.around.slots), *cells):
            if isinstance(value, torch.Tensor):
                found[f"{name} ({len(found)})"] = value
        return found


def written(path: Path) -> Any:
    """A way as JSON."""
    return [[kind, encode(key)] for kind, key in path]


def read(data: Any) -> Path:
    """The way that `written` gave."""
    return tuple((kind, decode(key)) for kind, key in data)


def digest_of(data: Any) -> str:
    """Equal for equal JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:24]


__all__ = ["Moment", "digest_of", "read", "written"]
