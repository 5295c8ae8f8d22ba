"""Served: which calls a program serves, and what has been found out about it, as it is saved.

    serves    the call, how it is cut, its sizes           looked up where nothing else is read yet
    known     lengths, costs, rules of other sizes         what another process need not measure again
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from rmtcompile.compiler.stages import said_when_long
from rmtcompile.dispatch.entries import Entry, Lengths, Rules
from rmtcompile.errors import UnsupportedError
from rmtcompile.saved import Shelved, encode, know

know(Lengths)

Key = tuple[Any, int | None, int]
"""What calls have in common that differ in sizes only; a single number of segments; the fewest captured."""

_NOT_SAVED = frozenset({"samples", "compiled", "executor", "counts", "ties", "reach", "beyond"})


def served(entry: Entry) -> dict[str, Any]:
    """Which calls an entry's program serves.

    Raises:
        UnsupportedError: an argument has no name in another process.
    """
    assert entry.made_for is not None
    (structure, only, fewest), vector = entry.made_for
    call, segmentation, has_rest = structure
    if not text_of(call):
        raise UnsupportedError(
            "an argument is an object that has no name in another process",
            [repr(call)],
            "pass tensors, numbers, strings, lists and dicts",
        )
    sizes = list(vector) if entry.trial is None else encode(entry.trial.rules.corners)
    return {
        "call": text_of(call), "segmentation": encode(segmentation), "rest": has_rest, "only": only,
        "fewest": fewest, "vector": sizes,
    }  # fmt: skip


def known_of(entry: Entry) -> dict[str, Any]:
    """What has been found out about an entry's program."""
    workspaces = encode(entry.executor.replays.measured)
    if entry.trial is not None:
        kept = (one.name for one in fields(Rules) if one.name not in _NOT_SAVED)
        rules = {name: encode(getattr(entry.trial.rules, name)) for name in kept}
        return {"rules": {**rules, "workspaces": workspaces}}
    longer = entry.longer.made_for[0][2] if entry.longer and entry.longer.made_for else 0
    return {
        "lengths": encode(entry.lengths), "costs": encode(entry.executor.costs), "workspaces": workspaces,
        "longer": longer,
    }  # fmt: skip


_MEASURED = ("costs", "workspaces")


def deciding(known: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a program, but for what was measured, which differs from process to process."""
    return {
        name: deciding(value) if name == "rules" else value
        for name, value in known.items()
        if name not in _MEASURED
    }


def compiled_forms(entries: Sequence[Entry], known: Container[str]) -> dict[str, bytes]:
    """The compiled forms of entries by key, but for known ones, for processes that do not compile them."""
    forms = {form.key: form for entry in entries for form in entry.executor.forms}
    with said_when_long("compiling the cells ahead of time, for processes that load them"):
        made = {key: form.content() for key, form in forms.items() if key is not None and key not in known}
    return {key: content for key, content in made.items() if content is not None}


def all_of(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Entries, and those for single lengths, for longer inputs and on finer grids that belong to them."""
    for entry in entries:
        if entry.longer is None or entry.longer.made_for != entry.made_for:  # else it is captured anew
            yield entry
        others = [other for other in (entry.longer, entry.finer) if other is not None]
        yield from all_of([*entry.only.values(), *others])


def serves(one: Shelved, key: Key) -> bool:
    call, segmentation, has_rest = key[0]
    asked = (text_of(call), encode(segmentation), has_rest, key[1], key[2])
    return asked == tuple(one.serves[name] for name in ("call", "segmentation", "rest", "only", "fewest"))


def text_of(call: Any) -> str:
    """The key of a call as text; empty where it holds an object that has no name in another process."""
    text = repr(call)
    return "" if " at 0x" in text else text


__all__ = ["Key", "all_of", "compiled_forms", "deciding", "known_of", "served", "serves", "text_of"]
