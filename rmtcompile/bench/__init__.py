"""`rmtcompile bench`: the optimized model beside its opponents, in one process and one run.

```
shapes     which model, and what it costs (FLOPs, bytes)
opponents  what is timed: full attention, sequential, sequential in CUDA graphs, optimized, hand-written
graphed    the honest opponent, put together by hand
measure    clocks, memory, ceilings
session    one run: build, check, time
documents  inputs of random lengths, one at a time: what the first call of a length costs
training   training steps beside those of the model itself
numerics   errors against a reference, and how they accumulate
kernels    the profile of one steady step
flags      the command line
report     tables, JSON          plots     pictures
```
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the command line is in `rmtcompile.bench.cli`."""
    from rmtcompile.bench.cli import run

    return run(argv)


__all__ = ["main"]
