"""Blame: which line of the user's code an operation or an error comes from, and the refusal it amounts to."""

from __future__ import annotations

import functools
import linecache
import os
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from rmtcompile.errors import CaptureError

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_MODELS = os.path.join(_PACKAGE, "models") + os.sep  # user's models as far as the compiler goes
OURS = tuple(
    folder + os.sep for folder in (_PACKAGE, os.path.join(os.path.dirname(_PACKAGE), "passes"))
)
"""Where the code of this package lies; `passes` lies beside it in a checkout."""


@functools.cache
def is_ours(name: str) -> bool:
    """Whether a file is torch's or this package's."""
    return name.startswith((_TORCH, *OURS, "<")) and not name.startswith(_MODELS)


def _short(name: str) -> str:
    return os.sep.join(name.split(os.sep)[-3:]) if name.startswith(sys.prefix) else os.path.relpath(name)


def user_source(frame: Any) -> str:
    """`file.py:123` of the innermost frame outside torch and outside this package."""
    return next((source for source, _ in user_places(frame)), "?")


def user_line(frame: Any) -> str:
    """The same with the source text of that line where it can be read."""
    while frame is not None and is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "?"
    name, number = frame.f_code.co_filename, frame.f_lineno
    return f"{_short(name)}:{number}  {linecache.getline(name, number).strip()}".rstrip()


def user_places(frame: Any) -> Iterator[tuple[str, int]]:
    """`file.py:123` and the instruction (one line may call several things) of each frame outside torch and
    outside this package, from the innermost on."""
    while frame is not None:
        name = frame.f_code.co_filename
        if not is_ours(name):
            yield f"{_short(name)}:{frame.f_lineno}", frame.f_lasti
        frame = frame.f_back


def raised_at(error: BaseException) -> str:
    """The user's line at which an error was raised, and the source text of that line where it can be read."""
    best = "?"
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not is_ours(name):
            text = linecache.getline(name, trace.tb_lineno).strip()
            best = f"{_short(name)}:{trace.tb_lineno}  {text}"
        trace = trace.tb_next
    return best


_HIGHER_ORDER = re.compile(r"HigherOrderOperator (\w+)")
"""In what torch says of an operation that a mode has no rule for."""


def model_error(error: Exception) -> CaptureError:
    """An error that the model raises whatever runs it."""
    return CaptureError(
        f"the model itself raises {type(error).__name__}: {error}",
        [f"at {raised_at(error)}"],
        "pass what the model runs on",
    )


def refusal(error: Exception, held: Iterable[str] = ()) -> CaptureError:
    """What an error in a forward on fake tensors says to the user; raise it from the error.

    Args:
        held: names and kinds of tensors of the model that tracing does not follow.
    """
    remedy = "decide it from shapes or Python values"
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        what = f"the forward depends on the values of a tensor ({error})"
        remedy += (
            ", or pass inputs for which the check is not made "
            "(for example no attention_mask instead of one that is all ones)"
        )
    elif "data-dependent" in str(error) or "data dependent" in str(error):
        what = "the forward depends on the values of a tensor"
    elif "inference tensor" in str(error).lower():
        what = f"the forward writes into a tensor made in inference mode: {error}"
        remedy = "make the model outside of torch.inference_mode(); calls may be inside"
    elif isinstance(error, NotImplementedError) and (operator := _HIGHER_ORDER.search(str(error))):
        what = f"an operator takes a function: {operator[1]}"
        remedy = (
            "attention: attn_implementation='sdpa' or 'eager' of transformers, or "
            "torch.nn.functional.scaled_dot_product_attention; else fallback='sequential'"
        )
    else:
        what = f"the forward could not be traced: {type(error).__name__}: {error}"
        remedy = (
            "see whether the model itself runs on these inputs; what cannot be traced can run with "
            "fallback='sequential'"
        )
    odd = list(islice(held, 3))
    if odd:
        remedy = "optimize the model with plain parameters, or run it as it is with fallback='sequential'"
    return CaptureError(what, [f"at {raised_at(error)}", *(f"the model holds {one}" for one in odd)], remedy)
