"""Kinds of tensors and wrappers: what a program can hold, and how a refusal names the rest.

A program reads strided tensors, and stacks those that the layers hold.  A quantised or sharded parameter has
the shape and type of a plain one, and another way to compute; it is told from a plain one here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from rmtcompile.binding.state import roots_of
from rmtcompile.errors import CaptureError, UnsupportedError

_OWN_FUNCTION: Any = torch._C._disabled_torch_function_impl
_OWN_DISPATCH: Any = torch._C._disabled_torch_dispatch_impl

_SHARDED = ": torch.distributed.tensor.DTensor"


@functools.cache
def _is_plain_class(cls: type) -> bool:
    """Whether tensors of a class compute as `torch.Tensor` does: `nn.Parameter` and its subclasses do."""
    if cls is torch.Tensor or issubclass(cls, FakeTensor):
        return True
    own: Any = cls
    return own.__torch_function__ is _OWN_FUNCTION and own.__torch_dispatch__ is _OWN_DISPATCH


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is dense and strided, of no subclass with a behaviour of its own."""
    if not _is_plain_class(type(tensor)):
        return False
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized


def kind_name(tensor: torch.Tensor) -> str:
    """What a tensor that is not plain is called."""
    cls = type(tensor)
    if not _is_plain_class(cls):
        return f"{cls.__module__}.{cls.__qualname__}"
    if tensor.is_nested:
        return "a nested tensor"
    return f"a quantised tensor, {tensor.dtype}" if tensor.is_quantized else f"a tensor of {tensor.layout}"


def held_oddly(fn: Callable[..., Any]) -> Iterator[str]:
    """`layers.0.weight: torchao.Quantized` of each parameter and buffer that is not plain."""
    for name, root in roots_of(fn).items():
        for path, tensor in (*root.named_parameters(), *root.named_buffers()):
            if not is_plain(tensor):
                yield f"{name}.{path}".strip(".") + f": {kind_name(tensor)}"


def refuse_odd_arguments(args: Any, kwargs: Any) -> None:
    """Refuse arguments with a behaviour of their own, which a program would pass over."""
    odd = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and not is_plain(x)]
    if odd:
        raise UnsupportedError(
            "an argument is not a plain tensor",
            sorted({kind_name(tensor) for tensor in odd}),
            "pass plain, strided tensors (`.as_subclass(torch.Tensor)`, `.to_dense()`, `.full_tensor()`)",
        )


def refuse_model(fn: Callable[..., Any]) -> None:
    """Refuse models that tracing would change, or whose wrapper does its work around the forward."""
    roots = roots_of(fn)
    unready = [
        f"{name}.{path}".strip(".")
        for name, root in roots.items()
        for path, tensor in (*root.named_parameters(), *root.named_buffers())
        if nn.parameter.is_lazy(tensor)
    ]
    if unready:
        raise CaptureError(
            "the model has parameters that are not initialised yet",
            unready[:4],
            "run the model once before optimizing it",
        )
    sharded = [text for text in held_oddly(fn) if text.endswith(_SHARDED)]
    if sharded:
        raise CaptureError(
            "the parameters are sharded over several processes (FSDP, tensor parallelism)",
            sharded[:4],
            "a program stacks the whole weights of its layers: replicate them, with "
            "DistributedDataParallel(rmtcompile.optimize(model)), or, without gradients, give each process a "
            "band of layers, with rmtcompile.optimize(model, devices=group)",
        )
    wrapped = [
        f"{type(module).__module__}.{type(module).__qualname__}"
        for root in roots.values()
        for module in root.modules()
        if isinstance(module, nn.parallel.DistributedDataParallel)
        and (torch.is_grad_enabled() or (module.broadcast_buffers and any(True for _ in module.buffers())))
    ]
    if wrapped:
        raise CaptureError(
            "a wrapper around the model joins gradients or buffers of several processes",
            wrapped[:4],
            "put it around the program: DistributedDataParallel(rmtcompile.optimize(model))",
        )
