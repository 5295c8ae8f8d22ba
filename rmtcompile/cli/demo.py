"""The demo: a small ARMT reads a text, sequentially and on diagonals.

rmtcompile demo --text book.txt --out demo-output
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.api import optimize
from rmtcompile.cli.target import Sizes, Target, check_device, small_armt
from rmtcompile.commandline import UsageError, telling
from rmtcompile.optimized import Optimized
from rmtcompile.report import profile
from rmtcompile.schedule import short_type

SHIPPED = "constitution.txt"
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        text: what the model read;  tokens: how many; 0 for arguments of its own.
        difference: largest absolute difference of the two results; `magnitude` is the largest absolute value.
        errors: of the sequential and of the diagonal result, against the same model in float64: norm of the
            difference, as a share of the norm; None for a callable that is no module.
        same_bytes: share of the places at which both predict the same byte; None where there are no logits.
        sequential, diagonal: seconds of one call, median.
        capture: seconds from the first call to its result.
        files: what was written.
    """

    text: str
    tokens: int
    layers: int
    segments: int
    levels: int
    width: int
    difference: float
    magnitude: float
    errors: tuple[float, float] | None
    same_bytes: float | None
    sequential: float
    diagonal: float
    capture: float
    device: str
    files: tuple[str, ...]


def read_bytes(path: str | None, count: int) -> tuple[str, torch.Tensor]:
    """The first `count` bytes of a text as tokens i64[1, count]; the shipped text where no path is given.

    Raises:
        UsageError: the file cannot be read, or is empty.
    """
    if path is None:
        name, data = SHIPPED, files("rmtcompile.data").joinpath(SHIPPED).read_bytes()
    else:
        try:
            name, data = Path(path).name, Path(path).read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if not data:
        raise UsageError(f"{path} is empty")
    return name, torch.tensor(list(data[:count]), dtype=torch.int64)[None]


def run_demo(
    sizes: Sizes,
    *,
    target: Target | None = None,
    text: str | None = None,
    out: str | Path = "demo-output",
    repeats: int = 5,
    device: str = "cpu",
    say: Say = print,
) -> DemoResult:
    """Call the model in both orders, compare, and write what there is to look at into `out`.

    Args:
        sizes: of the small ARMT that reads `text` (by default the text that is shipped).
        target: a model with arguments of its own, instead.

    Raises:
        UsageError: the text cannot be read, the sizes do not fit, or there is no such device.
        RMTCompileError: the model could not be compiled.
    """
    folder = Path(out)
    check_device(device)
    if target is None:
        name, tokens = read_bytes(text, sizes.segment * sizes.segments)
        about = f"ARMT around a Llama: {sizes.layers} layers of width {sizes.hidden}, random weights"
        with telling(say, "importing transformers, and making the model"):
            target = Target(about, small_armt(sizes, device), (tokens.to(device),), {})
        read = f"{name}: {tokens.shape[1]:,} bytes as tokens, segments of {sizes.segment}"
    elif text is not None:
        raise UsageError("--text is for the small ARMT; a model of yours gets its own arguments")
    else:
        name, read = "its own arguments", f"its own arguments: {_types(target)}"
    folder.mkdir(parents=True, exist_ok=True)
    say(f"1/5  model     {target.name}")
    if isinstance(target.model, torch.nn.Module):
        say(f"               {sum(p.numel() for p in target.model.parameters()):,} parameters")
    say(f"2/5  input     {read}")
    say("3/5  capture   the model's own forward, with a few segments; the program serves any number of them")
    fast, seconds = _captured(target, say)
    say("")
    say(str(fast.schedule))
    say("")
    schedule = fast.schedule
    say(f"4/5  run       {schedule.n_layers} layers x {schedule.n_segments} segments, both orders in turn")
    result = _measured(target, fast, repeats, name, seconds, say)
    for line in verdict(result, repeats):
        say(f"               {line}")
    with telling(say, "measuring the time of each level, for the viewer"), torch.no_grad():
        found = profile(fast, target.args, target.kwargs, repeats)
    # One time of a call, here and there: the viewer divides this one as the levels were timed.
    whole, own = 1e6 * result.diagonal, 1e6 * result.sequential
    fast.last_profile = dataclasses.replace(found, total_us=whole, sequential_us=own)
    with telling(say, "writing what there is to look at"):
        written = _written(fast, folder)
    say(f"5/5  wrote     {written[0]}")
    for path in written[1:]:
        say(f"               {path}")
    say("")
    say(f"open {folder / 'viewer.html'} in a browser: each cell, why it runs when it does, and these times")
    return dataclasses.replace(result, files=tuple(str(path) for path in written))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _types(target: Target) -> str:
    return ", ".join(short_type(str(t.dtype), t.shape) for t in _tensors((target.args, target.kwargs)))


