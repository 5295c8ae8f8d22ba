"""Trials in processes of their own: what one breaks, hangs in or leaves behind does not meet the next."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from fuzzing.spec import Spec
from fuzzing.trials import Outcome, trial

FORK = multiprocessing.get_context("fork")


@dataclass
class Running:
    """One trial under way."""

    spec: Spec
    process: Any
    pipe: Connection
    began: float


def trials(specs: Iterator[Spec], limit: float, workers: int) -> Iterator[tuple[Spec, Outcome, float]]:
    """Run the trials of `specs`, some at a time, each for `limit` seconds at most; with the seconds."""
    running: list[Running] = []
    more = True
    while True:
        while more and len(running) < workers:
            spec = next(specs, None)
            more = spec is not None
            if spec is not None:
                running.append(_start(spec))
        if not running:
            return
        oldest = min(one.began for one in running)
        wait([one.pipe for one in running], max(0.0, oldest + limit - time.monotonic()))
        for one in list(running):
            outcome = _outcome(one, limit)
            if outcome is not None:
                running.remove(one)
                yield one.spec, outcome, time.monotonic() - one.began


def trial_apart(spec: Spec, limit: float) -> Outcome:
    """One trial in a process of its own."""
    (_, outcome, _), *_ = trials(iter([spec]), limit, 1)
    return outcome


def _start(spec: Spec) -> Running:
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_work, args=(spec, theirs), daemon=True)
    process.start()
    theirs.close()
    return Running(spec, process, ours, time.monotonic())


def _work(spec: Spec, pipe: Connection) -> None:
    pipe.send(trial(spec))


def _outcome(one: Running, limit: float) -> Outcome | None:
    """How it ended, if it has."""
    if one.pipe.poll():
        try:
            outcome = one.pipe.recv()
        except EOFError:
            one.process.join()
            outcome = Outcome("crash", f"the process ended with {one.process.exitcode}")
    elif time.monotonic() - one.began >= limit:
        one.process.kill()
        outcome = Outcome("slow", f"more than {limit:g} seconds")
    else:
        return None
    one.process.join()
    one.pipe.close()
    return outcome
