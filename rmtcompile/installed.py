"""Install: a program in the place of a model's own forward, until it is taken away again.

model.forward                   ->      model.forward = Installed(own forward)
wrapped by others meanwhile     ->      runs the program; after `remove` the own forward, wrapped as it is
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rmtcompile.compiler.stages import Progress
from rmtcompile.optimized import Optimized
from rmtcompile.options import Options

_NAME = "_rmtcompile_program"


class Installed(Optimized):
    """The forward of a model in which a program is installed; made by `rmtcompile.install`.

    Args:
        module: the model.
        own: what was its `forward` attribute; None for the method of its class.
    """

    def __init__(
        self, module: nn.Module, own: Any, options: Options, progress: Progress | None = None
    ) -> None:
        forward = types.MethodType(type(module).forward, module) if own is None else own
        vars(self).update(_module=module, _own=own, _is_removed=False)
        super().__init__(forward, options, progress)

    @classmethod
    def into(cls, module: nn.Module, options: Options, progress: Progress | None) -> Installed:
        """Put a program into a model."""
        program = cls(module, vars(module).get("forward"), options, progress)
        vars(module).update({"forward": program, _NAME: program})
        return program

    @property
    def __func__(self) -> Callable[..., Any]:
        """As a bound method has it: what wraps forwards (accelerate) wraps this, and binds it again, maybe to
        a copy of the model."""

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            program = self if module is self._module else installed_in(module)
            if program is None:
                return type(module).forward(module, *args, **kwargs)
            return program(*args, **kwargs)

        return forward

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it, the model's own calls run the program; where one is installed, that one."""
        own = vars(self._module)
        if installed_in(self._module) is not None:
            yield
            return
        own["forward"] = self
        try:
            yield
        finally:
            if own.get("forward") is self:
                del own["forward"]
                if self._own is not None:
                    own["forward"] = self._own

    def remove(self) -> None:
        """Let the model run its own forward again."""
        own = vars(self._module)
        vars(self)["_is_removed"] = True
        own.pop(_NAME, None)
        if own.get("forward") is self:
            del own["forward"]
            if self._own is not None:
                own["forward"] = self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program, or the model's own forward once it is removed."""
        return (self.model if self._is_removed else super().__call__)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Installed:
        module = copy.deepcopy(self._module, memo)
        if id(self) not in memo:  # the model was not copied yet, and has copied this, too
            again = Installed(module, copy.deepcopy(self._own, memo), self.options, self._programs.progress)
            vars(again)["_is_removed"] = self._is_removed
            memo[id(self)] = again
        return memo[id(self)]

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self._module, "own": self._own, "options": self.options, "is": self._is_removed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"], state["own"], state["options"])  # type: ignore[misc]
        vars(self)["_is_removed"] = state["is"]


def installed_in(model: Any) -> Installed | None:
    """The program that is installed in a model."""
    return vars(model).get(_NAME) if isinstance(model, nn.Module) else None


def unwrapped(model: Callable[..., Any]) -> Any:
    """The model itself of what `optimize` or `torch.compile` gave for one."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    while True:
        if isinstance(model, Optimized):
            model = model.model
        elif dynamo is not None and isinstance(model, dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model
