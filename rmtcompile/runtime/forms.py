"""Forms: one function compiled for sizes, by torch now, or by torch in another process.

    called first          torch.compile traces it and makes kernels, or finds them in its caches
    kept in a folder      what torch compiles ahead of time (`aot_compile`) for arguments of the same kinds
    called from there     nothing is traced; where its guards do not hold, as above
"""

from __future__ import annotations

import hashlib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from rmtcompile.compiler.loading import SIZES, SOURCE
from rmtcompile.runtime.contexts import own_modes, plain_tensors, unseen

Marks = tuple[tuple[int, ...], ...]
"""Dims, by argument."""

_LOGGER = logging.getLogger("rmtcompile")

_READY: dict[str, Callable[[], bytes]] = {}  # by key, of all folders that were read


_CACHES: list[Callable[[], object]] = []  # what is left to be done before the first form is compiled


def offer(ready: Mapping[str, Callable[[], bytes]], otherwise: Callable[[], object]) -> None:
    """Let forms of these keys be called without being compiled.

    Args:
        ready: what reads the contents of each, as `Form.content` gives them; may raise.
        otherwise: called before a form is compiled all the same: gives torch what it has compiled before.
    """
    _READY.update(ready)
    _CACHES.append(otherwise)


class _Kind(NamedTuple):
    """What a form is compiled for, of an argument."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_parameter: bool
    requires_grad: bool

    def empty(self) -> torch.Tensor:
        """A tensor of this kind, of any values."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        if self.is_parameter:
            return torch.nn.Parameter(made, self.requires_grad)
        return made.requires_grad_(self.requires_grad)


class Form:
    """A function of tensors, compiled when it is first called.

    Args:
        function: an emitted one, or one that has an emitted one in its closure.
        about: what tells it from other forms of the same module.
        marks: dims of its arguments that are left open.
        shows_sizes: whether all free sizes of the module that it reads are sizes of its arguments.
        options: of `torch.compile`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        about: Sequence[Any],
        marks: Marks = (),
        shows_sizes: bool = False,
        **options: Any,
    ) -> None:
        self.function, self.marks = function, marks
        self._shows_sizes = shows_sizes
        self._is_open = any(marks)
        self._about = tuple(about)
        self._options = options
        is_ours = SOURCE in getattr(_emitted(function), "__globals__", {})  # a module of torch.fx has none
        can_be = options.get("backend") == "inductor" and options.get("fullgraph", False)
        self._can_be_kept: bool = can_be and is_ours
        self._kinds: list[_Kind] | None = None  # of the first call without gradients
        self._content: bytes | None = None
        self._ready: Any = None
        self._made: set[bool] = set()  # with and without gradients

    @cached_property
    def _compiled(self) -> Any:
        """What traces and compiles; to make the first of a process imports what takes a second."""
        while _CACHES:
            _CACHES.pop()()
        return torch.compile(self.function, **self._options)

    def __call__(self, *args: torch.Tensor) -> Any:
        """Run it.

        Where a dim is open the compiler looks at where in its memory an argument starts, too: what it makes
        for a part that starts later is for such parts only, what it makes for one that starts at 0 is for
        all. So it is made for copies that do.
        """
        wants_gradients = torch.is_grad_enabled()
        if not wants_gradients:
            args = tuple(_without_gradient(arg) for arg in args)
        if not wants_gradients and self._kinds is None:
            self._kinds = [_kind(arg) for arg in args]
            self._can_be_kept = self._can_be_kept and are_apart(args)
            self._look()
        if self._ready is not None and not wants_gradients and self._ready.guard_check(*args):
            return self._ready.fn(*args)
        if wants_gradients not in self._made:
            self._made.add(wants_gradients)
            if self._is_open and any(arg.storage_offset() for arg in args):
                with unseen():  # a checkpoint counts what its part keeps for backward
                    self._compiled(*opened_at([_from_start(arg) for arg in args], self.marks))
        return self._compiled(*(opened_at(args, self.marks) if self._is_open else args))

    # ---- another process -----------------------------------------------------------------------------------

    @property
    def key(self) -> str | None:
        """Under which it is kept; None where it was never called without gradients, or cannot be kept."""
        return self._key() if self._kinds is not None and self._can_be_kept else None

    def content(self) -> bytes | None:
        """With what another process runs it without compiling; None where it has no key, or torch cannot
        compile it ahead of time, which is logged."""
        if self._kinds is None or not self._can_be_kept:
            return None
        if self._content is None:
            try:
                with plain_tensors(), own_modes(), _ahead_of_time(), self._under_one_name():
                    args = opened_at([kind.empty() for kind in self._kinds], self.marks)
                    compiled: Any = torch.compile(self.function, **self._options)
                    ahead = compiled.aot_compile((tuple(args), {}))
                    self._content = ahead.serialize(ahead, self._outside()).serialized_data
            except Exception as error:  # an interface that is young: the form is compiled there again
                text = "rmtcompile: %s is not saved, processes that load it compile it again: %s"
                _LOGGER.warning(text, self.function.__name__, error)
                self._can_be_kept = False
        return self._content

    def _look(self) -> None:
        """Take it from a folder, if it lies in one that was read."""
        read = _READY.get(self._key()) if self._can_be_kept and _READY else None
        if read is None:
            return
        try:
            content, known = read(), _emitted(self.function).__globals__
            with self._under_one_name():
                self._ready = torch.compiler.load_compiled_function(
                    io.BytesIO(content), f_globals=known, external_data=self._outside()
                )
            self._content = content
        except Exception as error:  # whatever it is, it is compiled instead
            _LOGGER.warning("rmtcompile: %s is compiled again: %s", self.function.__name__, error)

    def _key(self) -> str:
        """Names what it does, and the kinds of its arguments but for open dims."""
        assert self._kinds is not None
        kinds = [
            (
                [None if d in dims else n for d, n in enumerate(kind.shape)],
                str(kind.dtype), str(kind.device), kind.is_parameter, kind.requires_grad,
            )
            for kind, dims in zip(self._kinds, self.marks or ((),) * len(self._kinds), strict=True)
        ]  # fmt: skip
        return _digest(self._module, _emitted(self.function).__name__, self._about, self.marks, kinds)

    @property
    def _module(self) -> tuple[str, Any]:
        """What the emitted module is, for this form."""
        known = _emitted(self.function).__globals__
        return known[SOURCE], {} if self._shows_sizes else known[SIZES]

    @contextmanager
    def _under_one_name(self) -> Iterator[None]:
        """For a while the emitted module is called by its contents. Modules are numbered in the order in
        which a process makes them, and what is kept imports the one that it was made of."""
        known = _emitted(self.function).__globals__
        own, name = known["__name__"], f"rmtcompile_{_digest(self._module)}"
        sys.modules[name], known["__name__"] = sys.modules[own], name
        try:
            yield
        finally:
            known["__name__"] = own
            del sys.modules[name]

    def _outside(self) -> dict[str, Any]:
        """What is no part of the content, by its name in the closure."""
        cells = zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True)
        return {name: cell.cell_contents for name, cell in cells if callable(cell.cell_contents)}


def are_apart(args: Sequence[torch.Tensor]) -> bool:
    """Whether no two arguments lie in the same memory. The compiler looks at that in the arguments that it is
    given, and guards nothing where they do not."""
    try:
        spans = sorted(_span(arg) for arg in args if arg.numel())
    except RuntimeError:  # one of them has no memory of its own: under a transform
        return False
    return all(end <= start for (_, end), (start, _) in pairwise(spans))


def _span(arg: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte, and behind its last."""
    last = sum((n - 1) * stride for n, stride in zip(arg.shape, arg.stride(), strict=True))
    return arg.data_ptr(), arg.data_ptr() + (last + 1) * arg.element_size()


