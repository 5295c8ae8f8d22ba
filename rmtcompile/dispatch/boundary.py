"""The boundary: what leaves a call is a result, a refusal, the model's own error, or a bug that says so.

    with explained(model, args, kwargs):
        compile ...                         KeyError in a pass        ->  InternalError, "please report it"
                                            the model raises, too     ->  CaptureError with the user's line
    with explained(model, args, kwargs, running=True):
        run ...                             index out of range        ->  the model's own IndexError

Whether an error is the model's own is found out by running the model; that costs a forward where something
has failed already, and nothing elsewhere.
"""

from __future__ import annotations

import linecache
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from rmtcompile.binding.state import Contents, Snapshot, roots_of
from rmtcompile.binding.surroundings import Surroundings
from rmtcompile.errors import InternalError, RankError, UnsupportedError, VerificationError
from rmtcompile.frontend.blame import OURS, model_error, raised_at
from rmtcompile.frontend.tracing import as_written

# Said as they are: they tell of the machine, or were made of warnings by the user's filters.
_PASSED = (
    UnsupportedError, VerificationError, RankError, torch.OutOfMemoryError, torch.AcceleratorError, Warning
)  # fmt: skip
_STOPS_EARLY: type[Exception] = checkpoint._StopRecomputationError
"""How a checkpoint around the call ends a forward that it runs again, once it has what it needs."""


@contextmanager
def explained(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], running: bool = False
) -> Iterator[None]:
    """Turn errors that are no refusals into what they amount to.

    Args:
        fn, args, kwargs: the model and the arguments of the call; left as they were.
        running: a program is running, so that an error of the model is raised as the model raises it.

    Raises:
        UnsupportedError: the model fails on these arguments by itself.
        InternalError: the model runs, so that this is a bug of the compiler.
    """
    try:
        with quiet():
            yield
    except (*_PASSED, _STOPS_EARLY):
        raise
    except Exception as error:
        own = _own_error(fn, args, kwargs)
        if own is None:
            raise _internal(error) from error
        if running:
            raise own from None
        raise model_error(own) from None


def _own_error(fn: Callable[..., Any], args: Any, kwargs: Any) -> Exception | None:
    """What the model itself raises on these arguments; model, arguments and random state are left as they
    were."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    copies = [_copy(value) if isinstance(value, torch.Tensor) else value for value in flat]
    args, kwargs = pytree.tree_unflatten(copies, spec)
    snapshot = Snapshot(roots_of(fn))
    contents, around = Contents(snapshot), Surroundings(fn)
    try:
        with torch.random.fork_rng(), as_written():
            fn(*args, **kwargs)
    except Exception as error:
        return error
    finally:
        snapshot.restore()
        contents.restore()
        around.restore()
    return None


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone().requires_grad_(value.requires_grad)


def _internal(error: Exception) -> InternalError:
    """A bug, with the compiler's line and, where it was running, the user's."""
    what = str(error) if isinstance(error, InternalError) else f"{type(error).__name__}: {error}"
    lines = [f"rmtcompile failed where the model itself runs: {what}", f"  in {_own_place(error)}"]
    if (user := raised_at(error)) != "?":
        lines.append(f"  at {user}")
    lines.append("  help: this is a bug, please report it; fallback='sequential' runs the model as it is")
    return InternalError("\n".join(lines))


def _own_place(error: BaseException) -> str:
    """The innermost line of the compiler at which an error was raised."""
    best, trace = "?", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name.startswith(OURS) and name != __file__:
            text = linecache.getline(name, trace.tb_lineno).strip()
            best = f"{os.path.basename(name)}:{trace.tb_lineno}  {text}"
        trace = trace.tb_next
    return best


# ---- noise -------------------------------------------------------------------------------------------------

_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")
_FUNCTORCH: Any = torch._C._functorch


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch from printing traces of errors that are raised as well, and that one operation of a lifted
    cell runs once a cell (of which torch does not tell whether it is switched on; it is at first). Logging of
    other threads is left alone."""
    thread = threading.get_ident()

    def is_said(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.exc_info is None

    _LOGGER.addFilter(is_said)
    _FUNCTORCH._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        _LOGGER.removeFilter(is_said)
        _FUNCTORCH._set_vmap_fallback_warning_enabled(True)
