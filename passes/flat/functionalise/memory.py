"""Memory as the rewrite sees it: bases with versions, views of them, and the Python objects on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Link:
    """One step from a tensor to a view of it; `kind` is an ATen view, in one normal form."""

    kind: str
    args: tuple[Any, ...] = ()
    # for the kind "generic": target, args and kwargs, with PARENT for the viewed tensor
    call: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None
    grad: bool | None = None


class Parent:
    """Stands for the viewed tensor in the arguments of a generic link."""


PARENT = Parent()


@dataclass(eq=False)
class Base:
    """Memory: the content of one storage, through its versions."""

    name: str | None = None  # of the placeholder or attribute that it is
    version: int = 0
    tangled: tuple[str, ...] = ()  # other names of overlapping memory that are no view of this one


@dataclass(eq=False)
class Alias:
    """A view of a base (or the whole of it, if it has no parent)."""

    base: Base
    val: torch.Tensor
    parent: Alias | None = None
    link: Link | None = None
    node: fx.Node | None = None  # the content at `version`
    version: int = 0
    replays: dict[Any, fx.Node] = field(default_factory=dict)

    @property
    def root(self) -> Alias:
        """The whole base."""
        return self if self.parent is None else self.parent.root


@dataclass(eq=False)
class Object:
    """One Python tensor: nodes that return their argument share it, `unsqueeze_` and the like change it."""

    alias: Alias
    external: bool = False


@dataclass(eq=False)
class Several:
    """A node that gives several tensors."""

    node: fx.Node
    items: list[Any]
    versions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.versions = self._now()

    def _now(self) -> list[int]:
        return [i.alias.base.version if isinstance(i, Object) else 0 for i in self.items]

    @property
    def is_current(self) -> bool:
        """Whether nothing was written into the tensors since."""
        return self.versions == self._now()
