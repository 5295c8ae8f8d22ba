"""Trees: values that a forward leaves behind, taken apart into leaves and what makes them again.

    state.memory = Cache([m0, m1], seen=3)   ->   leaves [m0, m1, 3], spec Cache(values: list(0, 1), seen)

Every Python container and every object of a Python class is made anew at each call, since later calls may
change it. What was there before the forward is meant by its identity (`Kept`). An object that lies in several
places is made once and put there again (`Again`).
"""

from __future__ import annotations

import enum
import types
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from rmtcompile.binding.objects import (
    ATOMS,
    DELETED,
    Step,
    base_of,
    contains_tensor,
    is_iterator,
    is_leaf,
    is_sealed,
    parts,
    put,
    put_items,
)
from rmtcompile.errors import CaptureError

_DEEPEST = 100


class Kept:
    """Stands for an object as it is.

    Attributes:
        is_exact: whether it has to be this very object, and not one like it.
    """

    def __init__(self, value: Any, is_exact: bool) -> None:
        self.value, self.is_exact = value, is_exact

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Kept) or self.is_exact or other.is_exact:
            return isinstance(other, Kept) and self.value is other.value
        return type(self.value) is type(other.value)

    def __hash__(self) -> int:
        return hash(type(self.value))

    def __repr__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class Again:
    """Stands for the object with this label."""

    label: int


@dataclass(frozen=True)
class Keys:
    """Where the children of a container lie, and what else it is made from: the factory of a defaultdict, the
    length of a deque."""

    steps: tuple[Step, ...]
    extra: Any = None
    is_dict: bool = False

    @property
    def has_fields(self) -> bool:
        """Whether some children are attributes."""
        return any(kind not in ("item", "member") for kind, _ in self.steps)

    @property
    def names(self) -> list[Any] | None:
        """The keys of a dict that is nothing else."""
        return [key for _, key in self.steps] if self.is_dict and not self.has_fields else None

    def __str__(self) -> str:
        return str([key for _, key in self.steps])


@dataclass(frozen=True)
class Spec:
    """How a value is made of leaves, in the form of pytree's: `type` is None for a leaf."""

    type: Any = None
    context: Keys | None = None
    inner: tuple[Spec, ...] = ()
    label: int | None = None

    def is_leaf(self) -> bool:
        return self.type is None

    def children(self) -> list[Spec]:
        return list(self.inner)

    @property
    def num_leaves(self) -> int:
        return 1 if self.is_leaf() else sum(child.num_leaves for child in self.inner)

    def __str__(self) -> str:
        if self.type is None:
            return "*"
        return f"{self.type.__name__}({self.context}: {', '.join(map(str, self.inner))})"


