"""What the commands of rmtcompile have in common: their parser, options that all read alike, files to write.

Nothing here needs torch: help and a wrong command line are answered at once.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rmtcompile.patience import said_after

USAGE = 2
"""Exit status of a command line that makes no sense."""

DTYPES = {"f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}


class UsageError(Exception):
    """What was asked for on the command line does not exist or does not fit."""


class BuilderError(Exception):
    """The user's own code has raised; the message says what and where, in the user's lines alone."""


class Parser(argparse.ArgumentParser):
    """Points to --help where a command line is wrong, and to --out where --json was given a file."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """The options, or the end with a message."""
        found, more = self.parse_known_args(args, namespace)
        if more:
            hint = ""
            if getattr(found, "json", False) and not more[0].startswith("-"):
                where = "--out FILE names one" if hasattr(found, "out") else "> FILE keeps what is printed"
                hint = f" (--json prints, and takes no file: {where})"
            self.error(f"unrecognized arguments: {' '.join(more)}{hint}")
        return found

    def error(self, message: str) -> Any:
        """End with the status of a wrong command line."""
        self.exit(USAGE, f"{self.prog}: {message}\n{self.prog} --help shows examples\n")


def positive(text: str) -> int:
    """A number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("has to be at least 1")
    return value


def add_json(parser: Any) -> None:
    """--json, the same for each command."""
    parser.add_argument("--json", action="store_true", help="print JSON for another program to read")


def add_dtype(parser: Any) -> None:
    """--dtype, as torch writes it or as short as f32."""
    parser.add_argument(
        "--dtype", type=_dtype, choices=tuple(DTYPES.values()), help="of model and inputs, or short: bf16"
    )


def _dtype(text: str) -> str:
    return DTYPES.get(text, text)


def check_file(path: str | Path) -> Path:
    """See that a file can be written, before there is anything to write; its folders are made.

    Raises:
        UsageError: it cannot.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise cannot_write(error, path) from error
    return path


def check_folder(path: str | Path) -> Path:
    """See that files can be written into a folder, which is made.

    Raises:
        UsageError: they cannot.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise cannot_write(error, path) from error
    return path


def telling(
    say: Callable[[str], None], what: str, after: float | None = None
) -> AbstractContextManager[None]:
    """Say what is being done where it takes longer than `after` seconds."""
    return said_after(say, f"               ... {what}", after)


def cannot_write(error: OSError, path: str | Path) -> UsageError:
    """What to say of a path that is not to be written, in one line."""
    at = error.filename if isinstance(error.filename, str) and Path(error.filename).exists() else path
    return UsageError(f"cannot write {at}: {error.strerror}")


__all__ = [
    "USAGE", "BuilderError", "Parser", "UsageError", "add_dtype", "add_json", "cannot_write", "check_file",
    "check_folder", "positive", "telling",
]  # fmt: skip
