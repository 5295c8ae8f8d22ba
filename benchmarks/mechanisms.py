"""What each mechanism costs, on small models of the tests: the first call, the segments that were captured
for it, and how parallel the schedule is.

    python benchmarks/mechanisms.py

The first call captures, finds rules and checks them; torch compiles nothing (`backend="eager"`). What any
first capture loads is loaded before the first of the table.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import test_bounded
import test_cell_by_cell
import test_finer
import test_growing_carries
import test_loop_order
import test_parts
import test_periods
import test_starts
import test_windows
import toys

import rmtcompile

SEGMENTS = 8
Case = tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]


def features() -> torch.Tensor:
    return toys.features(SEGMENTS)


def walks(kind: str) -> Case:
    return (lambda: test_cell_by_cell.Walk(test_cell_by_cell.LAYERS[kind][0], True)), features


def finer(kind: Any) -> Case:
    return kind, lambda: torch.randn(2, SEGMENTS * test_finer.T, test_finer.D, dtype=torch.float64)


def periodic(kind: Any) -> Case:
    return kind, lambda: torch.randint(test_periods.VOCAB, (2, SEGMENTS * test_periods.SIZE))


def windowed(kind: Any) -> Case:
    return kind, lambda: test_windows.tokens(kind(), SEGMENTS)



MECHANISMS: dict[str, list[Case]] = {
    "plain layers, states in the model's loop": [
        (lambda: toys.Toy(3), features),
        (lambda: toys.Toy(3, up=-1), features),
        (toys.AttributeState, features),
    ],
    "loops in the other order": [
        (kind, lambda: test_loop_order.inputs(3 * SEGMENTS))
        for kind in (test_loop_order.Split, test_loop_order.MemoryTokens, test_loop_order.DeltaRule)
    ],
    "carries that grow": [
        (test_growing_carries.MODELS[name], features) for name in ("triangle", "hybrid", "memories")
    ],
    "windows over several segments": [
        windowed(kind) for kind in (test_windows.TwoSegments, test_windows.MovedOutside, test_windows.Pools)
    ],
    "operations without a batching rule": [walks(name) for name in ("lstm", "gru", "custom")],
    "models with a bounded length": [
        (kind, lambda: toys.features(test_bounded.MOST))
        for kind in (test_bounded.Bounded, test_bounded.Table, test_bounded.Even)
    ],
    "other starts and ends": [
        (lambda name=name: test_starts.Model(*test_starts.STARTS[name]), features)
        for name in ("float32", "shorter", "delayed")
    ],
    "layers of several modules": [
        (lambda kind=kind: kind(3), features)
        for kind in (test_parts.Pairs, test_parts.Flat, test_parts.Triples)
    ],
    "loops over tokens in a segment": [
        finer(kind) for kind in (test_finer.Tokens, test_finer.Chunks, test_finer.Summed)
    ],
    "rules that repeat": [
        periodic(kind) for kind in (test_periods.EverySecond, test_periods.Forgets, test_periods.InTurn)
    ],
}


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    with torch.no_grad():
        rmtcompile.optimize(toys.made(toys.Toy), backend="eager")(toys.features(3))
        print("| mechanism | first call, s | segments captured | levels for 8 segments | width |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for name, cases in MECHANISMS.items():
            rows = [measured(*case) for case in cases]
            seconds, captured, levels, widths = zip(*rows, strict=True)
            spread = f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
            print(f"| {name} | {spread} | {told(captured)} | {told(levels)} | {told(widths)} |", flush=True)


def measured(
    build: Callable[[], nn.Module], inputs: Callable[[], torch.Tensor]
) -> tuple[float, int, int, int]:
    """Seconds of the first call, the segments of the longest capture, levels and width."""
    model, x = toys.made(build), inputs()
    started = time.perf_counter()
    fast = rmtcompile.optimize(model, backend="eager")
    fast(x)
    seconds = time.perf_counter() - started
    return seconds, fast.compiled.proved_on[-1], fast.schedule.n_levels, fast.schedule.width


def told(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) if len({*numbers}) > 1 else str(numbers[0])


if __name__ == "__main__":
    main()
