"""Doctor: versions, device, compilers and caches of this machine; what of it a program uses, what is missing.

A small model of two layers is compiled as `optimize` would here, and compared with its program: what works is
seen, not concluded from versions.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGES = (
    ("torch", "2.11", ""),
    ("networkx", "3.2", ""),
    ("numpy", "1.26", ""),
    ("transformers", "4.51", "models"),
    ("safetensors", "0.4.3", "models"),
    ("tqdm", "4.66", "models"),
    ("matplotlib", "3.8", "viz"),
)
"""Package, oldest version, and the extra that brings it; none for what is always needed."""

WITHOUT = {
    "transformers": "reference models", "safetensors": "states and programs in files",
    "tqdm": "progress bars", "matplotlib": "pictures as PNG",
}  # fmt: skip
"""What there is not where a package is missing."""

WITH = ("accelerate", "peft", "torchao", "rich")
"""Packages that a program is used with, where they are there."""

GOOD, ODD, BAD = "ok", "note", "missing"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        about: what it is of: "versions", "device", "compiler", "caches", "trial".
        name: of the thing.
        found: what was found.
        state: `GOOD`; `ODD` for what works in another way, or not at its best; `BAD` for what does not work.
        remedy: what helps.
    """

    about: str
    name: str
    found: str
    state: str = GOOD
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """All that is looked at, in order."""
    yield from _versions()
    if importlib.util.find_spec("torch") is None:
        return
    yield from _device()
    yield from _compiler()
    yield from _caches()
    yield _trial()


def text(findings: list[Finding]) -> str:
    """The report for a terminal."""
    widths = [max(len(getattr(one, name)) for one in findings) for name in ("state", "name")]
    lines, last = [], ""
    for one in findings:
        if one.about != last:
            lines += ["", one.about]
        last = one.about
        lines.append(f"  {one.state:{widths[0]}}  {one.name:{widths[1]}}  {one.found}")
        if one.remedy:
            lines.append(f"  {'':{widths[0]}}  {'':{widths[1]}}  {one.remedy}")
    bad = [one.name for one in findings if one.state == BAD]
    end = f"does not work: {', '.join(bad)}" if bad else "all that is needed is there"
    return "\n".join([*lines[1:], "", end])


# ---- versions ----------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    from rmtcompile import __version__

    about = "versions"
    yield Finding(about, "rmtcompile", f"{__version__}, {Path(__file__).parents[1]}")
    yield Finding(about, "python", f"{platform.python_version()}, {platform.platform()}")
    for name, oldest, extra in PACKAGES:
        version, needed = version_of(name), not extra
        wanted = f"pip install 'rmtcompile[{extra}]'" if extra else f"pip install '{name}>={oldest}'"
        if version is None:
            without = f": no {WITHOUT[name]}" if name in WITHOUT else ""
            yield Finding(about, name, f"not installed{without}", BAD if needed else ODD, wanted)
        elif _numbers(version) < _numbers(oldest):
            yield Finding(about, name, f"{version}, older than {oldest}", BAD if needed else ODD, wanted)
        else:
            yield Finding(about, name, version)
    there = {name: version for name in WITH if (version := version_of(name)) is not None}
    yield Finding(about, "used with", ", ".join(f"{n} {v}" for n, v in there.items()) or "nothing else")


