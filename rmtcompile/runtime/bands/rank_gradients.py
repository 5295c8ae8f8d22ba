"""Gradients of a run whose bands are in several processes.

    forward     own levels, with messages; all ranks get what is returned
    backward    own levels in reverse, with gradients of messages; all ranks get the sums of gradients

To the caller's autograd a run is one operation, on every rank: of what is differentiable among parameters and
arguments, to what the forward returns. Inside, a rank has a graph of its own levels. Every rank gets the
same gradients of what is returned, since all compute the same of it, and takes those of what its own band has
made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rmtcompile.errors import IgnoredWarning, RankError, UnsupportedError, warn
from rmtcompile.runtime.bands.faults import Fault, raise_any, said
from rmtcompile.runtime.bands.mail import Mail
from rmtcompile.runtime.bands.trail import Trail
from rmtcompile.runtime.contexts import has_hooks, unseen

Forward = Callable[[Trail, Mapping[int, torch.Tensor]], Sequence[torch.Tensor]]
"""Runs the own levels with gradients; gives what is returned. Of tensors that are no leaves of autograd, by
their identity, it reads others in their place, at which backward ends."""


def with_gradients(mail: Mail, wanted: Sequence[torch.Tensor], forward: Forward) -> tuple[torch.Tensor, ...]:
    """What a run gives, as one operation.

    Args:
        wanted: the tensors whose gradients are recorded; the same, in the same order, on all ranks.

    Raises:
        RankError: in backward, which all ranks have to run, where it fails on one of them, or another one
            does not answer any more.
        UnsupportedError: in backward, where another rank is about to do something else.
    """
    if has_hooks():
        warn(
            "what backward needs is kept as it is: torch.utils.checkpoint or save_on_cpu around a program of "
            "several processes has no effect; optimize(..., recompute='level') computes levels again",
            IgnoredWarning,
        )
    found: tuple[torch.Tensor, ...] = _Run.apply(_Work(mail, wanted, forward), *wanted)
    return found


class _Work:
    """One run: its forward, and the graph of its own levels until backward has gone through it."""

    def __init__(self, mail: Mail, wanted: Sequence[torch.Tensor], forward: Forward) -> None:
        self._mail = mail
        self._wanted = list(wanted)
        self._inner = [x if x.is_leaf else x.detach().requires_grad_() for x in wanted]
        self._forward: Forward | None = forward
        self._trail = Trail(mail)
        self._call = mail.words.calls
        self._results: list[torch.Tensor] = []

    def forward(self) -> tuple[torch.Tensor, ...]:
        assert self._forward is not None
        forward, self._forward = self._forward, None
        with torch.enable_grad(), unseen():
            apart = {id(x): y for x, y in zip(self._wanted, self._inner, strict=True) if x is not y}
            self._results = list(forward(self._trail, apart))
        return tuple(result.detach() for result in self._results)

    def backward(self, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        if not self._results:
            raise RuntimeError("backward has gone through this run before: say retain_graph=True then")
        self._agree(grads)
        keeps = torch._C._autograd._get_current_graph_task_keep_graph()
        pairs = [
            (result, grad)
            for result, grad in zip(self._results, grads, strict=True)
            if grad is not None and result.requires_grad
        ]
        pairs += [(token, torch.zeros_like(token)) for token in self._trail.tokens]
        mine, fault = self._own(pairs, keeps)
        if not keeps:
            self._results, self._trail = [], Trail(self._mail)
        self._mail.wait(0, all_of_them=True)
        told = {"fault": said(fault), "has": [value is not None for value in mine]}
        everyone = self._mail.gathered("add up gradients", told)
        raise_any([one["fault"] for one in everyone], fault)
        return self._mail.summed(mine, [one["has"] for one in everyone], self._wanted)

    def _agree(self, grads: Sequence[torch.Tensor | None]) -> None:
        """Find out whether all ranks are about to go back through the same run, from the same loss.

        Raises:
            UnsupportedError: they are not.
        """
        told = {"call": self._call, "grads": [None if grad is None else _sampled(grad) for grad in grads]}
        everyone = self._mail.gathered("run backward", told)
        if len({one["call"] for one in everyone}) > 1:
            lines = [f"rank {rank}: backward of call {one['call']}" for rank, one in enumerate(everyone)]
            self._mail.words.differ("in which order backward runs", lines)
        for values in zip(*(one["grads"] for one in everyone), strict=True):
            if not all(_are_close(values[0], value) for value in values[1:]):
                norms = ["none" if x is None else f"of norm {torch.tensor(x).norm():.3g}" for x in values]
                lines = [f"rank {rank}: gradients {norm}" for rank, norm in enumerate(norms)]
                self._mail.words.differ("they have other losses", lines)

    def _own(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], keeps: bool
    ) -> tuple[list[torch.Tensor | None], Fault | None]:
        """This rank's part of the gradients; what has gone wrong, if something has. Whatever happens, other
        ranks get gradients of all messages, and this one takes those that they send."""
        if not pairs:
            return [None] * len(self._wanted), None
        roots, given = zip(*pairs, strict=True)
        leaves = [*self._inner, self._trail.anchor]
        self._trail.begin()
        try:
            with _without_hooks(self._inner):
                found = torch.autograd.grad(roots, leaves, given, retain_graph=keeps, allow_unused=True)
            return list(found[:-1]), None
        except RankError:
            raise
        except Exception as error:
            fault = Fault(f"rank {self._mail.rank}, {self._trail.where()}", error)
            self._trail.abandon()
            return [None] * len(self._wanted), fault


_SAMPLES = 64
_NEAR = 1e-2
"""Relative difference of gradients that ranks compute of one loss, on devices that may round differently."""


def _sampled(grad: torch.Tensor) -> list[float]:
    """Evenly spaced elements."""
    parts = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
    flat = parts.detach().reshape(-1)
    found: list[float] = flat[:: max(1, flat.numel() // _SAMPLES)].double().tolist()
    return found


def _are_close(one: list[float] | None, other: list[float] | None) -> bool:
    if one is None or other is None or len(one) != len(other):
        return one is other
    a, b = torch.tensor(one), torch.tensor(other)
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    return bool((a - b).norm() <= _NEAR * max(a.norm(), b.norm()))


@contextmanager
def _without_hooks(leaves: Sequence[torch.Tensor]) -> Iterator[None]:
    """Hooks of parameters and arguments see the sums of all ranks, and not each rank's part as well."""
    hooks = [(leaf, found) for leaf in leaves if (found := leaf._backward_hooks)]
    for leaf, _ in hooks:
        leaf._backward_hooks = None
    try:
        yield
    finally:
        for leaf, found in hooks:
            leaf._backward_hooks = found


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, *wanted: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.work = work
        ctx.set_materialize_grads(False)
        found = work.forward()
        ctx.mark_non_differentiable(*(x for x in found if not (x.is_floating_point() or x.is_complex())))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "gradients of gradients do not go from process to process",
                ["backward was called with create_graph=True"],
                "use several devices from one process",
            )
        return (None, *ctx.work.backward(grads))


__all__ = ["with_gradients"]
