"""What a random model is, as data: written as JSON, and the same model again from it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

Offset = tuple[int, int]


@dataclass(frozen=True)
class Kind:
    """What the layers of one kind do; the defaults do the least.

    Attributes:
        memory: what the layer keeps from segment to segment (`memories.py`), or "none".
        operations: what is done to x between the read and the write of the memory (`operations.py`).
        reads: (ds, dl) of the other cells whose means are added to x, consumer minus producer.
        first: what segment 0 does for a memory: "zeros", "none" (no read), "learned", "branch".
    """

    memory: str = "vector"
    operations: tuple[str, ...] = ()
    reads: tuple[Offset, ...] = ()
    first: str = "zeros"


@dataclass(frozen=True)
class Spec:
    """One model and how it is called; the defaults are the simplest of all.

    Attributes:
        kinds: layer l is of kind l modulo their number.
        order: which loop is outside: "segments", "layers", or "inside" (layers cut their input themselves).
        place: where memories are kept (`places.py`).
        write: how they are written there.
        writes: when: at every segment before the first number, then at those that leave the third one when
            divided by the second.
        keeps: whether they go on from call to call, where their place is in the model.
        cut: how the input is cut.
        segment: positions in a segment.
        tokens: whether the input is tokens, embedded, or features.
        prologue, epilogue: what is done to a segment before and after its layers (`models.py`).
        injects: whether the segment's input is added before each layer.
        mask: whether a mask of positions is passed, and what it does in layers.
        result: what is returned (`results.py`).
        shared: whether all layers have the weights of the first one's operations.
        batch, lengths: rows, and positions of each call, in order.
        trains: whether gradients of all parameters are compared.
        usage: "call", "run" (a text in two parts), "map" (all inputs as documents).
        plan, recompute, block: options of the compiler, and segments in a block where all run at once.
        seed: of weights and inputs.
    """

    kinds: tuple[Kind, ...] = (Kind(),)
    layers: int = 2
    order: str = "segments"
    place: str = "list"
    write: str = "assign"
    writes: tuple[int, int, int] = (0, 1, 0)
    keeps: bool = False
    cut: str = "split"
    segment: int = 3
    tokens: bool = False
    prologue: tuple[str, ...] = ()
    epilogue: tuple[str, ...] = ()
    injects: bool = False
    mask: bool = False
    result: str = "cat"
    shared: bool = False
    batch: int = 1
    lengths: tuple[int, ...] = (9, 15)
    trains: bool = False
    usage: str = "call"
    plan: str = "auto"
    recompute: str = "auto"
    block: int = 32
    seed: int = 0

    def is_written(self, s: int) -> bool:
        """Whether memories are written at a segment."""
        warm, period, phase = self.writes
        return s < warm or s % period == phase

    def kind(self, layer: int) -> Kind:
        """The kind of a layer."""
        return self.kinds[layer % len(self.kinds)]

    def to_json(self) -> str:
        """What differs from the defaults, on one line."""
        return json.dumps(_changed(self))

    @staticmethod
    def from_json(text: str) -> Spec:
        """The model of `to_json`.

        Raises:
            TypeError: a field is unknown.
        """
        fields: dict[str, Any] = {name: _frozen(value) for name, value in json.loads(text).items()}
        if "kinds" in fields:
            kinds = [{name: _frozen(value) for name, value in kind.items()} for kind in fields["kinds"]]
            fields["kinds"] = tuple(Kind(**kind) for kind in kinds)
        return Spec(**fields)


def _changed(value: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        if own != field.default:
            found[field.name] = [_changed(kind) for kind in own] if field.name == "kinds" else own
    return found


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
