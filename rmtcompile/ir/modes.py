"""Modes: graph modules whose code is made late, functions that are never compiled, the state of autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module

_F = TypeVar("_F", bound=Callable[..., Any])
_dynamo: Any = torch._C._dynamo.eval_frame


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


def graph_module(like: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module of `graph` with the attributes of `like`; its code is made when it is run or shown, which is a
    tenth of the time of a compilation that shows none."""
    module = _LazyGraphModule(like, graph, "GraphModule")
    module.meta = dict(like.meta)
    return module


def lazy_code() -> AbstractContextManager[None]:
    """Within it, `make_fx` makes such modules too."""
    return _use_lazy_graph_module(True)


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """No casts of weights from before, and none kept for later: autocast would remember those of fake
    tensors, and a region that the forward opens inside of another one lets it."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
        torch.clear_autocast_cache()


Autocast = tuple[tuple[str, torch.dtype], ...]
"""Kinds of devices for which autocast is on, each with the dtype that it casts to."""

_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")


def autocast_state() -> Autocast:
    """What autocast does here."""
    if not torch._C._is_any_autocast_enabled():
        return ()
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in _KINDS if torch.is_autocast_enabled(kind))


@contextmanager
def autocast_as(state: Autocast = ()) -> Iterator[None]:
    """Autocast as in `state`, off everywhere if that is empty; no casts are remembered."""
    if not state and not torch._C._is_any_autocast_enabled():
        yield
        return
    kept = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _KINDS]
    wanted, cached = dict(state), torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        for kind, _, dtype in kept:
            torch.set_autocast_enabled(kind, kind in wanted)
            torch.set_autocast_dtype(kind, wanted.get(kind, dtype))
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        for kind, enabled, dtype in kept:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


@contextmanager
def contexts(node: fx.Node) -> Iterator[None]:
    """The regions the node was captured in: meta `context`, expressions such as `torch.autocast(...)`."""
    with ExitStack() as stack:
        for expression in node.meta.get("context", ()):
            stack.enter_context(eval(expression, {"torch": torch}))
        yield
