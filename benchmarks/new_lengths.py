"""What a length costs when it comes for the first, second, third and fourth time, on one GPU.

    python benchmarks/new_lengths.py [--preset 1b] [--segment 1024] [--lengths 5 12 ...] [--repeated 4 8 ...]

The program is warmed up on two other lengths first. Times are wall-clock milliseconds of one call, waited
for; `repeated` gives medians of 15 calls of lengths that came before.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import rmtcompile
from rmtcompile.bench.shapes import SHAPES, Case


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--segment", type=int, default=1024)
    parser.add_argument("--lengths", type=int, nargs="+", default=[5, 12, 17, 31, 64], metavar="SEGMENTS")
    parser.add_argument("--repeated", type=int, nargs="*", default=[4, 8, 32, 128], metavar="SEGMENTS")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device")
    device = torch.device("cuda")
    model = Case(SHAPES[args.preset], args.segment, 128, 64, 1, torch.bfloat16).build(device)
    fast = rmtcompile.optimize(model)

    def milliseconds(segments: int) -> float:
        ids = torch.randint(0, 1000, (1, segments * args.segment), device=device)
        torch.cuda.synchronize()
        start = time.perf_counter()
        fast(ids)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, {args.preset}, segments of {args.segment}")
    print("warm-up   ", *(f"{milliseconds(n):9.1f}" for n in (20, 20, 20, 4, 4, 4)))
    for n in args.lengths:
        print(f"{n:4} new  ", *(f"{milliseconds(n):9.1f}" for _ in range(4)), flush=True)
    for n in args.repeated:
        for _ in range(3):
            milliseconds(n)
        print(f"{n:4} again", f"{statistics.median(milliseconds(n) for _ in range(15)):9.2f}", flush=True)
    print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    with torch.no_grad():
        main()
