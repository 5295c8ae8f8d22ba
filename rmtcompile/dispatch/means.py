"""Means: a program that draws random numbers and its model, compared with every number at its mean.

    dropout(x, 0.1)     x                    rand([B, T])      0.5
    bernoulli(p)        p                    randn_like(x)     0

Cells draw in another order than the model, so that values agree in distribution only. With each number at its
mean both are computed as if nothing were drawn, and have to be equal. It is done where operations are
executed, so cells run uncompiled meanwhile. Generators are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.ir.randomness import draws
from rmtcompile.ir.schema import bound
from rmtcompile.runtime.contexts import same_numbers
from rmtcompile.runtime.execute import Executor


def is_drawing(compiled: Compiled) -> bool:
    """Whether a program draws random numbers."""
    return compiled.longest.draws


@contextmanager
def without_draws(compiled: Compiled, executor: Executor) -> Iterator[None]:
    """Within it, the model and its program give what they give with each random number at its mean."""
    if not is_drawing(compiled):
        yield
        return
    with same_numbers(executor.device), executor.uncompiled(), Means():
        yield


class Means(TorchDispatchMode):
    """Operations that draw give means; those of which no mean is known give what they draw."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not draws(func):
            return func(*args, **kwargs)
        given = bound(func, args, kwargs)
        idle = next((name for name in ("dropout_p", "dropout") if given.get(name)), None)
        if idle is not None:
            return func(**_spelt(func, {**given, idle: 0.0}))
        mean = _MEANS.get(func._opname.removesuffix("_"))
        means = tuple(_apart(value) for value in mean(given)) if mean is not None else ()
        drawn = func(*args, **kwargs)
        for value, filler in zip(drawn if isinstance(drawn, tuple) else (drawn,), means, strict=False):
            value.copy_(filler) if isinstance(filler, torch.Tensor) else value.fill_(filler)
        return drawn


def _apart(value: Any) -> Any:
    """A copy of a tensor: the operation may write over what its mean is computed from."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _spelt(func: Any, named: dict[str, Any]) -> dict[str, Any]:
    """Those of them that a call takes by name; `self` is given as it is."""
    return {a.name: named[a.name] for a in func._schema.arguments if a.name in named}


def _normal(given: dict[str, Any]) -> tuple[Any, ...]:
    return (given.get("mean", 0.0),)


def _permutation(given: dict[str, Any]) -> tuple[Any, ...]:
    return (torch.arange(given["n"], device=given.get("device")),)


_MEANS: dict[str, Callable[[dict[str, Any]], tuple[Any, ...]]] = {
    "bernoulli": lambda given: (given["p"] if "p" in given else given["self"],),
    "native_dropout": lambda given: (given["input"], True),
    "_fused_dropout": lambda given: (given["self"], 1),
    "rand": lambda given: (0.5,),
    "rand_like": lambda given: (0.5,),
    "uniform": lambda given: ((given["from"] + given["to"]) / 2,),
    "randn": lambda given: (0.0,),
    "randn_like": lambda given: (0.0,),
    "normal": _normal,
    "normal_functional": _normal,
    "log_normal": lambda given: (1.0,),
    "exponential": lambda given: (1 / given["lambd"],),
    "geometric": lambda given: (round(1 / given["p"]),),
    "cauchy": lambda given: (given["median"],),
    "poisson": lambda given: (given["self"],),
    "binomial": lambda given: (given["count"] * given["prob"],),
    "_standard_gamma": lambda given: (given["self"],),
    "_sample_dirichlet": lambda given: (given["self"] / given["self"].sum(-1, keepdim=True),),
    "randint": lambda given: (given.get("low", 0),),
    "randint_like": lambda given: (given.get("low", 0),),
    "random": lambda given: (given.get("from", 0),),
    "randperm": _permutation,
    "multinomial": lambda given: (0,),
    "rrelu_with_noise": lambda given: (given["self"],),
    "rrelu_with_noise_functional": lambda given: (given["self"], 1.0),
}
"""By operation: the means of its results, numbers or tensors, from its arguments."""
