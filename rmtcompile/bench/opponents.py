"""What is timed: each opponent takes tokens i64[B, T] and gives hidden states (or logits) f[B, T, D]."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

import rmtcompile
from rmtcompile.bench.graphed import SequentialGraphed
from rmtcompile.bench.shapes import Case, parameter_bytes
from rmtcompile.models import ARMT


class Opponent(Protocol):
    """One way to run the model, or to do without it."""

    name: str
    recurrent: bool
    """Whether its results are those of the sequential forward."""
    own_bytes: int
    """Weights that it holds beside those of the model."""

    def prepare(self, ids: Tensor) -> None:
        """Do what is done once for inputs of this shape."""

    def __call__(self, ids: Tensor) -> Tensor:
        """One run, result included; f[B, T, ...]."""

    def flops(self, tokens: int) -> float:
        """Of the model, not of the hardware."""


def result_of(output: Any) -> Tensor:
    """Logits or last hidden states of a model's output."""
    logits: Tensor | None = output.get("logits")
    return output["last_hidden_state"] if logits is None else logits


class Full:
    """The decoder itself with full causal attention (SDPA) over the whole input, eager, no memory tokens.

    The layers are those of the ARMT with their memory switched off: the same weights, the same calls.
    """

    name, recurrent = "full", False
    own_bytes = 0
    longest_on_cpu: ClassVar[int] = 16384

    def __init__(self, case: Case, model: ARMT) -> None:
        self.case, self.model = case, model

    def prepare(self, ids: Tensor) -> None:
        if ids.device.type == "cpu" and ids.shape[1] > self.longest_on_cpu:
            raise Skipped(f"over {self.longest_on_cpu} tokens on a CPU")
        self(ids)

    def __call__(self, ids: Tensor) -> Tensor:
        self.model.memory_cell.reset()
        for layer in self.model.memory_cell.layers:
            layer.writes = False
        try:
            return result_of(self.model.memory_cell.model(input_ids=ids, use_cache=False))
        finally:
            for layer in self.model.memory_cell.layers:
                layer.writes = True

    def flops(self, tokens: int) -> float:
        return self.case.full_flops(tokens)


class Sequential:
    """The reference ARMT's own forward, eager."""

    name, recurrent = "sequential", True
    own_bytes = 0

    def __init__(self, case: Case, model: ARMT) -> None:
        self.case, self.model = case, model

    def prepare(self, ids: Tensor) -> None:
        self(ids)

    def __call__(self, ids: Tensor) -> Tensor:
        return result_of(self.model(ids))

    def flops(self, tokens: int) -> float:
        return self.case.armt_flops(tokens)


class Graphed:
    """Sequential, compiled, one CUDA graph a segment; see `rmtcompile.bench.graphed`."""

    name, recurrent = "graphed", True
    own_bytes = 0

    def __init__(self, case: Case, model: ARMT) -> None:
        self.case = case
        self.runner = SequentialGraphed(model, case.batch)

    def prepare(self, ids: Tensor) -> None:
        self.runner.prepare()
        self(ids)

    def __call__(self, ids: Tensor) -> Tensor:
        return self.runner(ids)

    def flops(self, tokens: int) -> float:
        return self.case.armt_flops(tokens)


class Diagonal:
    """`rmtcompile.optimize(model, **options)`.

    Args:
        own: give it a copy of the model: two optimized forms of one would take the weights from each other.
    """

    recurrent = True

    def __init__(
        self,
        case: Case,
        model: ARMT,
        options: Mapping[str, Any],
        name: str = "diagonal",
        own: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.name, self.case = name, case
        self.own_bytes = parameter_bytes(model) if own else 0
        if own:
            model.memory_cell.reset()
            model = copy.deepcopy(model)
        self.fast = rmtcompile.optimize(model, **{"progress": say or False, "cache": False, **options})

    def prepare(self, ids: Tensor) -> None:
        """Twice: the second call of a length records it."""
        self(ids)
        self(ids)

    def __call__(self, ids: Tensor) -> Tensor:
        return result_of(self.fast(ids))

    def flops(self, tokens: int) -> float:
        return self.case.armt_flops(tokens)


class Handwritten:
    """A script's `Runner(segment, memory)` with `diagonal(ids)`, for tokens i64[T]; weights of its own.

    The script is run as it is, in this process, so that it takes its turn with the others.
    """

    name, recurrent = "handwritten", False

    def __init__(self, case: Case, path: Path) -> None:
        if case.batch != 1 or case.head or case.dtype != torch.bfloat16:
            raise Skipped("the hand-written version takes one input in bf16 and has no head")
        self.case = case
        spec = importlib.util.spec_from_file_location("handwritten", path)
        assert spec is not None and spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        recording = torch.is_grad_enabled()
        spec.loader.exec_module(self.module)
        torch.set_grad_enabled(recording)
        shape = case.shape
        has = tuple(getattr(self.module, n) for n in ("D", "H", "KV", "HD", "FF", "L", "D_MEM"))
        wants = (
            shape.hidden,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.ffn,
            shape.layers,
            case.d_mem,
        )
        if has != wants:
            raise Skipped(f"the hand-written version has the shape {has}, not {wants}")
        with self._attention():
            self.runner = self.module.Runner(case.segment, case.memory)
        weights = [*self.runner.p.values(), self.runner.embed, self.runner.memory, self.runner.norm]
        self.own_bytes = sum(w.numel() * w.element_size() for w in weights)

    @staticmethod
    @contextlib.contextmanager
    def _attention() -> Iterator[None]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            yield

    def prepare(self, ids: Tensor) -> None:
        with self._attention():
            for _, key in self.runner.plan(ids.shape[1] // self.case.segment):
                self.runner.graph(*key)
            self(ids)

    def __call__(self, ids: Tensor) -> Tensor:
        return self.runner.diagonal(ids[0])[None]

    def flops(self, tokens: int) -> float:
        return self.case.armt_flops(tokens)


class Skipped(Exception):
    """An opponent does not take part, for the reason in the message."""
