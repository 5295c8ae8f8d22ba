"""Random specs: mostly plain, each with a few odd features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random

from fuzzing.memories import MEMORIES
from fuzzing.operations import OPERATIONS
from fuzzing.places import ALIKE, IN_MODEL, PLACES
from fuzzing.results import RESULTS
from fuzzing.spec import Kind, Spec

READS = ((1, 0), (1, 1), (1, -1), (0, 2), (1, 2), (1, 0), (1, 1), (1, -1), (2, 0), (2, 1), (2, -1), (3, 0))
LONG = ("scanned", "filled", "heads", "experts", "positions")
"""Features of many operations, whose models take long to capture: drawn less often."""

WRITES = ("copy_", "add_", "slices", "rows", "view", "mul_")
PROLOGUES = ("positions", "memory tokens", "running sum", "token shift", "top of the last")
EPILOGUES = ("running sum", "drop memory tokens", "number")


def draw(seed: int) -> Spec:
    """The spec of a seed: always the same."""
    r = Random(seed)
    kinds = tuple(_kind(r) for _ in range(r.choice([1, 1, 1, 2, 2, 3])))
    place = _odd(r, 0.6, "list", tuple(PLACES))
    if place in ALIKE:
        memory = r.choice([name for name, made in MEMORIES.items() if made.fixed])
        kinds = tuple(Kind(memory, kind.operations, kind.reads, "zeros") for kind in kinds)
    fixed = all(kind.memory == "none" or MEMORIES[kind.memory].fixed for kind in kinds)
    order = _odd(r, 0.3, "segments", ("layers", "inside"))
    if place == "queue" and (order != "segments" or any(kind.memory == "none" for kind in kinds)):
        place = "list"
    segment = r.choice([2, 2, 3])
    prologue = tuple(r.choice((*PROLOGUES * 2, *OPERATIONS)) for _ in range(r.choice([0, 0, 0, 1, 1, 2])))
    if order != "segments":
        prologue = tuple(name for name in prologue if name != "top of the last")
    result = _odd(r, 0.6, "cat", (*[name for name in RESULTS if name != "reversed"] * 2, "reversed"))
    rest = r.choice([0, 0, r.randrange(segment)])
    cut = _odd(r, 0.5, "split", ("slices", "narrow", "front", "right", "view"))
    if rest and place in (*ALIKE, *IN_MODEL) and not fixed:
        rest = 0
    if rest and (cut == "view" or (order == "inside" and cut == "right")):
        rest = 0
    lengths = tuple(
        max(1, segment * r.choice([1, 2, 3, 3, 4, 5, 6]) - rest) for _ in range(r.choice([2, 2, 3]))
    )
    trains = r.random() < 0.3
    irregular = Random(seed).random() < 0.15 and place != "queue" and not rest
    if irregular:
        lengths = tuple(segment * n for n in r.choice([(9,), (12, 5), (4, 11), (7, 8, 10)]))
    usage = "call" if trains else _odd(r, 0.3, "call", ("run", "map"))
    if usage == "run" and cut == "right":
        usage = "call"  # the borders of segments depend on where the text will end
    in_parts = usage == "run"  # a model that goes on by itself from its last call is refused there
    spec = Spec(
        kinds,
        layers=r.choice([1, 2, 2, 2, 3]),
        order=order,
        place=place,
        write=_odd(r, 0.4, "assign", WRITES) if fixed else "assign",
        writes=_irregular(r) if irregular else (0, 1, 0),
        keeps=place in IN_MODEL and not trains and order == "segments" and r.random() < 0.3 and not in_parts,
        cut=cut,
        segment=segment,
        tokens=r.random() < 0.3,
        prologue=prologue,
        epilogue=tuple(r.choice((*EPILOGUES * 2, *OPERATIONS)) for _ in range(r.choice([0, 0, 0, 1, 1, 2]))),
        injects=r.random() < 0.15,
        mask=r.random() < 0.2,
        result=result,
        shared=r.random() < 0.1,
        batch=r.choice([1, 1, 2, 3]),
        lengths=lengths,
        trains=trains,
        usage=usage,
        plan=_odd(r, 0.1, "auto", ("sequential",)),
        recompute=_odd(r, 0.2, "auto", ("level",)) if trains else "auto",
        block=r.choice([32, 32, 32, 1, 2]),
        seed=seed % 2**31,
    )
    is_idle = all(spec.kind(l).memory == "none" and not spec.kind(l).operations for l in range(spec.layers))
    return replace(spec, kinds=(replace(kinds[0], operations=("tanh",)), *kinds[1:])) if is_idle else spec


def _kind(r: Random) -> Kind:
    names = _weighted(OPERATIONS)
    return Kind(
        memory=r.choice(["none", *_weighted(MEMORIES)]),
        operations=tuple(r.choice(names) for _ in range(r.choice([0, 0, 1, 1, 2]))),
        reads=tuple(dict.fromkeys(r.sample(READS, r.choice([0, 0, 0, 1, 1, 2])))),
        first=_odd(r, 0.5, "zeros", ("none", "learned", "branch")),
    )


def _irregular(r: Random) -> tuple[int, int, int]:
    """Every second, third or fourth segment, after some at which all is written."""
    period = r.choice([2, 2, 3, 4])
    return r.choice([0, 0, 1, 3, 4, 5]), period, r.randrange(period)


def _weighted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names for _ in range(1 if name in LONG else 3))


def _odd(r: Random, chance: float, plain: str, others: tuple[str, ...]) -> str:
    return r.choice(others) if r.random() < chance else plain
