"""What a saved program saves: the first call where it is compiled, and where it is loaded, each in a process.

    python benchmarks/saved_programs.py [--preset 1b] [--segment 1024] [--segments 8] [--device cuda]
    python benchmarks/saved_programs.py --train [...]

Each process builds the model, then times its calls by the wall clock, waited for; a process that loads has no
compiled code but what lies in the folder. With --train a call is a training step. Programs are loaded twice:
the first time reads files of torch that the machine may not have read before.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

begun = time.perf_counter()

import torch  # noqa: E402  (the time that imports take is told)

import rmtcompile  # noqa: E402
from rmtcompile.bench.opponents import result_of  # noqa: E402
from rmtcompile.bench.shapes import SHAPES, Case  # noqa: E402

CALLS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--segment", type=int, default=1024)
    parser.add_argument("--segments", type=int, default=8, help="of the input")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--train", action="store_true", help="time training steps instead of forwards")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make or args.load:
        one(args, time.perf_counter() - begun)
        return
    with tempfile.TemporaryDirectory() as folder:
        for what in ("make", "load", "load"):
            command = [sys.executable, __file__, *sys.argv[1:], f"--{what}", f"{folder}/programs"]
            with tempfile.TemporaryDirectory() as cache:
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                subprocess.run(command, env=environment, check=True)


def one(args: Any, imports: float) -> None:
    """The part of one process."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    started = time.perf_counter()
    model = Case(SHAPES[args.preset], args.segment, 128, 64, 1, dtype).build(device)
    ids = torch.randint(0, SHAPES[args.preset].vocab, (1, args.segments * args.segment), device=device)
    wait(device)
    built = time.perf_counter() - started
    print(f"{'makes' if args.make else 'loads'}: imports {imports:.1f} s, model {built:.1f} s", flush=True)
    started = time.perf_counter()
    if args.load:
        fast = rmtcompile.load(args.load, model, backend=args.backend)
    else:
        fast = rmtcompile.optimize(model, backend=args.backend)
    model.requires_grad_(args.train)
    for call in range(CALLS):
        with torch.set_grad_enabled(args.train):
            result = fast(ids)
        if args.train:
            result_of(result).float().square().mean().backward()
            model.zero_grad()
        wait(device)
        print(f"  call {call + 1}: {time.perf_counter() - started:.3f} s", flush=True)
        started = time.perf_counter()
    if args.make:
        fast.save(args.make)
        print(f"  save: {time.perf_counter() - started:.1f} s", flush=True)
    elif fast.captures:
        sys.exit("the saved program was not used")


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