def version_of(name: str) -> str | None:
    """The installed version of a package; None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts[:3] if part.isdigit())


# ---- device ------------------------------------------------------------------------------------------------


def _device() -> Iterator[Finding]:
    import torch

    about = "device"
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        why = "torch is built for CUDA, and finds no device" if built else "torch is built without CUDA"
        remedy = "programs run on the CPU, their cells as they are: exact, and for small models slow"
        yield Finding(about, "cuda", why, ODD, remedy)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        yield Finding(about, "cpu", f"{cores} cores, {torch.get_num_threads()} threads of torch")
        return
    yield Finding(about, "cuda", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    for i in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(i)
        p = torch.cuda.get_device_properties(i)
        size = f"{free / 2**30:.1f} of {whole / 2**30:.1f} GiB free"
        is_old = (p.major, p.minor) < (8, 0)
        remedy = "bfloat16 is emulated before compute capability 8.0: use float16" if is_old else ""
        found = f"{p.name}, sm_{p.major}{p.minor}, {size}"
        yield Finding(about, f"cuda:{i}", found, ODD if is_old else GOOD, remedy)


# ---- compiler ----------------------------------------------------------------------------------------------


def _compiler() -> Iterator[Finding]:
    import torch

    about = "compiler"
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        triton = version_of("triton")
        remedy = "" if triton else "without it cells run as they are: pip install triton"
        yield Finding(about, "triton", triton or "not installed", GOOD if triton else BAD, remedy)
        yield Finding(about, "CUDA graphs", "blocks of levels and training steps are recorded")
    compilers = os.environ.get("CXX"), "g++", "clang++", "c++"
    found = next((path for name in compilers if name and (path := shutil.which(name))), None)
    remedy = "" if found else "needed by backend='inductor' on a CPU only: apt-get install g++"
    yield Finding(about, "C++", found or "no compiler", GOOD if found else ODD, remedy)
    yield _of_inductor()
    if importlib.util.find_spec("transformers") is not None:
        from rmtcompile.models.recorded import counts_on_device

        is_there = counts_on_device()
        how = "read by CUDA graphs, on CUDA" if is_there else "launched one operation after the other"
        remedy = "" if is_there else "its static cache counts on the host: pip install -U transformers"
        state = GOOD if is_there or not on_cuda else ODD
        yield Finding(about, "tokens of generate", how, state, remedy if state == ODD else "")


def _of_inductor() -> Finding:
    """Whether passes run within Inductor: they need parts of it that its versions move."""
    try:
        importlib.import_module("rmtcompile.passes.cell.inductor")
    except ImportError as error:
        slower = "cells are a little slower"
        return Finding("compiler", "passes in Inductor", f"left out ({error})", ODD, slower)
    return Finding("compiler", "passes in Inductor", "all")


# ---- caches ------------------------------------------------------------------------------------------------


def _caches() -> Iterator[Finding]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    from rmtcompile.options import CACHE

    kept = "kernels of Inductor"
    inductor = "TORCHINDUCTOR_CACHE_DIR"
    yield _folder(kept, Path(os.environ.get(inductor) or cache_dir()), inductor)
    triton = os.environ.get("TRITON_CACHE_DIR")
    if triton:
        yield _folder("kernels of Triton", Path(triton), "TRITON_CACHE_DIR")
    programs = os.environ.get(CACHE)
    if programs:
        yield _folder("programs", Path(programs), CACHE)
    else:
        found = f"where you say: optimize(model, cache='folder') or {CACHE}=folder, fast.save('folder')"
        yield Finding("caches", "programs", found)


def _folder(name: str, path: Path, variable: str) -> Finding:
    there = path if path.exists() else next(p for p in path.parents if p.exists())
    files = [file for file in path.rglob("*") if file.is_file()] if path.exists() else []
    free = shutil.disk_usage(there).free / 2**30
    found = f"{path}, {sum(f.stat().st_size for f in files) / 2**20:.0f} MiB, {free:.1f} GiB free"
    if not os.access(there, os.W_OK):
        return Finding("caches", name, f"{path} cannot be written", BAD, f"set {variable}")
    if free < 1:
        return Finding("caches", name, found, ODD, "next to no room left")
    return Finding("caches", name, found)


# ---- a trial -----------------------------------------------------------------------------------------------


def _trial() -> Finding:
    """A small program, compiled as it would be on this machine, beside its model."""
    import torch

    from rmtcompile import optimize

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _small().to(device)
    x = torch.randn(1, 6 * 4, 8, device=device)
    started = time.perf_counter()
    try:
        with torch.no_grad():
            fast = optimize(model, cache=False)
            difference = float((fast(x) - model(x)).abs().max())
    except Exception as error:  # whatever it is, that is what is wrong here
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding("trial", "a small model", said, BAD, "please report it with this report")
    if difference > 1e-3:
        return Finding("trial", "a small model", f"differs by {difference:.1e}", BAD, "please report it")
    took = f"{time.perf_counter() - started:.1f} s, {fast.schedule.n_levels} levels"
    return Finding("trial", "a small model", f"captured, compiled and compared on {device} in {took}")


def _small() -> torch.nn.Module:
    """Two layers with a memory each, segments of four positions."""
    import torch

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            memory = [torch.zeros_like(x[:, :1]) for _ in self.layers]
            out = []
            for h in x.split(4, 1):
                for i, layer in enumerate(self.layers):
                    h = torch.tanh(layer(h) + memory[i])
                    memory[i] = h.mean(1, keepdim=True)
                out.append(h)
            return torch.cat(out, 1)

    return Small().eval()


__all__ = ["Finding", "examine", "text"]
