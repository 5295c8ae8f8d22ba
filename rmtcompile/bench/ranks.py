"""Bands of layers in several processes, timed: one process a device, as `torchrun` starts them.

    bands.Session   ── what to time, as JSON ──>   torchrun ... -m rmtcompile.bench.ranks
                    <── a row a length, a file ──  rank 0
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import rmtcompile
from rmtcompile.bench import measure
from rmtcompile.bench.opponents import result_of
from rmtcompile.bench.shapes import Case, Shape

TIMEOUT = timedelta(minutes=5)
"""How long a rank waits for another one."""


def timed(
    case: Case,
    tokens: Sequence[int],
    count: int,
    rounds: int,
    options: Mapping[str, Any],
    device: torch.device,
    seconds: float,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Time a program in so many processes; a row a length, as far as the seconds suffice.

    Raises:
        RuntimeError: the processes have failed before they gave anything.
    """
    say(f"{count} processes of {case.shape.layers} layers of width {case.shape.hidden}")
    given = {
        "case": {**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")},
        "tokens": list(tokens), "rounds": rounds, "options": dict(options), "device": device.type,
        "seconds": seconds,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
            "-m", "rmtcompile.bench.ranks", json.dumps(given), str(out),
        ]  # fmt: skip
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # torchrun warns without
        done = subprocess.run(command, env={**os.environ, **threads}, stdout=sys.stderr, check=False)
        if not out.exists():
            raise RuntimeError(f"{count} processes ended with {done.returncode} before anything was timed")
        rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def main() -> None:
    """One rank's part."""
    given, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_cuda = given["device"] == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo", timeout=TIMEOUT, device_id=device if is_cuda else None
    )
    case = Case(**{**given["case"], "shape": Shape(**given["case"]["shape"]), "dtype": _dtype(given)})
    until, rows = time.monotonic() + given["seconds"], []
    with torch.no_grad():
        model = case.build(device)
        options = {"plan": "diagonal", "cache": False, **given["options"], "devices": dist.group.WORLD}
        program = rmtcompile.optimize(model, **options)
        for tokens in given["tokens"]:
            torch.manual_seed(case.seed)
            row = _row(program, case.ids(tokens, device), given["rounds"], device)
            rows.append({"devices": count, "ranks": True, "tokens": tokens, **row})
            if rank == 0:
                out.write_text(json.dumps(rows))
            late = torch.tensor(time.monotonic() > until, device=device)
            dist.broadcast(late, 0)
            if late:
                break
    dist.destroy_process_group()


def _row(program: Any, ids: torch.Tensor, rounds: int, device: torch.device) -> dict[str, Any]:
    """One length: warm, then timed from a common start to this rank's whole result."""
    before = time.perf_counter()
    for _ in range(3):  # compiled, recorded, replayed
        result_of(program(ids))
    measure.synchronise(device)
    warm, times = time.perf_counter() - before, []
    for _ in range(rounds):
        dist.barrier()
        measure.synchronise(device)
        begin = time.perf_counter()
        result_of(program(ids))
        measure.synchronise(device)
        times.append(time.perf_counter() - begin)
    spread = measure.Spread.of(times)
    gib: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gib, torch.cuda.max_memory_allocated(device) / 2**30 if ids.is_cuda else 0.0)
    executor = program._last[0].executor
    return {
        "warm_seconds": warm, "recorded": executor.recorded, "gib": gib if ids.is_cuda else [],
        "layers": [len(own) for own in executor.cut.division.layers],
        "seconds": spread.median, "low": spread.low, "high": spread.high, "count": spread.count,
    }  # fmt: skip


def _dtype(given: Mapping[str, Any]) -> torch.dtype:
    found: torch.dtype = getattr(torch, given["case"]["dtype"])
    return found


if __name__ == "__main__":
    main()
