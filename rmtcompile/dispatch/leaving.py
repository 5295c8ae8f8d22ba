"""What a call leaves behind, as the forward would: attributes, flags, counters, contents of buffers."""

from __future__ import annotations

from typing import Any

import torch

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.compiler.results import value_of
from rmtcompile.dispatch.entries import Entry


def leave(entry: Entry, count: int, outputs: tuple[Any, ...], inputs: list[torch.Tensor]) -> None:
    """Leave the model and the arguments of a call as the forward would leave them.

    Args:
        count: segments of the text.
        outputs: of the captured graph.
        inputs: tensor arguments.
    """
    leave_effects(entry.compiled, count, outputs)
    if not entry.settled:
        entry.settled = True
        if any(effect.change is not None and effect.change.is_hook for effect, _ in entry.compiled.effects):
            entry.compiled.capture.guard.settle()
    write_back(entry.compiled, outputs, inputs)


def leave_effects(compiled: Compiled, count: int, outputs: tuple[Any, ...]) -> None:
    """Leave in the model what the forward would have left."""
    for (effect, _), value in zip(compiled.effects, left_values(compiled, count, outputs), strict=True):
        assert effect.change is not None
        effect.change.apply(value)


def left_values(compiled: Compiled, count: int, outputs: tuple[Any, ...]) -> list[Any]:
    """What each effect leaves, DELETED among it; an object that several leave is one object."""
    made: dict[int, Any] = {}
    steps = compiled.steps(count)
    return [value_of(rule, outputs, steps, made=made) for _, rule in compiled.effects]


def written_tensors(compiled: Compiled, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The buffers, state tensors and inputs that the forward writes in place."""
    return [
        compiled.leaves[name].fetch() if kind == "leaf" else inputs[compiled.input_names.index(name)]
        for kind, name in compiled.written
    ]


def write_back(compiled: Compiled, outputs: tuple[Any, ...], inputs: list[torch.Tensor]) -> None:
    """Store what the forward writes in place into buffers, state tensors and inputs."""
    first = len(outputs) - len(compiled.written)
    with torch.no_grad():
        for target, value in zip(written_tensors(compiled, inputs), outputs[first:], strict=True):
            target.copy_(value)
