"""Serving: a queue of documents in one wavefront, and generation; beside the model and other ways to run it.

    --map 64 --tokens 4096      64 documents of 4,096 tokens
    --map 500                   500 of random lengths
    --generate 200              200 tokens after each length of --tokens: the first one, each of the others
"""

from __future__ import annotations

import functools
import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import rmtcompile
from rmtcompile.bench import measure
from rmtcompile.bench.documents import lengths_of
from rmtcompile.bench.recording import Recording
from rmtcompile.bench.report import Table, environment_table
from rmtcompile.bench.shapes import Case

WARM = 32
"""Documents that run before the queue is timed, so that it captures and compiles nothing."""

OWN = 24
"""Documents that the model itself reads."""

CONTINUATIONS = 32
"""Continuations of one text."""


@dataclass(frozen=True)
class Settings:
    """What one run does; see the command line's help.

    Attributes:
        documents: how many are read; 0 for none.
        tokens: of documents, in turn; none for random lengths. Of each text that is continued.
        new_tokens: how many are generated; 0 for none.
        batch: documents of a batch with padding.
        opponents: whether the model itself runs, too.
    """

    case: Case
    documents: int = 0
    tokens: Sequence[int] = ()
    new_tokens: int = 0
    max_segments: int = 40
    batch: int = 8
    opponents: bool = True
    rounds: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: float = float("inf")
    flags: tuple[str, ...] = ()


