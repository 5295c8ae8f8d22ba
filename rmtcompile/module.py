"""Module: what `optimize` gives for a module is a module, too.

    fast = optimize(model)
    fast(x)                             hooks of fast, fast.forward: the program
    fast.state_dict(), fast.to(...)     those of model, its names and its tensors
    outer.fast = fast                   outer.fast.<name of model> in outer's parameters, modules and state

What belongs to a call (`forward` and the hooks around it) is its own. All else that a module has is the
model's: the tables in which torch keeps parameters, buffers and submodules are the very same objects, and
methods are called on the model. Nothing in the model leads back here.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from rmtcompile.binding.objects import Opaque
from rmtcompile.binding.state import CALL_HOOKS
from rmtcompile.compiler.stages import Progress
from rmtcompile.errors import UnsupportedError
from rmtcompile.frontend.tracing import is_as_written
from rmtcompile.installed import Installed
from rmtcompile.ir.modes import uncompiled
from rmtcompile.optimized import OWN, Optimized
from rmtcompile.options import Options

_HOOKS = frozenset(
    (
        "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
    )
)  # fmt: skip
"""Where torch keeps the hooks around a call."""

_TABLES = frozenset(vars(nn.Module())) - _HOOKS - {"training"}
"""Where torch keeps all else that a module has."""

_OF_THE_CALL = frozenset(
    (
        "forward", "compile", "register_forward_hook", "register_forward_pre_hook", "register_backward_hook",
        "register_full_backward_hook", "register_full_backward_pre_hook", "_call_impl", "_wrapped_call_impl",
        "_slow_forward", "_get_backward_hooks", "_get_backward_pre_hooks",
        "_maybe_warn_non_full_backward_hook", "_replicate_for_data_parallel",
    )
)  # fmt: skip
"""Methods of modules that work on the call."""


class Forward(Opaque):
    """The forward of an optimized module: its program, with the signature of the model's own forward."""

    __code__ = Optimized.__call__.__code__  # asked for by torch.export, before it meets our refusal

    def __init__(self, fast: OptimizedModule) -> None:
        self._fast = fast

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        return Optimized.__call__(self._fast, *args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        """As a bound method has it: what wraps forwards (accelerate) wraps this, and binds it again."""
        found: Callable[..., Any] = type(self._fast).forward
        return found

    def __getattr__(self, name: str) -> Any:
        if name == "__signature__":
            return self._fast.__signature__
        raise AttributeError(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Forward) and other._fast is self._fast

    def __hash__(self) -> int:
        return id(self._fast)


class _OwnForward:
    """`fast.forward`, made when it is asked for: kept in the module, it would hold it in a cycle.

    Args:
        like: the forward of the model's class. Asked of the class, it is a function of the same signature:
            what is made for modules (a `Trainer`) reads there which arguments they take.
    """

    def __init__(self, like: Callable[..., Any] = nn.Module.forward) -> None:
        def forward(self: OptimizedModule, *args: Any, **kwargs: Any) -> Any:
            return Forward(self)(*args, **kwargs)

        forward.__doc__ = like.__doc__
        with suppress(TypeError, ValueError):  # what has none that could be read
            forward.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
        self._of_the_class = forward

    def __get__(self, fast: OptimizedModule | None, _: Any = None) -> Any:
        return self._of_the_class if fast is None else Forward(fast)


class OptimizedModule(Optimized, nn.Module):
    """A module that runs on wavefronts; made by `optimize`.

    Parameters, buffers, submodules, their names and all methods are those of the model; attributes are read
    and set there. `forward` and the hooks of calls are its own: hooks run at each call, around the program.
    """

    def __init__(self, model: nn.Module, options: Options, progress: Progress | None) -> None:
        hooks = {key: value for key, value in vars(nn.Module()).items() if key in _HOOKS}
        theirs = {key: value for key, value in vars(model).items() if key in _TABLES}
        vars(self).update({**hooks, **theirs})
        Optimized.__init__(self, model, options, progress)

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the hooks of this module and, inside of them, what is its forward.

        Raises:
            UnsupportedError: there are hooks of all modules, too, which run inside of the program.
        """
        own = vars(self)
        if not any(own[key] for key in CALL_HOOKS):
            return self.forward(*args, **kwargs)
        if nn.modules.module._has_any_global_hook() and not is_as_written():
            raise _hooked_twice()
        return nn.Module.__call__(self, *args, **kwargs)

    forward: Any = _OwnForward()

    @property
    def training(self) -> bool:  # type: ignore[override]
        """Whether the model is in train mode."""
        model: Any = self.model
        return model.training

    def _told(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """The model's own `generate`, whose calls of the model run a program of its forward."""

        @functools.wraps(generate)
        def generated(*args: Any, **kwargs: Any) -> Any:
            if is_as_written():
                return generate(*args, **kwargs)
            with self._lock, self._inside().in_place():
                return generate(*args, **kwargs)

        return generated

    def _inside(self) -> Installed:
        """What stands in the place of the model's forward while the model itself calls it."""
        model, within = self.model, self._within
        assert isinstance(model, nn.Module)
        forward = vars(model).get("forward")
        if within is None or within._module is not model or within._own is not forward:
            within = Installed(model, forward, self.options, self._programs.progress)
            vars(self)["_within"] = within
        inside: Installed = within
        return inside

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """There is nothing to compile.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "an optimized module is compiled already", remedy="choose the compiler with optimize(backend=...)"
        )

    def _replicate_for_data_parallel(self) -> Any:
        raise UnsupportedError(
            "nn.DataParallel copies modules at each call, and a program reads the weights of one model",
            remedy="use DistributedDataParallel(rmtcompile.optimize(model))",
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """What is called stays here, under whatever name; all else is the model's.

        Raises:
            UnsupportedError: the module is to be of another class, as by `fully_shard`.
        """
        if name == "__class__":
            raise UnsupportedError(
                "an optimized module cannot become one of another class, as fully_shard has it",
                [getattr(value, "__name__", repr(value))],
                "a program reads whole weights: use DistributedDataParallel(rmtcompile.optimize(model)), or, "
                "without gradients, bands of layers, rmtcompile.optimize(model, devices=group)",
            )
        own = vars(self)
        called = isinstance(value, Forward) or ("forward" in own and value is own["forward"])
        if name == "forward" and value == Forward(self):
            own.pop("forward", None)  # it is again what it was
        elif called or name == "forward" or name in _HOOKS:
            own[name] = value
        else:
            Optimized.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self):
            object.__delattr__(self, name)
        else:
            delattr(self.model, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.model)})

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        again = Optimized.__deepcopy__(self, memo)
        assert isinstance(again, OptimizedModule)
        memo[id(self)] = again
        vars(again).update(copy.deepcopy(self._around(), memo))
        return again

    def __reduce__(self) -> Any:
        return _made, (type(self.model),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return {**Optimized.__getstate__(self), "around": self._around()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Optimized.__setstate__(self, state)
        vars(self).update(state["around"])

    @property
    def is_wrapped(self) -> bool:
        """Whether others have put something around its calls."""
        return any(value for key, value in self._around().items() if key != "_is_full_backward_hook")

    def _around(self) -> dict[str, Any]:
        """What others have put around its calls: hooks, and what they have set to be called."""
        return {key: value for key, value in vars(self).items() if key not in _TABLES and key not in OWN}


_CLASSES: WeakKeyDictionary[type[nn.Module], type[OptimizedModule]] = WeakKeyDictionary()


def class_for(kind: type[nn.Module]) -> type[OptimizedModule]:
    """The class of optimized modules of models of a class: its `forward` has the signature of theirs."""
    if kind not in _CLASSES:
        about = {"__module__": __name__, "__doc__": OptimizedModule.__doc__}
        body = {"forward": _OwnForward(kind.forward), **about}
        _CLASSES[kind] = type(OptimizedModule.__name__, (OptimizedModule,), body)
    return _CLASSES[kind]


def _made(kind: type[nn.Module]) -> OptimizedModule:
    """One without contents, which unpickling gives it."""
    return OptimizedModule.__new__(class_for(kind))


def _hooked_twice() -> UnsupportedError:
    return UnsupportedError(
        "hooks of all modules would run twice, in the program and around a module with hooks of its own",
        remedy="register the module's own hooks on the model",
    )


def _on_the_model(name: str) -> Callable[..., Any]:
    """A method of modules that works on the model; what returns the model returns what stands for it."""

    @functools.wraps(getattr(nn.Module, name))
    def method(self: OptimizedModule, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.model, name)(*args, **kwargs)
        return self if result is self.model else result

    return method


for _name, _member in vars(nn.Module).items():
    _is_method = isinstance(_member, types.FunctionType) and not _name.startswith("__")
    if _is_method and _name not in _OF_THE_CALL:
        setattr(OptimizedModule, _name, _on_the_model(_name))
