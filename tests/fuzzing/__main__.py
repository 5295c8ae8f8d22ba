"""`make fuzz MINUTES=10 [SEED=n] [WORKERS=n]`: draw, run, shrink, and tell at the end."""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from random import SystemRandom

import torch
from tqdm import tqdm

from fuzzing.drawing import draw
from fuzzing.findings import Finding, keep, known
from fuzzing.processes import trial_apart, trials
from fuzzing.shrinking import shrink
from fuzzing.spec import Spec
from fuzzing.trials import FAILURES, Outcome, trial


def main() -> int:
    """Returns 1 if a wrong result or a crash was found that is not known, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None, help="of the first model; drawn if not given")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=float, default=120, help="seconds for one model")
    args = parser.parse_args()
    seed = SystemRandom().randrange(10**9) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    torch.set_num_threads(1)
    trial(Spec())  # what the first capture loads need not be loaded in each process
    session = Session(args.limit)
    bar = tqdm(total=round(args.minutes * 60), unit="s", mininterval=1.0, file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        for spec, outcome, seconds in trials(_drawn(seed, args.minutes * 60), args.limit, args.workers):
            session.note(spec, outcome, seconds)
            bar.n = min(bar.total, round(time.monotonic() - session.began))
            bar.set_postfix_str(session.counts())
    bar.close()
    print(session.summary(seed))
    return any(finding.outcome.kind != "slow" for finding in session.new)


def _drawn(seed: int, seconds: float) -> Iterator[Spec]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield draw(seed)
        seed += 1


class Session:
    """What was met so far."""

    def __init__(self, limit: float) -> None:
        self.limit, self.began = limit, time.monotonic()
        self.outcomes: Counter[str] = Counter()
        self.causes: dict[tuple[str, str], list[tuple[Spec, Outcome]]] = defaultdict(list)
        self.seconds: list[float] = []
        self.known = {finding.spec for finding in known()}
        self.new: list[Finding] = []

    def note(self, spec: Spec, outcome: Outcome, seconds: float) -> None:
        """Count a trial; what fails in a new manner is shrunk and kept."""
        self.outcomes[outcome.kind] += 1
        self.seconds.append(seconds)
        met = self.causes[outcome.cause]
        met.append((spec, outcome))
        if outcome.kind in FAILURES and len(met) <= (1 if outcome.kind == "slow" else 3):
            self.shrink(spec, outcome)

    def shrink(self, spec: Spec, outcome: Outcome) -> None:
        def fails(smaller: Spec) -> bool:
            other = trial_apart(smaller, self.limit)
            return other.cause == outcome.cause if outcome.kind == "crash" else other.kind == outcome.kind

        tqdm.write(f"{outcome.kind}: {outcome.line}\n  {spec.to_json()}")
        small = shrink(spec, fails)
        last = trial_apart(small, self.limit)
        if small not in self.known and last.kind in FAILURES:
            self.known.add(small)
            self.new.append(Finding(small, last))
            tqdm.write(f"  kept as {keep(self.new[-1])}")

    def counts(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.outcomes.most_common())

    def summary(self, seed: int) -> str:
        """Counts, refusals by their first lines, seconds, and what was kept."""
        if not self.seconds:
            return f"no model was run, seed {seed}"
        lines = [
            f"{len(self.seconds)} models from seed {seed}: {self.counts()}",
            f"seconds a model: median {statistics.median(self.seconds):.2f}, most {max(self.seconds):.1f}",
        ]
        for (kind, _), met in sorted(self.causes.items(), key=lambda item: -len(item[1])):
            if kind in ("refused", "no model"):
                spec, outcome = min(met, key=lambda one: len(one[0].to_json()))
                lines += [f"{len(met):5d} {kind}: {outcome.line}", f"          {spec.to_json()}"]
        lines += [f"new: {finding.outcome.kind} {finding.spec.to_json()}" for finding in self.new]
        return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
