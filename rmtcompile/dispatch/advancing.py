"""Advancing: a call that goes on where an earlier one has stopped.

    tokens    0 ........ 8 ........ 16 ........ 24 ... 27
    run 1     |--------------------------|  read: 2 segments, pending: 4 tokens
    run 2                        |~~~~------------------|  begins with what was pending

What is pending is read again: an incomplete segment, and segments that the model treats in another way where
they are the last (`Carried.tail`). So any way of cutting a text into calls leaves the state of one call.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.binding.arguments import tensors_of
from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.compiler.results import has_family
from rmtcompile.dispatch.calls import Call
from rmtcompile.dispatch.entries import Entry
from rmtcompile.dispatch.programs import Programs
from rmtcompile.errors import StateError, UnsupportedError
from rmtcompile.ir.segmentation import Segmentation
from rmtcompile.passes.emit.carried import Refill
from rmtcompile.runtime.crossing import Key
from rmtcompile.runtime.state import Origin, Part, RunState

_HELP = "call the model on the whole text"


@dataclass(frozen=True)
class Advance:
    """A call and how it goes on.

    Attributes:
        call: its segments, and how many were read before.
        args, kwargs: of the forward, with what was pending before them.
        border: the segment before which the next call will start.
    """

    call: Call
    entry: Entry
    args: Any
    kwargs: Any
    border: int


def prepared(programs: Programs, state: RunState | None, args: Any, kwargs: Any) -> Advance:
    """Find the program of a call that goes on from a state, and check that it can.

    Raises:
        StateError: the state belongs to another model, plan, dtype or batch size.
        UnsupportedError: the forward cannot be run in parts; the message names the operation.
    """
    first = 0
    if state is not None:
        args, kwargs = joined(programs, state, args, kwargs)
        first = state.segments
    call = replace(programs.located(args, kwargs), first=first)
    call, entry = programs.entry(call, args, kwargs)
    compiled = entry.compiled
    if compiled.rolled.fixed is not None and not first:  # a text so short is read again with what follows
        return Advance(call, entry, args, kwargs, 0)
    carried = compiled.emitted.carried
    obstacle = carried.obstacle or _obstacle(compiled)
    if obstacle:
        raise UnsupportedError(f"this forward cannot be run in parts: {obstacle}", remedy=_HELP)
    if state is not None and first:
        _check(programs, state, compiled, call.segmentation, entry.executor.state_layers)
    _, rest = call.segmentation.count([tensor.shape for tensor in tensors_of(args, kwargs)])
    last = max(carried.tail, int(rest > 0))  # an incomplete one is read again, whatever it does
    return Advance(call, entry, args, kwargs, max(call.total - last, first))


def _obstacle(compiled: Compiled) -> str:
    """Why what a forward leaves behind does not let it be run in parts."""
    if any(has_family(rule) for _, rule in compiled.effects):
        return "it leaves a list over all segments in its modules"
    if any(kind == "input" for kind, _ in compiled.written):
        return "it writes into its input"
    counters = compiled.capture.guard.counters
    if counters:
        return f"it goes on by itself from a number that it has left in {counters[0]}"
    return ""


def joined(programs: Programs, state: RunState, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments, with what was pending in front of each that holds segments."""
    if not isinstance(state, RunState):
        kind = type(state).__name__
        raise StateError(f"state must be a RunState, as an earlier run gives it, not a {kind}")
    segmentation = programs.segmentation(args, kwargs)
    flat, spec = pytree.tree_flatten((args, kwargs))
    positions = [i for i, value in enumerate(flat) if isinstance(value, torch.Tensor)]
    if state.dims != tuple(axis.dim for axis in segmentation.axes):
        raise StateError("the state was made by calls with other arguments", remedy=_SAME)
    for axis, pending in zip(segmentation.axes, state.pending, strict=True):
        position = positions[axis.leaf]
        value = flat[position]
        others = [size for dim, size in enumerate(value.shape) if dim != axis.dim]
        if others != [size for dim, size in enumerate(pending.shape) if dim != axis.dim]:
            raise StateError(
                "the state was made by inputs of another shape",
                [f"{list(pending.shape)} pending, {list(value.shape)} given"],
                "split or join states where the batch changes",
            )
        if pending.dtype != value.dtype or pending.device != value.device:
            raise StateError(
                "the state was made by inputs of another kind",
                [f"{pending.dtype} on {pending.device}, now {value.dtype} on {value.device}"],
                "pass the text in the same dtype; state.to(device) moves a state",
            )
        flat[position] = torch.cat([pending, value], axis.dim)
    again: tuple[Any, Any] = pytree.tree_unflatten(flat, spec)
    return again


_SAME = "pass the same arguments in each call"


