"""Saved programs: a compiled program as plain files, and the same program on a model in another process.

fingerprint.py   what has to be the same: versions, options, structure, code;  code.py, contents.py
origin.py        what the forward has read of the model's state, in words;  moment.py
record.py        a program as JSON, and the program of a record;  encode.py
folder.py        the files
"""

from __future__ import annotations

from rmtcompile.saved.encode import decode, encode, know
from rmtcompile.saved.fingerprint import differences, fingerprint
from rmtcompile.saved.folder import (
    Damaged,
    Shelved,
    fingerprints,
    forms_in,
    read_compiled,
    shelved,
    whole_forms,
    write,
    write_compiled,
    write_forms,
)
from rmtcompile.saved.moment import Moment, digest_of
from rmtcompile.saved.origin import Origin, origin_of
from rmtcompile.saved.record import Differs, Record, program_of, record_of

__all__ = [
    "Damaged", "Differs", "Moment", "Origin", "Record", "Shelved", "decode", "differences", "digest_of",
    "encode", "fingerprint", "fingerprints", "forms_in", "know", "origin_of", "program_of", "read_compiled",
    "record_of", "shelved", "whole_forms", "write", "write_compiled", "write_forms",
]  # fmt: skip
