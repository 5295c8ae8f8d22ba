"""Tracing: what would leak out of a forward that runs on fake tensors, and is kept in."""

from __future__ import annotations

import functools
import gc
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode

from rmtcompile.errors import CaptureError
from rmtcompile.frontend.blame import is_ours, user_source


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
def saved_in_their_way(checkpoints: list[str]) -> Iterator[dict[str, None]]:
    """Notes, in this thread, where the forward keeps what gradients need in a way of its own (`save_on_cpu`):
    a program keeps it as any forward does.

    Args:
        checkpoints: gets where the forward asks that backward computes a part again, as "file:line".
    """
    hooks: Any = torch.autograd.graph.saved_tensors_hooks
    enter, thread = hooks.__enter__, threading.get_ident()
    found: dict[str, None] = {}

    def noted(self: Any) -> Any:
        if torch.is_grad_enabled() and threading.get_ident() == thread:
            place = user_source(sys._getframe(1))
            if type(self).__module__ == "torch.utils.checkpoint":
                checkpoints.append(place)
            else:
                found[f"{type(self).__name__}, at {place}"] = None
        return enter(self)

    hooks.__enter__ = noted
    try:
        yield found
    finally:
        hooks.__enter__ = enter


@contextmanager
def refused_functions(checkpoints: list[str]) -> Iterator[None]:
    """Refuses, in this thread, custom autograd Functions where gradients are recorded: what is traced are the
    operations of their forward, and their backward would be lost. Checkpoints are run as if they were none.

    Args:
        checkpoints: gets where the forward asks for reentrant ones, as "file:line".
    """
    apply: Any = torch.autograd.Function.__dict__["apply"]
    thread = threading.get_ident()

    def checked(cls: Any, *args: Any, **kwargs: Any) -> Any:
        is_mine = torch.is_grad_enabled() and threading.get_ident() == thread
        is_reentrant = cls is torch.utils.checkpoint.CheckpointFunction
        if is_mine and is_reentrant and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
            function, _, *inputs = args
            checkpoints.append(user_source(sys._getframe(1)))
            return function(*inputs)
        if is_mine and (is_reentrant or not cls.__module__.startswith("torch.")):
            raise CaptureError(
                "the forward has a backward of its own, which tracing cannot see",
                [f"{cls.__name__} at {user_source(sys._getframe(1))}"],
                "run it under torch.no_grad(), or let autograd differentiate the operations (a checkpoint of "
                "inputs without gradients: with use_reentrant=False)",
            )
        return apply.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(checked)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


_DRAWS = {
    random: (
        "random", "uniform", "randint", "randrange", "choice", "choices", "sample", "shuffle", "gauss",
        "normalvariate", "betavariate", "expovariate", "getrandbits",
    ),
    np.random: (
        "rand", "randn", "random", "random_sample", "uniform", "normal", "randint", "choice", "binomial",
        "permutation", "shuffle", "beta", "exponential", "standard_normal",
    ),
}  # fmt: skip
"""Functions that draw numbers of Python's or NumPy's shared generator."""


@contextmanager
def refused_draws() -> Iterator[None]:
    """Refuses, in this thread, such draws: what the forward makes of the number (leaving out a layer) would
    be the same in each call of the program."""
    thread = threading.get_ident()
    kept = [(module, name, getattr(module, name)) for module, names in _DRAWS.items() for name in names]

    def refusing(draw: Any, name: str) -> Any:
        @functools.wraps(draw)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread and not is_ours(sys._getframe(1).f_code.co_filename):
                raise CaptureError(
                    "the forward draws random numbers in Python, which would be the same at each later call",
                    [f"{name} at {user_source(sys._getframe(1))}"],
                    "draw tensors from torch (dropout, torch.rand_like), or switch it off (model.eval())",
                )
            return draw(*args, **kwargs)

        return checked

    for module, name, draw in kept:
        setattr(module, name, refusing(draw, f"{module.__name__}.{name}"))
    try:
        yield
    finally:
        for module, name, draw in kept:
            setattr(module, name, draw)


def fake_like(mode: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    """A fake tensor of the same kind, which requires gradients as the given one does."""
    if isinstance(value, FakeTensor):
        with mode:
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    else:
        fake = mode.from_tensor(value.detach(), static_shapes=True)
    return fake.requires_grad_() if value.requires_grad else fake