class Session(Recording):
    """Reads the queue in each way, or continues each text in each way."""

    def __init__(
        self, settings: Settings, device: torch.device, save: Callable[[dict[str, Any]], None]
    ) -> None:
        super().__init__(device, settings.budget, save)
        case = replace(settings.case, head=settings.case.head or settings.new_tokens > 0)
        self.settings, self.case = settings, case
        self.begin(case, settings.flags, queue=[], generation=[])

    def run(self) -> None:
        """What the settings ask for; saved after each piece."""
        torch.compiler.reset()
        measure.release(self.device)
        self.say(f"building {self.case.shape.layers} layers of width {self.case.shape.hidden}")
        self.model = self.case.build(self.device)
        options = {"progress": self.say, "cache": False, **self.settings.options}
        self.fast = rmtcompile.optimize(self.model, **options)
        with torch.no_grad():
            if self.settings.documents:
                self._queue()
            for tokens in self.settings.tokens if self.settings.new_tokens else ():
                self._generation(tokens)
        self.record["seconds"] = time.monotonic() - self.started
        self.save(self.record)

    def _piece(self, what: str, body: Callable[[], dict[str, Any]], into: str) -> None:
        """Measure one thing; one that fails is noted, and the others go on."""
        if self.is_late:
            self.note(f"{what}: not begun, the time is up")
            return
        try:
            found = {"name": what, **body()}
        except torch.OutOfMemoryError:
            measure.release(self.device)
            self.note(f"{what}: out of memory")
        except Exception as error:  # the others are measured all the same
            traceback.print_exc()
            self.note(f"{what}: {type(error).__name__}: {error}".splitlines()[0][:300])
        else:
            self.record[into].append(found)
            self.say(", ".join(f"{key} {value:.4g}" for key, value in found.items() if key != "name") or what)
        self.save(self.record)

    # ---- documents ----

    def _queue(self) -> None:
        """The queue one at a time, in one wavefront, in batches with padding, and by the model itself."""
        settings = self.settings
        lengths = list(itertools.islice(itertools.cycle(settings.tokens), settings.documents))
        lengths = lengths or lengths_of(self.case, settings.documents, settings.max_segments)
        self.record["lengths"] = lengths
        texts = [self.case.ids(tokens, self.device) for tokens in lengths]
        fast = self.fast

        def one_wavefront(some: Sequence[Tensor]) -> None:
            for result in fast.stream(some, together=True):
                if isinstance(result, rmtcompile.FailedDocument):
                    raise result.error

        def one_at_a_time(run: Callable[[Tensor], Any]) -> Callable[[Sequence[Tensor]], None]:
            def each(some: Sequence[Tensor]) -> None:
                for text in some:
                    run(text)

            return each

        def padded(some: Sequence[Tensor]) -> None:
            for start in range(0, len(some), settings.batch):
                batch = some[start : start + settings.batch]
                longest = max(text.shape[1] for text in batch)
                longest = -(-longest // self.case.segment) * self.case.segment
                rows = [torch.nn.functional.pad(text, (0, longest - text.shape[1])) for text in batch]
                fast(torch.cat(rows))

        ways = {"one at a time": one_at_a_time(fast), "one wavefront": one_wavefront}
        for name, way in ways.items():
            self._piece(name, functools.partial(self._read, way, texts, settings.rounds), "queue")
        self._piece(f"batches of {settings.batch}, padded", lambda: self._read(padded, texts, 1), "queue")
        if settings.opponents:
            own = one_at_a_time(self.model)
            self._piece("the model as it is", lambda: self._read(own, texts[:OWN], 1, warm=2), "queue")

    def _read(
        self, way: Callable[[Sequence[Tensor]], None], texts: Sequence[Tensor], rounds: int, warm: int = WARM
    ) -> dict[str, Any]:
        """Seconds of the whole queue, the best of the rounds."""
        first = measure.seconds(lambda: way(texts[:warm]), self.device)
        seconds = min(measure.seconds(lambda: way(texts), self.device) for _ in range(rounds))
        tokens = sum(text.shape[1] for text in texts)
        return {"documents": len(texts), "warm_s": first, "seconds": seconds, "tokens_a_s": tokens / seconds}

    # ---- generation ----

    def _generation(self, tokens: int) -> None:
        """One text continued by the program and by the model, with a cache and without, and many times."""
        ids = self.case.ids(tokens, self.device)[:1]
        many = {"do_sample": True, "num_return_sequences": CONTINUATIONS}
        self._piece(f"rmtcompile, {tokens}", lambda: self._continued(self.fast, ids), "generation")
        name = f"rmtcompile, {tokens}, {CONTINUATIONS} continuations"
        self._piece(name, lambda: self._continued(self.fast, ids, **many), "generation")
        if self.device.type == "cuda":
            launched = {"cuda_graphs": False}
            name = f"rmtcompile, {tokens}, no CUDA graph for tokens"
            self._piece(name, lambda: self._continued(self.fast, ids, **launched), "generation")
        if self.settings.opponents:
            self._piece(f"the model, {tokens}", lambda: self._continued(self.model, ids), "generation")
            again = {"use_cache": False}
            name = f"the model, {tokens}, its open segment again for each token"
            self._piece(name, lambda: self._continued(self.model, ids, **again), "generation")

    def _continued(self, model: Any, ids: Tensor, **options: Any) -> dict[str, Any]:
        """Seconds to the first token, and for each later one; the best of the rounds."""
        new = self.settings.new_tokens
        warm = measure.seconds(lambda: model.generate(ids, new, **options), self.device)
        rounds = range(self.settings.rounds)
        one = min(measure.seconds(lambda: model.generate(ids, 1, **options), self.device) for _ in rounds)
        all_ = min(measure.seconds(lambda: model.generate(ids, new, **options), self.device) for _ in rounds)
        return {"warm_s": warm, "first_token_s": one, "token_s": (all_ - one) / max(new - 1, 1)}


# ---- tables ----


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """The run, the queue, and generation."""
    yield environment_table(record["environment"])
    if record["queue"]:
        rows = [
            (one["name"], str(one["documents"]), f"{one['seconds']:.3f}", f"{one['tokens_a_s']:,.0f}")
            for one in record["queue"]
        ]
        title = f"a queue of documents, segments of {record['segment']}"
        yield Table(title, ("", "documents", "s", "tokens/s"), rows)
    if record["generation"]:
        times = [
            (one["name"], f"{one['first_token_s'] * 1e3:.1f}", f"{one['token_s'] * 1e3:.2f}")
            for one in record["generation"]
        ]
        header = ("text of so many tokens", "first token ms", "each other ms")
        yield Table(f"generation, segments of {record['segment']}", header, times)


__all__ = ["Session", "Settings", "tables"]