def _captured(target: Target, say: Say) -> tuple[Optimized, float]:
    start = time.perf_counter()

    def progress(line: str) -> None:
        say(f"               {time.perf_counter() - start:5.1f} s  {line}")

    fast = optimize(target.model, progress=progress, cache=False)  # a saved program has no graphs to look at
    with torch.no_grad():
        fast(*target.args, **target.kwargs)
    seconds = time.perf_counter() - start
    progress("first result")
    return fast, seconds


def _measured(
    target: Target, fast: Optimized, repeats: int, name: str, capture: float, say: Say
) -> DemoResult:
    times: dict[str, list[float]] = {"sequential": [], "diagonal": []}
    results: dict[str, Any] = {}
    tensors = _tensors((target.args, target.kwargs))
    on_cuda = any(tensor.is_cuda for tensor in tensors)
    with telling(say, f"timing both, {repeats + 1} turns"), torch.no_grad():
        for turn in range(repeats + 1):
            for order, run in (("sequential", target.model), ("diagonal", fast)):
                start = time.perf_counter()
                results[order] = run(*target.args, **target.kwargs)
                if on_cuda:
                    torch.cuda.synchronize()
                if turn:  # the first turn warms up
                    times[order].append(time.perf_counter() - start)
    a, b = _flat(results["sequential"]), _flat(results["diagonal"])
    schedule = fast.schedule
    with telling(say, "comparing both with the model in float64"):
        errors = _errors(target, a, b)
    return DemoResult(
        text=name,
        tokens=tensors[0].numel() if tensors and not tensors[0].is_floating_point() else 0,
        layers=schedule.n_layers,
        segments=schedule.n_segments,
        levels=schedule.n_levels,
        width=schedule.width,
        difference=float((a - b).abs().max()),
        magnitude=float(a.abs().max()),
        errors=errors,
        same_bytes=_same_bytes(results["sequential"], results["diagonal"]),
        sequential=statistics.median(times["sequential"]),
        diagonal=statistics.median(times["diagonal"]),
        capture=capture,
        device=str(tensors[0].device) if tensors else "cpu",
        files=(),
    )


def _flat(result: Any) -> torch.Tensor:
    """All floating-point numbers of a result, in float64 where the device has it."""
    found = [tensor for tensor in _tensors(result) if tensor.is_floating_point()]
    if not found:
        raise UsageError("the model gives no floating-point tensor to compare")
    return torch.cat([tensor.detach().flatten().double() for tensor in found])


def _errors(target: Target, a: torch.Tensor, b: torch.Tensor) -> tuple[float, float] | None:
    if not isinstance(target.model, torch.nn.Module):
        return None

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    args, kwargs = pytree.tree_map(wide, (target.args, target.kwargs))
    with torch.no_grad():
        exact = _flat(copy.deepcopy(target.model).double()(*args, **kwargs))
    return float((a - exact).norm() / exact.norm()), float((b - exact).norm() / exact.norm())


def _same_bytes(a: Any, b: Any) -> float | None:
    a, b = getattr(a, "logits", None), getattr(b, "logits", None)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return None
    return float((a.argmax(-1) == b.argmax(-1)).double().mean())


def verdict(result: DemoResult, repeats: int) -> list[str]:
    """The numbers, and what they do and do not show."""
    ratio = result.sequential / result.diagonal
    same = ""
    if result.same_bytes is not None:
        same = f"; the same token predicted at {result.same_bytes:.2%} of the places"
    lines = [f"largest difference {result.difference:.1e} in numbers of up to {result.magnitude:.1f}{same}"]
    if result.errors is not None:
        sequential, diagonal = result.errors
        fine = diagonal < 2 * sequential + 1e-7
        rounding = "both rounding" if fine else "MORE than rounding: please report it"
        lines.append(
            f"error against float64: sequential {sequential:.1e}, diagonal {diagonal:.1e} ({rounding})"
        )
    lines += [
        f"sequential {result.sequential * 1e3:8.1f} ms   the model as it is, eager (median of {repeats})",
        f"diagonal   {result.diagonal * 1e3:8.1f} ms   {result.layers * result.segments} cells in "
        f"{result.levels} levels, up to {result.width} at once: {ratio:.2f} x as fast",
    ]
    if result.device == "cpu":
        lines += [
            "on a CPU the gain is what fewer and larger calls save: it shrinks as cells grow (--hidden 512),",
            "and says little about a GPU; rmtcompile bench measures each way of running a model",
        ]
    else:
        lines += [
            "most of an eager model's time is launch overhead: the honest opponent is the sequential order,",
            "compiled and in CUDA graphs; rmtcompile bench measures it",
        ]
    return lines


def _written(fast: Optimized, folder: Path) -> list[Path]:
    code = folder / "generated.py"
    code.write_text(fast.code, encoding="utf-8")
    return [fast.schedule.save(folder / "schedule.svg"), fast.view(folder / "viewer.html"), code]