def left(
    programs: Programs,
    advance: Advance,
    state: RunState | None,
    values: Mapping[Key, torch.Tensor],
    part: Part | None,
) -> RunState:
    """The state after a call."""
    compiled, segmentation = advance.entry.compiled, advance.call.segmentation
    first = advance.call.first
    is_gathered = state is not None and state.part is not None and part is None
    if advance.border == first and not is_gathered:
        values, part = (state.values, state.part) if state is not None else ({}, None)
    inputs = tensors_of(advance.args, advance.kwargs)
    pending = []
    for axis in segmentation.axes:
        start = (advance.border - first) * axis.length
        value = inputs[axis.leaf]
        pending.append(value.narrow(axis.dim, start, value.shape[axis.dim] - start).clone())
    return RunState(
        advance.border,
        dict(values),
        tuple(pending),
        fingerprint(compiled, segmentation) if advance.border else "",
        dims=tuple(axis.dim for axis in segmentation.axes),
        origin=Origin(programs.model, lambda: weighed(compiled)),
        part=part,
    )


def fingerprint(compiled: Compiled, segmentation: Segmentation) -> str:
    """Equal for programs that can go on from each other's states, whatever the schedule or the sizes."""
    said = [
        compiled.program.n_layers,
        [(axis.dim, axis.length) for axis in segmentation.axes],
        sorted((one.name, one.back) for one in compiled.emitted.carried.kept),
    ]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


_SAMPLES = 64
"""Elements of each parameter that tell weights apart: training changes all of them."""


def weighed(compiled: Compiled) -> str:
    """Equal for models with the same weights, as far as evenly spaced samples of each parameter show."""
    digest = hashlib.sha256()
    for name, leaf in sorted(compiled.leaves.items()):
        if not isinstance(leaf.fetch(), torch.nn.Parameter):
            continue
        flat = leaf.fetch().detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLES)].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(leaf.fetch().shape)} {leaf.fetch().dtype}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _check(
    programs: Programs, state: RunState, compiled: Compiled, segmentation: Segmentation, layers: range
) -> None:
    plan = fingerprint(compiled, segmentation)
    is_ours = state.origin is not None and state.origin.model is programs.model
    if state.plan != plan and is_ours:
        kept = {one.name for one in compiled.emitted.carried.kept}
        raise StateError(
            "the program of this call carries other values than the one that made the state",
            [
                f"in the state: {', '.join(sorted({name for name, _ in state.values}))}",
                f"in the program: {', '.join(sorted(kept))}",
            ],
            "with the same arguments, the forward does something else for a part of this length (one that "
            "ends within a segment, say): cut the text where segments end",
        )
    if state.plan != plan:
        raise StateError(
            "the state belongs to another plan: another model, other segments, or other arguments",
            [f"plan {state.plan} of the state, {plan} of this call"],
            _SAME,
        )
    if not is_ours and (then := state.weighed()) != (now := weighed(compiled)):
        evidence = [f"{then} then, {now} now"]
        raise StateError("the state was made with other weights", evidence, "start again with state=None")
    lost = list(_lost(state, compiled, layers))
    if lost:
        remedy = "" if state.is_whole else "pass state.gathered(), called on every rank"
        raise StateError("the state lacks values that the program carries", lost, remedy)
    lanes = {lane.name: lane for lane in compiled.program.lanes}
    for refill in compiled.emitted.carried.refills:
        lane = lanes[refill.lane]
        for (name, segment), value in state.values.items():
            kind = _fixed(value.shape, lane.grows), value.dtype, value.device
            wanted = _fixed(lane.shape, lane.grows), lane.dtype, torch.device(lane.device)
            if name == refill.name and kind != wanted:
                raise StateError(
                    "the state holds a value of another kind than the program carries",
                    [
                        f"{name}, segment {segment}: {value.dtype}{list(value.shape)} on {value.device}",
                        f"the program: {lane.dtype}{list(lane.shape)} on {lane.device}",
                    ],
                    "the model's dtype, device and batch size must be those that made the state",
                )


def _fixed(shape: Sequence[int], grows: tuple[int, ...]) -> list[int]:
    """A shape, but for the dims that are larger in later segments."""
    return [-1 if dim in grows else size for dim, size in enumerate(shape)]


def _lost(state: RunState, compiled: Compiled, layers: range) -> Iterator[str]:
    """What a place of a lane is to hold and no value of the state gives, of the cells of any class in these
    layers."""
    places: dict[tuple[str, int, int], list[Refill]] = defaultdict(list)
    for refill in compiled.emitted.carried.refills:
        if refill.layer not in layers:
            continue
        places[refill.lane, refill.layer, refill.back].append(refill)
    for refills in places.values():
        one = refills[-1]
        made = range(state.segments - one.back, state.segments - one.back + one.reach)
        for s in made:
            if s >= one.since and not any((refill.name, s) in state.values for refill in refills):
                yield f"{one.name}, segment {s}"


__all__ = ["Advance", "left", "prepared"]
