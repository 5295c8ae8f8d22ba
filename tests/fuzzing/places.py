"""Where memories are kept, and how they are written there.

A place is made at the beginning of a forward: `place[l]` is the memory of layer l or None,
`place.put(l, new)` writes it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fuzzing.memories import State


def write_into(old: Tensor, new: Tensor, how: str) -> None:
    """In place, in one of several ways."""
    if how == "copy_":
        old.copy_(new)
    elif how == "add_":
        old.add_(new - old)
    elif how == "slices":
        old[..., :2] = new[..., :2]
        old[..., 2:] = new[..., 2:]
    elif how == "rows":
        for b in range(old.shape[0]):
            old[b] = new[b]
    elif how == "view":
        old.view(old.shape[0], -1).copy_(new.flatten(1))
    else:
        old.mul_(0.0).add_(new)


class Place:
    """Memories in a list; the others override what is theirs."""

    def __init__(self, model: Any, x: Tensor) -> None:
        self.how, self.reads_copies = model.spec.write, model.spec.trains
        self.model, self.kept = model, self.empty(model)

    def empty(self, model: Any) -> Any:
        return [None] * model.spec.layers

    def get(self, l: int) -> State | None:
        return self.kept[l]

    def set(self, l: int, state: State) -> None:
        self.kept[l] = state

    def __getitem__(self, l: int) -> State | None:
        state = self.get(l)
        if state is not None and self.reads_copies and self.how != "assign":
            return {name: value.clone() for name, value in state.items()}  # backward needs what was read
        return state

    def put(self, l: int, new: State) -> None:
        old = self.get(l)
        if self.how == "assign" or old is None:
            self.set(l, new)
        else:
            for name, value in new.items():
                write_into(old[name], value, self.how)


class Dict(Place):
    def empty(self, model: Any) -> Any:
        return {}

    def get(self, l: int) -> State | None:
        return self.kept.get(f"layer {l}")

    def set(self, l: int, state: State) -> None:
        self.kept[f"layer {l}"] = state


class Attributes(Place):
    """In the layer modules."""

    def empty(self, model: Any) -> Any:
        if not model.spec.keeps:
            for layer in model.layers:
                layer.kept = None

    def get(self, l: int) -> State | None:
        return self.model.layers[l].kept

    def set(self, l: int, state: State) -> None:
        self.model.layers[l].kept = state


class Buffers(Attributes):
    """In buffers of the layer modules, one a tensor."""

    def empty(self, model: Any) -> Any:
        if not model.spec.keeps:
            for layer in model.layers:
                layer.names = ()

    def get(self, l: int) -> State | None:
        layer = self.model.layers[l]
        return {name: getattr(layer, f"kept_{name}") for name in layer.names} if layer.names else None

    def set(self, l: int, state: State) -> None:
        layer = self.model.layers[l]
        layer.names = tuple(state)
        for name, value in state.items():
            layer.register_buffer(f"kept_{name}", value, persistent=False)


@dataclass
class Store:
    """In the manner of the caches of transformers."""

    layers: list[State] = field(default_factory=list)
    seen: int = 0

    def update(self, l: int, state: State) -> State:
        if l == 0:
            self.seen += 1
        if len(self.layers) <= l:
            self.layers.append(state)
        else:
            self.layers[l] = state
        return self.layers[l]


class Objects(Place):
    """In an object, which the model keeps where `keeps` is set."""

    def empty(self, model: Any) -> Any:
        if model.spec.keeps:
            if model.store is None:
                model.store = Store()
            return model.store
        return Store()

    def get(self, l: int) -> State | None:
        return self.kept.layers[l] if l < len(self.kept.layers) else None

    def set(self, l: int, state: State) -> None:
        self.kept.update(l, state)


class Queue(Place):
    """In a deque that turns: the oldest is the next to be read."""

    def empty(self, model: Any) -> Any:
        return deque([None] * model.spec.layers)

    def get(self, l: int) -> State | None:
        return self.kept[0]

    def set(self, l: int, state: State) -> None:
        self.kept[0] = state

    def put(self, l: int, new: State) -> None:
        super().put(l, new)
        self.kept.rotate(-1)


class Stacked(Place):
    """One tensor for all layers f[L, B, ...]; the first segment finds zeros there."""

    axis = 0

    def empty(self, model: Any) -> Any:
        return None

    def get(self, l: int) -> State | None:
        if self.kept is None:
            return None
        return {name: value.select(self.axis, l) for name, value in self.kept.items()}

    def set(self, l: int, state: State) -> None:
        if self.kept is None:
            self.kept = {
                name: torch.stack([torch.zeros_like(value)] * self.model.spec.layers, self.axis)
                for name, value in state.items()
            }
        for name, value in state.items():
            rows = list(self.kept[name].unbind(self.axis))
            rows[l] = value
            self.kept[name] = torch.stack(rows, self.axis)


class StackedBehind(Stacked):
    """One tensor for all layers f[B, L, ...]."""

    axis = 1


class Indexed(Stacked):
    """One tensor for all layers, of which a row is replaced by `index_copy`."""

    def set(self, l: int, state: State) -> None:
        if self.kept is None:
            super().set(l, state)
        for name, value in state.items():
            self.kept[name] = self.kept[name].index_copy(0, torch.tensor([l]), value[None])


PLACES: dict[str, type[Place]] = {
    "list": Place,
    "dict": Dict,
    "attributes": Attributes,
    "buffers": Buffers,
    "object": Objects,
    "queue": Queue,
    "stacked": Stacked,
    "stacked behind": StackedBehind,
    "indexed": Indexed,
}

IN_MODEL = ("attributes", "buffers", "object")
"""Places that can go on from call to call."""

ALIKE = ("stacked", "stacked behind", "indexed")
"""Places where all layers need memories of the same fixed shapes."""


def holder(layer: nn.Module) -> None:
    """What places write into a layer module."""
    layer.kept, layer.names = None, ()  # type: ignore[assignment]
