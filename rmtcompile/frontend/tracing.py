"""Tracing: what would leak out of a forward that runs on fake tensors, and is kept in."""

from __future__ import annotations

import gc
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode

from rmtcompile.errors import CaptureError
from rmtcompile.frontend.blame import user_source

_F = TypeVar("_F", bound=Callable[..., Any])
_dynamo: Any = torch._C._dynamo.eval_frame


@contextmanager
def uncollected() -> Iterator[None]:
    """No collections of cyclic garbage: nearly all that a capture makes stays, and to go over it again and
    again takes a tenth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Here(threading.local):
    as_written = 0


_here = _Here()


def is_as_written() -> bool:
    """Whether models run as they were written in this thread, without programs of theirs."""
    return _here.as_written > 0


def uncompiled(fn: _F) -> _F:
    """Marks a function that `torch.compile` around it runs as it is, with all that it calls. Dynamo, whose
    import takes seconds, reads these marks once it is there."""
    skip = _dynamo._FrameAction.SKIP
    _dynamo.set_code_exec_strategy(fn.__code__, _dynamo._FrameExecStrategy(skip, skip))
    vars(fn)["_torchdynamo_disable"] = True
    vars(fn)["_torchdynamo_disable_msg"] = (
        "a program of rmtcompile runs as it is: compile what is around it, export fast.model"
    )
    return fn


@contextmanager
def as_written() -> Iterator[None]:
    """Parts of a model of which `optimize` has made something run as they were written: while the model is
    traced, and where a program of it is compared with it."""
    _here.as_written += 1
    try:
        yield
    finally:
        _here.as_written -= 1


@contextmanager
def uncompiled_callables() -> Iterator[None]:
    """What `torch.compile` has wrapped, the model or parts of it, runs as it was written. Nothing is to do
    where dynamo is not imported, which takes seconds: then nothing is wrapped."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    from torch._dynamo import config

    with (
        torch.compiler.set_stance("force_eager"),
        config.patch(error_on_nested_fx_trace=False),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=".* when there are global hooks on modules")
        yield


_ONLY_FAKE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


class SharedData(TorchFunctionMode):
    """Reads `p.data` as `p.detach()`, which counts its writes as those of p, and refuses `p.data = x`.

    Attributes:
        failed: where an operation has failed since its operands are fake, and how.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed: tuple[str, Exception] | None = None

    def refuse_swallowed(self) -> None:
        """Refuse a forward that came to its end in spite of such an error: what it did instead is no part of
        the model."""
        if self.failed is not None:
            place, error = self.failed
            raise CaptureError(
                f"the forward goes on after an error that only tracing raises ({error})",
                [f"at {place}"],
                "decide it from shapes or Python values",
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        data: Any = torch.Tensor.data
        if args and isinstance(args[0], nn.Parameter):
            if func == data.__get__:
                return args[0].detach()
            if func == data.__set__:
                raise CaptureError(
                    "the forward writes into a parameter",
                    [f"at {user_source(sys._getframe(1))}"],
                    "run the model once before optimizing it if this happens on the first call only",
                )
        try:
            return func(*args, **(kwargs or {}))
        except Exception as error:
            if self.failed is None and (isinstance(error, _ONLY_FAKE) or func is torch.Tensor.numpy):
                self.failed = user_source(sys._getframe(1)), error
            raise


@contextmanager
def saved_in_their_way() -> Iterator[dict[str, None]]:
    """Notes, in this thread, where the forward keeps what gradients need in a way of its own: checkpoints
    that compute it again, `save_on_cpu`. A program keeps it as any forward does."""
    hooks: Any = torch.autograd.graph.saved_tensors_hooks
    enter, thread = hooks.__enter__, threading.get_ident()
    found: dict[str, None] = {}

    def noted(self: Any) -> Any:
        if torch.is_grad_enabled() and threading.get_ident() == thread:
            is_checkpoint = type(self).__module__ == "torch.utils.checkpoint"
            name = "gradient checkpointing" if is_checkpoint else type(self).__name__
            found[f"{name}, at {user_source(sys._getframe(1))}"] = None
        return enter(self)

    hooks.__enter__ = noted
    try:
        yield found
    finally:
        hooks.__enter__ = enter


@contextmanager
def refused_functions() -> Iterator[None]:
    """Refuses, in this thread, custom autograd Functions where gradients are recorded: what is traced are the
    operations of their forward, and their backward would be lost. Those of torch itself only mark what is
    computed again."""
    apply: Any = torch.autograd.Function.__dict__["apply"]
    thread = threading.get_ident()

    def checked(cls: Any, *args: Any, **kwargs: Any) -> Any:
        own = not cls.__module__.startswith("torch.") or cls is torch.utils.checkpoint.CheckpointFunction
        if own and torch.is_grad_enabled() and threading.get_ident() == thread:
            raise CaptureError(
                "the forward has a backward of its own, which tracing cannot see",
                [f"{cls.__name__} at {user_source(sys._getframe(1))}"],
                "run it under torch.no_grad(), or let autograd differentiate the operations (checkpoints: "
                "with use_reentrant=False)",
            )
        return apply.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(checked)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
