"""Shelf: the programs that lie in folders, and which of them serves a call.

    a call      -> the same call, options, versions, structure and code?     the programs to look at
    a program   -> has the forward read the same as it would read now?       the program, on this model

Where nothing on the shelf serves a call it is captured as ever; `notes` says in words what differed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.compiler.stages import Stage
from rmtcompile.dispatch.entries import Entry, Loaded, Restored, Rules
from rmtcompile.dispatch.served import (
    Key,
    all_of,
    compiled_forms,
    deciding,
    known_of,
    served,
    serves,
    text_of,
)
from rmtcompile.dispatch.size_vectors import Vector
from rmtcompile.errors import IgnoredWarning, UnsupportedError, warn
from rmtcompile.ir.segmentation import Segmentation
from rmtcompile.options import Options
from rmtcompile.runtime.bands.control import words_of
from rmtcompile.runtime.forms import offer
from rmtcompile.saved import (
    Damaged,
    Differs,
    Moment,
    Shelved,
    decode,
    differences,
    digest_of,
    fingerprint,
    fingerprints,
    forms_in,
    origin_of,
    program_of,
    read_compiled,
    record_of,
    shelved,
    whole_forms,
    write,
    write_compiled,
    write_forms,
)

_LOGGER = logging.getLogger("rmtcompile")


@dataclass
class _Open:
    """The programs in a folder that the model of now may use."""

    moment: Moment
    fingerprint: Any
    programs: list[Shelved] = field(default_factory=list)
    made: dict[Path, Compiled | None] = field(default_factory=dict)


class Shelf:
    """Saved programs of one callable.

    Args:
        options: of the user.
        folder: where programs are looked for.

    Attributes:
        notes: why programs of the folder were not used, in words.
        unsaved: why programs were not saved, in words.
        loaded: how many programs of the folder were used.
    """

    def __init__(self, options: Options, folder: str | Path | None = None) -> None:
        self.options = options
        self.folder = Path(folder) if folder is not None else None
        self.notes: dict[str, None] = {}
        self.unsaved: dict[str, None] = {}
        self.loaded = 0
        self.is_dirty = False  # whether there may be something new to be saved
        self._is_loud = False  # whether the user is warned where nothing fits
        self._open: _Open | None = None
        self._doubts: list[str] = []  # why programs were not used for this call, should none be
        self._read: set[Path] = set()  # folders whose compiled code torch has been given
        self._written: set[str] = set()

    # ---- looking -------------------------------------------------------------------------------------------

    def look_in(self, folder: str | PathLike[str]) -> None:
        """Look for programs there, and warn where none fits."""
        self.folder, self._is_loud = Path(folder), True

    def close(self) -> None:
        """Forget how the model is: the next call finds it as it is then."""
        self._open = None
        self._doubts.clear()

    def missed(self) -> None:
        """A program is captured: say why none of the folder was used."""
        for text in self._doubts:
            if text not in self.notes:
                self.notes[text] = None
                _LOGGER.info("rmtcompile: a saved program is not used: %s", text)
                if self._is_loud:
                    warn(f"a saved program is not used: {text}", IgnoredWarning)
        self._doubts.clear()

    def segmentation(self, fn: Callable[..., Any], call: Any) -> Segmentation | None:
        """How the calls of a key are cut, if a program that serves one of them fits the model."""
        said = text_of(call)
        for one in self._candidates(fn):
            if one.serves["call"] == said and self._program(one) is not None:
                found: Segmentation = decode(one.serves["segmentation"])
                return found.cut(1) if self._is_agreed([one]) else None
        self._is_agreed([])
        return None

    def rules(self, fn: Callable[..., Any], key: Key, vector: Vector) -> list[Rules]:
        """Programs of free sizes, for these sizes among others."""
        found, used = [], []
        for one in self._candidates(fn):
            if "rules" in one.known and serves(one, key):
                given = {name: decode(value) for name, value in one.known["rules"].items()}
                rules = Rules(samples=[], compiled=None, **given)  # type: ignore[arg-type]
                if rules.sizes(vector) is not None and (compiled := self._program(one)) is not None:
                    rules.compiled = compiled
                    found.append(rules)
                    used.append(one)
        return found if self._is_agreed(used) else []

    def program(self, fn: Callable[..., Any], key: Key, vector: Vector) -> Restored | None:
        """The program of these sizes."""
        for one in self._candidates(fn):
            if one.serves["vector"] == list(vector) and serves(one, key):
                compiled = self._program(one)
                if compiled is not None:
                    known = {name: decode(value) for name, value in one.known.items()}
                    return Restored(compiled, **known) if self._is_agreed([one]) else None
        self._is_agreed([])
        return None

    def _is_agreed(self, found: Sequence[Shelved]) -> bool:
        """Whether all processes that run a program have found the same ones, for their parts of it."""
        if self.options.group is None or self.folder is None:
            return True
        mine = [
            digest_of([one.serves, one.body["record"]["division"], deciding(one.known)]) for one in found
        ]
        everyone = words_of(self.options.group).gathered("look for saved programs", mine)
        if all(one == mine for one in everyone):
            return True
        without = [f"rank {rank}" for rank, one in enumerate(everyone) if not one]
        self._doubts.append(
            f"{', '.join(without)} found none for its part of the program"
            if without
            else "ranks found parts of different programs"
        )
        return False

    def _candidates(self, fn: Callable[..., Any]) -> list[Shelved]:
        """The programs whose fingerprint is that of the model."""
        if self.folder is None or not self.folder.is_dir():
            return []
        if self._open is None:
            started = time.perf_counter()
            damaged: list[str] = []
            try:
                moment = Moment(fn)
                now = fingerprint(moment, self.options)
            except Exception as error:  # of the user's own objects: then the call is captured
                self._doubts.append(f"the model cannot be told: {error}")
                return []
            found = list(shelved(self.folder, digest_of(now), damaged))
            self._open = _Open(moment, now, found)
            self._doubts += damaged
            if not found and not damaged:
                self._say_others(now)
            self._log("looked for programs", started)
        return self._open.programs

    def _program(self, one: Shelved) -> Compiled | None:
        """A program on the model of now; None where it does not fit."""
        assert self._open is not None and self.folder is not None
        if one.path not in self._open.made:
            started = time.perf_counter()
            try:
                record = one.record()
                compiled = program_of(record, self._open.moment)
                compiled.origin = Loaded(self._open.fingerprint, record, one)
                self._read_compiled(one.path.parent)
                seconds = time.perf_counter() - started
                compiled.stages.append(Stage("loaded", seconds, {}, {}))
                self.loaded += 1
                self._log(f"loaded {one.path.name}", started)
                self._open.made[one.path] = compiled
            except (Differs, Damaged, UnsupportedError) as error:
                self._open.made[one.path] = None
                self._doubts.append(str(error))
            except Exception as error:  # of the user's own objects: then the call is captured
                self._open.made[one.path] = None
                self._doubts.append(f"{one.path} cannot be used: {type(error).__name__}: {error}")
        return self._open.made[one.path]

    def _read_compiled(self, inside: Path) -> None:
        if inside not in self._read:
            self._read.add(inside)
            offer(forms_in(inside.parent, inside.name), partial(self._give_caches, inside))

    def _give_caches(self, inside: Path) -> None:
        try:
            read_compiled(inside.parent, inside.name)
        except Damaged as error:
            _LOGGER.warning("rmtcompile: cells are compiled again: %s", error)

    def _say_others(self, now: Any) -> None:
        """Say what differs from the most similar model that has programs here; a folder that is shared by
        many models says nothing of those of other classes."""
        assert self.folder is not None
        all_models = [then for _, then in fingerprints(self.folder)]
        alike = [then for then in all_models if self._is_loud or _class_of(then) == _class_of(now)]
        found = [differences(then, now) for then in alike]
        if found:
            nearest = min(found, key=len)
            more = f", and {len(nearest) - 3} more" if len(nearest) > 3 else ""
            self._doubts.append("; ".join(nearest[:3]) + more)

    def _log(self, what: str, started: float) -> None:
        _LOGGER.info("rmtcompile: %s in %.3f s", what, time.perf_counter() - started)

    # ---- saving --------------------------------------------------------------------------------------------

    def origin(self, fn: Callable[..., Any], compiled: Compiled) -> Any:
        """What a program that was captured now depends on, or why it cannot be told."""
        if place := compiled.capture.by_layout:
            return UnsupportedError(
                "what the forward does depends on how its inputs lie in memory",
                [f"what `contiguous()` or `reshape()` gives is written, or what it reads, at {place}"],
                "clone before the write",
            )
        try:
            return origin_of(fn, compiled.capture, compiled.leaves, compiled.values, self.options)
        except UnsupportedError as error:
            return error
        except Exception as error:  # of the user's own objects: it stops no capture
            return UnsupportedError(
                "what the program depends on cannot be told", [f"{type(error).__name__}: {error}"]
            )

    def save(
        self, entries: Sequence[Entry], folder: Path, report: Callable[[Entry], Any], asked: bool = True
    ) -> None:
        """Write the programs of these entries, and those that replace them.

        Args:
            report: what only reports need of an entry, as JSON.
            asked: whether the user waits for that: one that cannot be saved stops all, and compiled forms
                are made ready to be called, which takes about as long again as to compile them.

        Raises:
            UnsupportedError: a program cannot be saved.
        """
        new: set[str] = set()
        by_digest: dict[str, list[Entry]] = {}
        seen = set()
        for entry in all_of(entries):
            mark = id(entry.trial.rules) if entry.trial is not None else id(entry)
            if mark in seen:
                continue
            seen.add(mark)
            if entry.compiled.numbers is not None:
                names = ", ".join(entry.compiled.capture.guard.number_names)
                self._say_unsaved(f"it is for any integers in {names}, which the model keeps between calls")
                continue
            try:
                digest, is_new = self._save(entry, folder, report)
                by_digest.setdefault(digest, []).append(entry)
                if is_new:
                    new.add(digest)
            except UnsupportedError as error:
                if asked:
                    raise
                self._say_unsaved(str(error))
        if any(entry.executor.backend != "eager" for entry in all_of(entries)):
            for digest in new:
                write_compiled(folder, digest)
            for digest, alike in by_digest.items() if asked else ():
                write_forms(folder, digest, compiled_forms(alike, whole_forms(folder, digest)))
        self.is_dirty = False

    def _say_unsaved(self, why: str) -> None:
        if why not in self.unsaved:
            self.unsaved[why] = None
            _LOGGER.warning("rmtcompile: a program is not saved: %s", why)

    def _save(self, entry: Entry, folder: Path, report: Callable[[Entry], Any]) -> tuple[str, bool]:
        """Write the program of an entry, unless all that is known of it is written; gives the name of the
        folder inside of `folder` that it lies in, and whether anything was written."""
        compiled = entry.trial.rules.compiled if entry.trial is not None else entry.compiled
        origin = compiled.origin
        if isinstance(origin, UnsupportedError):
            raise origin
        if entry.is_edited:
            raise UnsupportedError(
                "a program runs a module that was edited by hand",
                remedy="save it before use(), and call that again",
            )
        calls, known = served(entry), known_of(entry)
        said = digest_of([str(folder.absolute()), calls, known, compiled.emitted.source])
        again = origin if isinstance(origin, Loaded) else None
        told = again.fingerprint if again is not None else origin.fingerprint
        digest = digest_of(told)
        if said in self._written:
            return digest, False
        record = again.record if again is not None else record_of(compiled)
        shown = again.shelved.report() if again is not None else report(entry)
        write(folder, digest, told, record, calls, known, shown)
        self._written.add(said)
        return digest, True


def _class_of(told: Any) -> Any:
    return next(iter(told.get("modules", {}).values()), None)


__all__ = ["Key", "Shelf"]
