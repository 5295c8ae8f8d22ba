"""The benchmark of a model of yours, `rmtcompile bench mymodel:build`: as it is, and on diagonals."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmtcompile.cli.options import add_sizes, add_target
from rmtcompile.commandline import Parser, add_json, check_file, positive

if TYPE_CHECKING:
    import torch

    from rmtcompile.cli.target import Target
    from rmtcompile.optimized import Optimized

_EXAMPLES = """\
Time a model of yours as it is and as rmtcompile runs it, in turn, and compare the results.  Without a
MODEL, rmtcompile bench times an ARMT of a shape beside more opponents: rmtcompile bench --help.

examples
  rmtcompile bench mymodel:build
  rmtcompile bench mymodel:build --rounds 20 --out run.json
  rmtcompile bench config.json --segment 1024 --segments 32 --memory 128 --d-mem 64 --device cuda
"""


def parser() -> argparse.ArgumentParser:
    """All flags."""
    top = Parser(
        prog="rmtcompile bench",
        description=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_target(top)
    top.add_argument("--rounds", type=positive, default=10, metavar="N", help="turns of both (default: 10)")
    add_json(top)
    top.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="where to write everything that was measured, as JSON"
    )
    add_sizes(top)
    return top


def run(argv: Sequence[str]) -> int:
    """Run the benchmark; 0 if it was measured.

    Raises:
        UsageError: there is no such model, or no file can be written where one is asked for.
        BuilderError: the function that makes the model raises.
        RMTCompileError: the model could not be compiled.
    """
    options = parser().parse_args(argv)
    if options.out:
        check_file(options.out)
    import torch

    from rmtcompile.cli.target import Sizes, target_of

    dtype = getattr(torch, options.dtype) if options.dtype else None
    target = target_of(options.model, Sizes.of(options), options.device, dtype)
    record = measure(target, options.rounds)
    as_json = json.dumps(record, indent=2)
    print(as_json if options.json else "\n".join(table(record)))
    if options.out:
        options.out.write_text(as_json + "\n", encoding="utf-8")
    return 0


def measure(target: Target, rounds: int) -> dict[str, Any]:
    """Milliseconds of each turn of both, peak memory on CUDA, and how far the results are apart."""
    import torch

    from rmtcompile.api import optimize

    tensors = _tensors((target.args, target.kwargs))
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    fast = optimize(target.model, cache=False, progress=lambda line: print(f"  {line}", file=sys.stderr))
    runs: dict[str, Callable[..., Any]] = {"as it is": target.model, "rmtcompile": fast}
    results: dict[str, Any] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int] = {}
    with torch.no_grad():
        first = _timed(lambda: fast(*target.args, **target.kwargs), device)
        for turn in range(rounds + 2):  # the first two turns warm up
            for name, call in runs.items():
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)

                def once(name: str = name, call: Callable[..., Any] = call) -> None:
                    results[name] = call(*target.args, **target.kwargs)

                took = _timed(once, device)
                if turn > 1:
                    times[name].append(1e3 * took)
                if device.type == "cuda":
                    peaks[name] = torch.cuda.max_memory_allocated(device)
    return {
        "model": target.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": torch.__version__,
        "first_call_s": first,
        "ms": times,
        "peak_bytes": peaks,
        "difference": _difference(results["as it is"], results["rmtcompile"]),
        "plan": fast.explain().plan,
        **_sizes(fast),
    }


def _sizes(fast: Optimized) -> dict[str, int]:
    schedule = fast.schedule
    return {
        "layers": schedule.n_layers,
        "segments": schedule.n_segments,
        "levels": schedule.n_levels,
        "width": schedule.width,
    }


def table(record: dict[str, Any]) -> list[str]:
    """What was measured, for the terminal."""
    own, ours = (statistics.median(record["ms"][name]) for name in ("as it is", "rmtcompile"))
    lines = [
        f"{record['model']} on {record['device']}, torch {record['torch']}: {record['layers']} layers x "
        f"{record['segments']} segments, {record['levels']} levels, up to {record['width']} cells at once",
        f"{'':<12} {'median ms':>10} {'fastest':>10} {'slowest':>10}",
    ]
    for name, times in record["ms"].items():
        peak = f"   peak {record['peak_bytes'][name] / 2**30:.2f} GiB" if record["peak_bytes"] else ""
        median, least, most = statistics.median(times), min(times), max(times)
        lines.append(f"{name:<12} {median:>10.2f} {least:>10.2f} {most:>10.2f}{peak}")
    speed, first = own / ours, record["first_call_s"]
    lines.append(
        f"{speed:.2f} x as fast by the {record['plan']} plan; first call {first:.1f} s; "
        f"results differ by {record['difference']:.1e} of their norm"
    )
    return lines


def _tensors(values: Any) -> list[torch.Tensor]:
    import torch
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    import torch

    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _difference(a: Any, b: Any) -> float:
    """Norm of the difference of all numbers of two results, as a share of the norm."""
    pairs = zip(_tensors(a), _tensors(b), strict=True)
    wide = [(x.double(), y.double()) for x, y in pairs if x.is_floating_point()]
    apart = sum(float((x - y).norm()) ** 2 for x, y in wide) ** 0.5
    whole = sum(float(x.norm()) ** 2 for x, _ in wide) ** 0.5
    return apart / whole if whole else apart