def _digest(*said: Any) -> str:
    return hashlib.sha256(repr(said).encode()).hexdigest()[:24]


def _ahead_of_time() -> AbstractContextManager[Any]:
    """What `torch.compile` needs to compile ahead of time: a setting in torch 2.11, nothing later."""
    from torch._dynamo import config

    if hasattr(config, "enable_aot_compile"):
        return config.patch(enable_aot_compile=True)
    return nullcontext()


def opened_at(args: Sequence[torch.Tensor], marks: Marks) -> list[torch.Tensor]:
    """The arguments with marks, which stay on their tensor objects, and so go on views of this call; the
    backward of a whole view costs nothing."""
    if not any(marks):
        return list(args)
    views = [arg.view_as(arg) if dims else arg for arg, dims in zip(args, marks, strict=True)]
    for view, dims in zip(views, marks, strict=True):
        for dim in dims:
            torch._dynamo.mark_dynamic(view, dim)
    return views


def _without_gradient(arg: torch.Tensor) -> torch.Tensor:
    """The same values. A view of a parameter says that it requires a gradient, even one taken where none are
    recorded; copies of it do not, and no form is made twice for that."""
    return arg.detach() if arg.requires_grad and not isinstance(arg, torch.nn.Parameter) else arg


def _kind(arg: torch.Tensor) -> _Kind:
    is_parameter = isinstance(arg, torch.nn.Parameter)
    return _Kind(tuple(arg.shape), arg.stride(), arg.dtype, arg.device, is_parameter, arg.requires_grad)


def _emitted(function: Callable[..., Any]) -> Any:
    """The emitted function that a function is, or runs."""
    inner = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return next((one for one in inner if callable(one)), function)


def _from_start(value: torch.Tensor) -> torch.Tensor:
    """A copy of the same kind and strides that starts where its memory does; parameters, which nothing
    writes, are copied only where they do not."""
    is_parameter = isinstance(value, torch.nn.Parameter)
    if is_parameter and not value.storage_offset():
        return value
    if not value.numel():
        return value.clone()
    extent = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True)) + 1
    copy = value.as_strided((extent,), (1,)).clone().as_strided(value.shape, value.stride(), 0)
    return torch.nn.Parameter(copy.detach(), value.requires_grad) if is_parameter else copy