class Flattener:
    """Takes values apart that a forward leaves behind.

    Args:
        values: all of them, since one object may lie in several.
        knows: whether an object was there before.
    """

    def __init__(self, values: Sequence[Any], knows: Callable[[Any], bool] = lambda value: False) -> None:
        self._knows = knows
        self._labels: dict[int, int | None] = {}  # of what lies in several places
        self._open: set[int] = set()
        self._kept: list[Any] = list(values)
        times: dict[int, int] = {}
        stack = list(values)
        while stack:
            value = stack.pop()
            if is_leaf(value) or knows(value):
                continue
            times[id(value)] = times.get(id(value), 0) + 1
            if times[id(value)] == 1:
                self._kept.append(value)
                stack += parts(value).values()
        self._shared = {key for key, count in times.items() if count > 1}

    def __call__(self, value: Any, name: str) -> tuple[list[Any], Spec]:
        """Leaves and spec of one value.

        Raises:
            CaptureError: it cannot be made again.
        """
        self._name = name
        leaves: list[Any] = []
        return leaves, self._take(value, leaves, 0)

    def _take(self, value: Any, leaves: list[Any], depth: int) -> Spec:
        if self._is_whole(value):
            plain = isinstance(value, (*ATOMS, torch.Tensor)) or value is DELETED
            leaves.append(value if plain else Kept(value, self._is_exact(value)))
            return Spec()
        if id(value) in self._labels:
            if id(value) in self._open and isinstance(value, (tuple, frozenset)):
                raise self._refusal("holds itself", value)
            leaves.append(Again(self._labels[id(value)]))  # type: ignore[arg-type]
            return Spec()
        if depth > _DEEPEST:
            raise self._refusal(f"is nested more than {_DEEPEST} deep", value)
        label = None
        if id(value) in self._shared:
            label = self._labels[id(value)] = len(self._labels)
        self._open.add(id(value))
        inner = parts(value)
        if any(kind == "member" and contains_tensor(item) for (kind, _), item in inner.items()):
            raise self._refusal("is a set of tensors, which have no order", value)
        if any(contains_tensor(key) for kind, key in inner if kind == "item"):
            raise self._refusal("has tensors for keys", value)
        children = tuple(self._take(item, leaves, depth + 1) for item in inner.values())
        self._open.discard(id(value))
        steps = tuple(("member", i) if step[0] == "member" else step for i, step in enumerate(inner))
        keys = Keys(steps, _extra(value), isinstance(value, dict))
        return Spec(type(value), keys, children, label)

    def _is_whole(self, value: Any) -> bool:
        """Whether it is left as it is."""
        if value is DELETED or isinstance(value, (*ATOMS, torch.Tensor)) or self._knows(value):
            return True
        if isinstance(value, nn.Module):
            raise self._refusal("is a module that was not there before the forward", value)
        if is_iterator(value):
            raise self._refusal("is an iterator, which changes when it is used", value)
        if not (is_leaf(value) or is_sealed(value) or isinstance(value, RemovableHandle)):
            return False
        if contains_tensor(value):
            raise self._refusal("holds tensors where they cannot be followed", value)
        return True

    def _is_exact(self, value: Any) -> bool:
        return self._knows(value) or isinstance(value, (type, types.ModuleType, enum.Enum))

    def _refusal(self, why: str, value: Any) -> CaptureError:
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        return CaptureError(
            f"what the forward leaves in {self._name} {why}",
            [f"{self._name}: {kind}"],
            "keep state in tensors, lists, tuples, dicts or plain objects, or drop it at the end of the "
            "forward",
        )


def _extra(value: Any) -> Any:
    if isinstance(value, defaultdict):
        return Kept(value.default_factory, True)
    return value.maxlen if isinstance(value, deque) else None


def flat(value: Any) -> Any:
    """The structure of a value in words, and its leaves; a leaf is itself."""
    leaves, spec = Flattener([value])(value, "it")
    return leaves[0] if spec.is_leaf() else [str(spec), *leaves]


def empty(kind: type, keys: Keys) -> Any:
    """A new object of a class, with nothing in it yet; None for what can only be made whole."""
    base: Any = base_of(kind)
    if base in (tuple, frozenset):
        return None
    made = _new(kind)(kind) if base is object else base.__new__(kind)
    if base is defaultdict:
        base.__init__(made, keys.extra.value)
    elif base is deque:
        base.__init__(made, (), keys.extra)
    return made


def _new(kind: type) -> Any:
    """What makes instances of a class past the code of its own."""
    found = (vars(owner).get("__new__") for owner in kind.__mro__)
    return next(new for new in found if isinstance(new, types.BuiltinFunctionType))


def fill(made: Any, kind: type, keys: Keys, values: Sequence[Any]) -> Any:
    """Put values where `keys` says; gives the object, a new one where `made` is None."""
    base: Any = base_of(kind)
    pairs = list(zip(keys.steps, values, strict=True))
    items = [(key, value) for (step, key), value in pairs if step in ("item", "member")]
    if made is None:
        made = base.__new__(kind, [value for _, value in items])
    elif issubclass(base, dict):
        put_items(made, dict(items))
    elif base is not object:
        put_items(made, [value for _, value in items])
    for step, value in pairs:
        if step[0] in ("attr", "slot"):
            put(made, step, value)
    return made


def leaves_with_paths(value: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """The leaves of a pytree, each with its path; numbered where a class does not say its keys, as results of
    transformers before 5 do not."""
    try:
        return pytree.tree_flatten_with_path(value)[0]
    except ValueError:
        return [((pytree.SequenceKey(i),), leaf) for i, leaf in enumerate(pytree.tree_leaves(value))]
