"""The smallest spec that still fails in the same manner: features are taken away one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from fuzzing.spec import Kind, Spec


def shrink(spec: Spec, fails: Callable[[Spec], bool], tries: int = 60) -> Spec:
    """Take away what is not needed for `fails`, until nothing can go or after `tries`.

    Args:
        fails: whether a spec fails as the first one did.
    """
    seen = {spec}
    goes_on = True
    while goes_on:
        goes_on = False
        for smaller in simpler(spec):
            if smaller in seen or tries <= 0:
                continue
            seen.add(smaller)
            tries -= 1
            if fails(smaller):
                spec, goes_on = smaller, True
                break
    return spec


def simpler(spec: Spec) -> Iterator[Spec]:
    """Specs with one feature less, the larger steps first."""
    plain = Spec()
    for i in range(len(spec.kinds)) if len(spec.kinds) > 1 else ():
        yield replace(spec, kinds=spec.kinds[:i] + spec.kinds[i + 1 :])
    for i, lengths in enumerate([spec.lengths] * len(spec.lengths)):
        if len(lengths) > 1:
            yield replace(spec, lengths=lengths[:i] + lengths[i + 1 :])
    for field in fields(Spec):
        if field.name not in ("kinds", "lengths", "layers", "segment"):
            if getattr(spec, field.name) != getattr(plain, field.name):
                yield replace(spec, **{field.name: getattr(plain, field.name)})
    for name in ("prologue", "epilogue"):
        for one in _without_one(getattr(spec, name)):
            yield replace(spec, **{name: one})
    for i, kind in enumerate(spec.kinds):
        for one in _simpler_kind(kind):
            yield replace(spec, kinds=(*spec.kinds[:i], one, *spec.kinds[i + 1 :]))
    if spec.layers > 1:
        yield replace(spec, layers=spec.layers - 1)
    for i, length in enumerate(spec.lengths):
        for shorter in (length - spec.segment, length - length % spec.segment):
            if 0 < shorter < length:
                yield replace(spec, lengths=(*spec.lengths[:i], shorter, *spec.lengths[i + 1 :]))


def _simpler_kind(kind: Kind) -> Iterator[Kind]:
    for name in ("operations", "reads"):
        for one in _without_one(getattr(kind, name)):
            yield replace(kind, **{name: one})
    for field in ("memory", "first"):
        plain: Any = getattr(Kind(), field)
        if getattr(kind, field) not in (plain, "none"):
            yield replace(kind, **{field: plain})
    if kind.memory != "none":
        yield replace(kind, memory="none")


def _without_one(values: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    for i in range(len(values)):
        yield values[:i] + values[i + 1 :]
