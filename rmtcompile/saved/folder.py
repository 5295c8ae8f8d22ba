"""Folder: saved programs as plain files, which several processes may write at once.

    FOLDER/3f09.../fingerprint.json      what has to be the same, in words
    FOLDER/3f09.../81aa....json          a program: what it serves, its tables, names of its other files
    FOLDER/3f09.../c41d....py            the emitted module
    FOLDER/3f09.../77e0....state.json    what the forward had read of the model's Python state, in words
    FOLDER/3f09.../90b2....safetensors   constants
    FOLDER/3f09.../compiled.bin          what torch has compiled, for its caches
    FOLDER/3f09.../5d7c....form          a form of a cell function that is called without being traced

Files that others refer to are named by their contents. Each file is written under another name and renamed,
the one that refers to others last, so that a reader finds whole files or none; what has another digest than
it should is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rmtcompile.errors import UnsupportedError
from rmtcompile.saved.record import FORMAT, Record

_LOGGER = logging.getLogger("rmtcompile")

COMPILED = "compiled.bin"
FORM = ".form"
FINGERPRINT = "fingerprint.json"


class Damaged(Exception):
    """A file is not what was written; the message says which."""


@dataclass(frozen=True)
class Shelved:
    """A program in a folder, of which only the main file has been read.

    Attributes:
        path: of that file.
        serves: which calls it is for.
        known: what is known of it: lengths, costs, rules.
    """

    path: Path
    body: Mapping[str, Any]

    @property
    def serves(self) -> Mapping[str, Any]:
        return self.body["serves"]

    @property
    def known(self) -> Mapping[str, Any]:
        return self.body["known"]

    def record(self) -> Record:
        """The program, its other files read.

        Raises:
            Damaged: one of them is not what was written.
        """
        files, folder = self.body["files"], self.path.parent
        tensors = _tensors(folder / files["tensors"]) if files["tensors"] else {}
        state = json.loads(_whole(folder / files["state"]))
        return Record(self.body["record"], _whole(folder / files["source"]).decode(), state, tensors)

    def report(self) -> Any:
        """What only reports need; None where it was not saved, or is damaged: the program runs without it."""
        name = self.body["files"].get("report")
        try:
            return json.loads(_whole(self.path.parent / name)) if name else None
        except Damaged as error:
            _LOGGER.warning("rmtcompile: there are no reports of a saved program: %s", error)
            return None


def shelved(folder: Path, digest: str, damaged: list[str]) -> Iterator[Shelved]:
    """The programs of a fingerprint; names of files that cannot be read are added to `damaged`."""
    for path in sorted((folder / digest).glob("*.json")):
        if path.name == FINGERPRINT or path.name.endswith((".state.json", ".report.json")):
            continue
        try:
            yield Shelved(path, _main(path))
        except Damaged as error:
            damaged.append(str(error))


def fingerprints(folder: Path) -> Iterator[tuple[str, Any]]:
    """(digest, fingerprint) of each model that has programs in a folder; what cannot be read is left out."""
    for path in sorted(folder.glob(f"*/{FINGERPRINT}")):
        try:
            yield path.parent.name, json.loads(path.read_text())
        except (OSError, ValueError):
            continue


def write(
    folder: Path,
    digest: str,
    fingerprint: Any,
    record: Record,
    serves: Mapping[str, Any],
    known: Mapping[str, Any],
    report: Any = None,
) -> Path:
    """Write a program; gives the path of its main file.

    Raises:
        UnsupportedError: the folder cannot be written.
    """
    inside = folder / digest
    try:
        inside.mkdir(parents=True, exist_ok=True)
        if not (inside / FINGERPRINT).exists():
            _put(inside / FINGERPRINT, json.dumps(fingerprint, indent=1).encode())
        state = json.dumps(record.state, indent=1).encode()
        files = {
            "source": _content(inside, record.source.encode(), ".py"),
            "state": _content(inside, state, ".state.json"),
            "tensors": _content(inside, _safe(record.tensors), ".safetensors") if record.tensors else None,
            "report": _content(inside, json.dumps(report).encode(), ".report.json")
            if report is not None
            else None,
        }
        body = {"serves": serves, "known": known, "files": files, "record": record.data}
        name = hashlib.sha256(json.dumps([serves, files["state"]], sort_keys=True).encode()).hexdigest()[:24]
        text = json.dumps(body).encode()
        path = inside / f"{name}.json"
        _put(path, b"\n".join([hashlib.sha256(text).hexdigest().encode(), text]))
    except OSError as error:
        raise UnsupportedError(f"the programs cannot be saved in {folder}", [str(error)]) from error
    return path


def write_compiled(folder: Path, digest: str) -> None:
    """Write what torch has compiled in this process, where it has compiled anything."""
    made = torch.compiler.save_cache_artifacts()
    if made is not None:
        text = b"\n".join([hashlib.sha256(made[0]).hexdigest().encode(), made[0]])
        with suppress(OSError):  # it is compiled again
            _put(folder / digest / COMPILED, text)


def read_compiled(folder: Path, digest: str) -> None:
    """Give torch what was compiled in another process.

    Raises:
        Damaged: the file is not what was written.
    """
    path = folder / digest / COMPILED
    if path.exists():
        torch.compiler.load_cache_artifacts(_checked(path))


def write_forms(folder: Path, digest: str, forms: Mapping[str, bytes]) -> None:
    """Write compiled forms, by their keys.

    Raises:
        UnsupportedError: the folder cannot be written.
    """
    try:
        for key, content in forms.items():
            named = b"\n".join([key.encode(), content])  # that it is the form of this name is checked, too
            said = hashlib.sha256(named).hexdigest().encode()
            _put(folder / digest / f"{key}{FORM}", b"\n".join([said, named]))
    except OSError as error:
        raise UnsupportedError(f"compiled cells cannot be saved in {folder}", [str(error)]) from error


def forms_in(folder: Path, digest: str) -> dict[str, Callable[[], bytes]]:
    """What reads each compiled form, by its key; it raises `Damaged`."""
    paths = (folder / digest).glob(f"*{FORM}")
    return {path.name.removesuffix(FORM): partial(_form, path) for path in paths}


def _form(path: Path) -> bytes:
    key, _, content = _checked(path).partition(b"\n")
    if key.decode(errors="replace") != path.name.removesuffix(FORM):
        raise Damaged(f"{path} is damaged: it holds another form")
    return content


def whole_forms(folder: Path, digest: str) -> set[str]:
    """The keys of the compiled forms that are what was written."""
    found = set()
    for key, read in forms_in(folder, digest).items():
        with suppress(Damaged):  # it is written again
            read()
            found.add(key)
    return found


def _main(path: Path) -> Mapping[str, Any]:
    body: Mapping[str, Any] = json.loads(_checked(path))
    if body.get("record", {}).get("format") != FORMAT:
        raise Damaged(f"{path} is of another version")
    return body


def _checked(path: Path) -> bytes:
    """What follows the digest in the first line."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise Damaged(f"{path} is damaged")
    return content


def _whole(path: Path) -> bytes:
    """The contents of a file that is named by them."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    if not path.name.startswith(_name(content)):
        raise Damaged(f"{path} is damaged")
    return content


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def _content(folder: Path, content: bytes, suffix: str) -> str:
    """Write a file that is named by its contents, unless it is there."""
    name = _name(content) + suffix
    path = folder / name
    if not path.exists() or path.read_bytes() != content:
        _put(path, content)
    return name


def _put(path: Path, content: bytes) -> None:
    """Write a file whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _safe(tensors: Mapping[str, torch.Tensor]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UnsupportedError(
            "constants of a program are saved with safetensors", [str(error)], "pip install safetensors"
        ) from error
    return save({name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()})


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    return load(_whole(path))


__all__ = [
    "Damaged", "Shelved", "fingerprints", "forms_in", "read_compiled", "shelved", "whole_forms", "write",
    "write_compiled", "write_forms",
]  # fmt: skip
