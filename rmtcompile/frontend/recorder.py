"""Recorder: which module runs while the forward is traced, and where in the user's code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rmtcompile.binding.captured import Call
from rmtcompile.binding.kinds import is_plain
from rmtcompile.binding.objects import Opaque
from rmtcompile.binding.state import Snapshot
from rmtcompile.errors import CaptureError
from rmtcompile.frontend.blame import user_places
from rmtcompile.ir.fakes import fake_of
from rmtcompile.ir.modes import autocast_state


class Recorder:
    """Follows module calls while the forward runs and labels each node that is traced."""

    def __init__(self, names: dict[int, str], snapshot: Snapshot, whole: bool) -> None:
        self.whole = whole  # traced above autograd and transforms
        self.has_gradients = torch.is_grad_enabled()
        self.transforms = False  # whether a transform of torch.func was at work, or gradients were taken
        self.calls: list[Call] = []
        self.stack: list[int] = []
        self.names = names
        self.snapshot = snapshot
        self.roots: dict[str, nn.Module] = {}
        self.unseen: set[tuple[int, str]] = set()  # what such modules may have read

    def takes_gradients(self) -> None:
        """Note that the forward takes gradients itself."""
        self.transforms = True

    def enter(self, module: nn.Module, _: Any) -> None:
        if isinstance(module, Opaque):  # it calls a module that it stands for
            return
        if id(module) not in self.names:  # reached by a way that `roots_of` does not see
            name = f"module{len(self.roots)}"
            self.roots[name] = module
            self.snapshot.add(name, module)
            self.unseen |= {(id(child), key) for child in module.modules() for key in child.__dict__}
            for path, child in module.named_modules(remove_duplicate=False):
                self.names.setdefault(id(child), f"{name}.{path}" if path else name)
        parent = self.stack[-1] if self.stack else None
        self.calls.append(Call(len(self.calls), self.names[id(module)], id(module), parent))
        self.stack.append(self.calls[-1].index)

    def leave(self, module: nn.Module, *_: Any) -> None:
        if self.stack and self.calls[self.stack[-1]].module == id(module):
            self.stack.pop()

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = (
            nn.modules.module.register_module_forward_pre_hook(self.enter),
            nn.modules.module.register_module_forward_hook(self.leave, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def label_nodes(self, tracer: Any, fakes: FakeTensorMode) -> None:
        """Make the running tracer note the scope and the place in the user's code on each node that it makes,
        and keep parameters: it would look for them, and make fake values of them, at each use.

        Args:
            fakes: the mode of the fake tensors.
        """
        create, argument = tracer.create_node, tracer.create_arg
        held: dict[int, tuple[str, torch.Tensor]] = {}  # name and value of each parameter

        def labeled(create: Callable[..., fx.Node], args: Any, kwargs: Any) -> fx.Node:
            if not self.whole:
                self._refuse_regions()
            elif torch._C._functorch.peek_interpreter_stack() is not None:
                self.transforms = True
            node = create(*args, **kwargs)
            node.meta["scope"] = tuple(self.stack)
            node.meta["site"] = places = tuple(islice(user_places(sys._getframe(2)), 2))
            node.meta["source"] = places[0][0] if places else "?"
            node.meta["autocast"] = autocast_state()
            return node

        def create_node(*args: Any, **kwargs: Any) -> fx.Node:
            return labeled(create, args, kwargs)

        def create_arg(value: Any) -> Any:
            if type(value) is not nn.Parameter or not is_plain(value) or value.is_meta:
                return argument(value)
            if id(value) not in held:
                name = tracer.get_fresh_qualname("_param_constant")
                setattr(tracer.root, name, value)
                held[id(value)] = name, fake_of(fakes, value)
            name, fake = held[id(value)]
            node = labeled(tracer.graph.create_node, ("get_attr", name), {})
            node.meta["val"] = fake
            return node

        tracer.create_node = create_node
        tracer.create_arg = create_arg

    def _refuse_regions(self) -> None:
        """Below autograd it does not show where a region without gradients begins."""
        if self.has_gradients and not torch.is_grad_enabled():
            places = list(islice(user_places(sys._getframe(3)), 1))
            raise CaptureError(
                "the forward takes gradients itself, and has a region without them",
                [f"at {place[0]}" for place in places],
                "run it under torch.no_grad(), or write the gradient out",
            )


__all__ = ["Recorder"]
