"""Errors against a reference in higher precision, on one input and along many segments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rmtcompile.bench.opponents import result_of
from rmtcompile.models import ARMT

Runs = Mapping[str, Callable[[Tensor], Tensor]]


def relative_error(result: Tensor, reference: Tensor, piece: int = 1024) -> float:
    """|result - reference| / |reference| over everything, piece by piece along the tokens; NaN stays NaN."""
    difference = total = 0.0
    for a, b in zip(result.split(piece, dim=1), reference.split(piece, dim=1), strict=True):
        wide = b.double()
        difference += float((a.double() - wide).square().sum())
        total += float(wide.square().sum())
    return float((difference / total) ** 0.5) if total else float(difference > 0)


def in_dtype(model: ARMT, dtype: torch.dtype) -> ARMT:
    """A copy of the model with the same numbers in another dtype."""
    model.memory_cell.reset()
    return copy.deepcopy(model).to(dtype)


def errors(model: ARMT, runs: Runs, ids: Tensor) -> dict[str, Any]:
    """The relative error of each run against the sequential forward in float64, with the same weights."""
    wide = in_dtype(model, torch.float64)
    reference = result_of(wide(ids))
    del wide
    found = {name: relative_error(run(ids), reference) for name, run in runs.items()}
    return {"tokens": ids.shape[1], "reference": "float64", "relative_error": found}


def accumulation(model: ARMT, runs: Runs, ids: Tensor) -> dict[str, Any]:
    """Error and equal greedy tokens per segment, against the sequential forward in float32.

    The model has no head: logits are hidden states times the embedding table (tied weights), taken segment by
    segment, in each run's own dtype.
    """
    size = model.config.segment_size
    table = model.memory_cell.model.get_input_embeddings().weight
    wide = in_dtype(model, torch.float32)
    reference = result_of(wide(ids))
    wide_table = wide.memory_cell.model.get_input_embeddings().weight
    results = {name: run(ids) for name, run in runs.items()}
    hidden: dict[str, list[float]] = {name: [] for name in runs}
    logits: dict[str, list[float]] = {name: [] for name in runs}
    equal: dict[str, list[float]] = {name: [] for name in runs}
    for start in range(0, ids.shape[1], size):
        piece = slice(start, start + size)
        expected = reference[:, piece] @ wide_table.T
        best = expected.argmax(-1)
        for name, result in results.items():
            got = result[:, piece] @ table.T
            hidden[name].append(relative_error(result[:, piece], reference[:, piece]))
            logits[name].append(relative_error(got, expected))
            equal[name].append(float((got.argmax(-1) == best).float().mean()))
    return {
        "tokens": ids.shape[1],
        "segment": size,
        "reference": "float32",
        "hidden_error": hidden,
        "logits_error": logits,
        "equal_greedy": equal,
    }
