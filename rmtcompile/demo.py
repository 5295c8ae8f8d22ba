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

import torch

from rmtcompile.api import Optimized, optimize
from rmtcompile.target import Sizes, UsageError, small_armt

SHIPPED = "constitution.txt"
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        difference: largest absolute difference of the two results; `magnitude` is the largest absolute value.
        errors: of the sequential and of the diagonal result, against the same model in float64: norm of the
            difference, as a share of the norm.
        same_bytes: share of the places at which both predict the same byte.
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
    errors: tuple[float, float]
    same_bytes: float
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
    text: str | None = None,
    out: str | Path = "demo-output",
    repeats: int = 5,
    device: str = "cpu",
    say: Say = print,
) -> DemoResult:
    """Build the model, read the text in both orders, compare, and write what there is to look at into `out`.

    Raises:
        UsageError: the text cannot be read, or the sizes do not fit.
        RMTCompileError: the model could not be compiled.
    """
    name, tokens = read_bytes(text, sizes.segment * sizes.segments)
    tokens = tokens.to(device)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"1/5  model     ARMT around a Llama: {sizes.layers} layers of width {sizes.hidden}, random weights")
    model = small_armt(sizes, device)
    say(f"               {sum(p.numel() for p in model.parameters()):,} parameters, {device}")
    say(f"2/5  text      {name}: {tokens.shape[1]:,} bytes as tokens, segments of {sizes.segment}")
    say("3/5  capture   the model's own forward, with a few segments; the program serves any number of them")
    fast, seconds = _captured(model, tokens, say)
    say("")
    say(str(fast.schedule))
    say("")
    say(f"4/5  run       {sizes.layers} layers x {fast.schedule.n_segments} segments, both orders in turn")
    result = _measured(model, fast, tokens, repeats, name, seconds)
    for line in verdict(result, repeats):
        say(f"               {line}")
    with torch.no_grad():
        fast.profile(tokens)  # the viewer shows the time of each level
    written = _written(fast, folder)
    say(f"5/5  wrote     {written[0]}")
    for path in written[1:]:
        say(f"               {path}")
    return dataclasses.replace(result, files=tuple(str(path) for path in written))


def _captured(model: torch.nn.Module, tokens: torch.Tensor, say: Say) -> tuple[Optimized, float]:
    start = time.perf_counter()

    def progress(line: str) -> None:
        say(f"               {time.perf_counter() - start:5.1f} s  {line}")

    fast = optimize(model, progress=progress)
    with torch.no_grad():
        fast(tokens)
    seconds = time.perf_counter() - start
    progress("first result")
    return fast, seconds


def _measured(
    model: torch.nn.Module, fast: Optimized, tokens: torch.Tensor, repeats: int, name: str, capture: float
) -> DemoResult:
    times: dict[str, list[float]] = {"sequential": [], "diagonal": []}
    results: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for turn in range(repeats + 1):
            for order, run in (("sequential", model), ("diagonal", fast)):
                start = time.perf_counter()
                results[order] = run(tokens).logits
                if tokens.is_cuda:
                    torch.cuda.synchronize()
                if turn:  # the first turn warms up
                    times[order].append(time.perf_counter() - start)
        exact = copy.deepcopy(model).double()(tokens).logits
    a, b = results["sequential"], results["diagonal"]
    schedule = fast.schedule
    return DemoResult(
        text=name,
        tokens=tokens.shape[1],
        layers=schedule.n_layers,
        segments=schedule.n_segments,
        levels=schedule.n_levels,
        width=schedule.width,
        difference=float((a - b).abs().max()),
        magnitude=float(a.abs().max()),
        errors=(_error(a, exact), _error(b, exact)),
        same_bytes=float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        sequential=statistics.median(times["sequential"]),
        diagonal=statistics.median(times["diagonal"]),
        capture=capture,
        device=str(tokens.device),
        files=(),
    )


def _error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result - exact).norm() / exact.norm())


def verdict(result: DemoResult, repeats: int) -> list[str]:
    """The numbers, and what they do and do not show."""
    ratio = result.sequential / result.diagonal
    sequential, diagonal = result.errors
    rounding = "both rounding" if diagonal < 2 * sequential + 1e-7 else "MORE than rounding: please report it"
    lines = [
        f"largest difference {result.difference:.1e} in logits of up to {result.magnitude:.1f}; the same "
        f"byte predicted at {result.same_bytes:.2%} of the places",
        f"error against float64: sequential {sequential:.1e}, diagonal {diagonal:.1e} ({rounding})",
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
