"""What the user may choose."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch


class Chosen(TypedDict, total=False):
    """The arguments of `rmtcompile.optimize` beside the model."""

    segment_size: int | None
    layers: str | None
    plan: str
    backend: str | Callable[..., Any]
    cuda_graphs: str | bool
    fallback: str | None
    verify: bool
    progress: bool | Callable[[str], Any]
    recompute: str | int


@dataclass(frozen=True)
class Options:
    """What the user may choose; see `rmtcompile.optimize`."""

    layers: str | None = None
    segment_size: int | None = None
    plan: str = "auto"
    backend: str | Callable[..., Any] = "auto"
    cuda_graphs: str | bool = "auto"
    fallback: str | None = None
    verify: bool = False
    recompute: str | int = "auto"
    passes_off: frozenset[str] = frozenset()
    min_segments_captured: int = 2
    max_segments_captured: int = 6


def check_options(
    segment_size: Any,
    layers: Any,
    plan: Any,
    backend: Any,
    cuda_graphs: Any,
    fallback: Any,
    verify: Any,
    progress: Any,
    recompute: Any,
) -> None:
    """Check the arguments of `rmtcompile.optimize`.

    Raises:
        ValueError: an option has no such value.
    """
    if plan not in ("auto", "diagonal", "sequential"):
        raise ValueError(f"plan must be 'auto', 'diagonal' or 'sequential', not {plan!r}")
    if fallback not in (None, "sequential"):
        raise ValueError(f"fallback must be None or 'sequential', not {fallback!r}")
    if not (isinstance(backend, str) or callable(backend)):
        raise ValueError(f"backend must be a name or a callable of torch.compile, not {backend!r}")
    if isinstance(backend, str) and backend not in ("auto", "eager", "inductor"):
        _check_backend(backend)
    if cuda_graphs != "auto" and not isinstance(cuda_graphs, bool):
        raise ValueError(f"cuda_graphs must be 'auto', True or False, not {cuda_graphs!r}")
    if cuda_graphs is True and not torch.cuda.is_available():
        raise ValueError("cuda_graphs=True needs a CUDA device; 'auto' records graphs where there is one")
    is_count = isinstance(segment_size, int) and not isinstance(segment_size, bool) and segment_size > 0
    if segment_size is not None and not is_count:
        raise ValueError(f"segment_size must be a positive number of tokens, not {segment_size!r}")
    if layers is not None:
        try:
            re.compile(layers)
        except (re.error, TypeError) as error:
            message = f"layers must be a path or a regular expression, not {layers!r}: {error}"
            raise ValueError(message) from None
    if not isinstance(verify, bool):
        raise ValueError(f"verify must be True or False, not {verify!r}")
    is_levels = isinstance(recompute, int) and not isinstance(recompute, bool) and recompute > 0
    if not is_levels and recompute not in ("auto", "none", "level"):
        raise ValueError(
            f"recompute must be 'auto', 'none', 'level' or a positive number of levels, not {recompute!r}"
        )
    if not isinstance(progress, bool) and not callable(progress):
        raise ValueError(f"progress must be True, False or a callable, not {progress!r}")


def _check_backend(name: str) -> None:
    """Ask `torch.compile` for its backends, which imports dynamo and takes seconds: for seldom names only."""
    dynamo = torch._dynamo
    if name not in dynamo.list_backends(exclude_tags=()):
        usual = ", ".join(dynamo.list_backends())
        raise ValueError(f"backend must be 'auto' or a backend of torch.compile ({usual}), not {name!r}")
