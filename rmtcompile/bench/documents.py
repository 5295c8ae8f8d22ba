"""Documents: many inputs of random lengths, one at a time, as a service would meet them.

Hardly a length comes twice, so what counts is the first call of each: what it takes more than a later call of
the same length is spent on captures, on compiling, or on finding out that neither is needed.

Python's collector walks all that a compiler has left alive, in 0.4 s and more, at moments of its own choice.
So what is alive after the documents that do not count is frozen (`gc.freeze`), as servers do it.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.utils import counters

import rmtcompile
from rmtcompile.bench import measure
from rmtcompile.bench.recording import Recording
from rmtcompile.bench.report import Table, environment_table
from rmtcompile.bench.shapes import Case
from rmtcompile.optimized import Optimized

WARM = 2
"""Documents at the start that do not count: the program is captured and compiled there."""

CALLS = 10
"""Calls of each length, the first one included; the median of the last three is the repeated time."""

MOST_OVER_REPEATED, LEAST_UNDER_EAGER = 1.15, 5.0
"""What is wanted: first calls over repeated calls, and the model's own forward over first calls."""


@dataclass(frozen=True)
class Settings:
    """What one run does; see the command line's help."""

    case: Case
    documents: int
    max_segments: int = 40
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: float = float("inf")
    flags: tuple[str, ...] = ()


def lengths_of(case: Case, documents: int, max_segments: int) -> list[int]:
    """Tokens of each document: 1 to `max_segments` whole segments and a rest of 0 to segment - 1 tokens, by
    the seed of the case."""
    draw = random.Random(case.seed)
    return [
        draw.randint(1, max_segments) * case.segment + draw.randrange(case.segment) for _ in range(documents)
    ]


class Session(Recording):
    """Reads documents one at a time, each length again, and the same with the model as it is."""

    def __init__(
        self, settings: Settings, device: torch.device, save: Callable[[dict[str, Any]], None]
    ) -> None:
        super().__init__(device, settings.budget, save)
        self.settings = settings
        case = settings.case
        self.begin(
            case,
            settings.flags,
            max_segments=settings.max_segments,
            lengths=lengths_of(case, settings.documents, settings.max_segments),
            documents=[],
            repeated_s={},
            eager_s={},
        )

    def run(self) -> None:
        """All documents, then each length again, then the model as it is; saved after each part."""
        case = self.settings.case
        torch.compiler.reset()
        measure.release(self.device)
        self.say(f"building {case.shape.layers} layers of width {case.shape.hidden}")
        model = case.build(self.device)
        fast = rmtcompile.optimize(model, **{"progress": self.say, "cache": False, **self.settings.options})
        with torch.no_grad():
            try:
                self._part("documents", self.record["lengths"], lambda i, n: self._document(fast, i, n))
                self._again(model, fast)
            finally:
                gc.unfreeze()
        self.record["summary"] = summary(self.record)
        self.record["seconds"] = time.monotonic() - self.started
        self.save(self.record)

    def _again(self, model: Callable[..., Any], fast: Optimized) -> None:
        """Each length again, then the model as it is."""
        lengths = list(dict.fromkeys(document["tokens"] for document in self.record["documents"]))
        self._part("repeated calls", lengths, lambda i, n: self._repeated(fast, i, n, len(lengths)))
        self._part("eager calls", lengths, lambda i, n: self._eager(model, i, n, len(lengths)))

    def _part(self, what: str, lengths: Sequence[int], one: Callable[[int, int], None]) -> None:
        """Measure one length after the other; one that fails is noted, and the others go on."""
        for i, tokens in enumerate(lengths):
            if self.is_late:
                self.note(f"{what}: {len(lengths) - i} of {len(lengths)} not begun, the time is up")
                break
            try:
                one(i, tokens)
            except torch.OutOfMemoryError:
                measure.release(self.device)
                self.note(f"{what}, {tokens} tokens: out of memory")
            except Exception as error:  # the lengths that are left are measured all the same
                traceback.print_exc()
                self.note(f"{what}, {tokens} tokens: {type(error).__name__}: {error}".splitlines()[0][:300])
        self.save(self.record)

    # ---- one length ----

    def _document(self, fast: Optimized, i: int, tokens: int) -> None:
        """The call of one document, and what it has caused."""
        if i == WARM:
            gc.collect()
            gc.freeze()
        ids = self.settings.case.ids(tokens, self.device)
        captures, compilations, stages = fast.captures, compiled_graphs(), list[str]()
        with fast.reporting(stages.append):
            seconds = measure.seconds(lambda: fast(ids), self.device)
        known = self.record["documents"]
        document = {
            "tokens": tokens,
            "segments": tokens // self.settings.case.segment,
            "rest": tokens % self.settings.case.segment,
            "first_s": seconds,
            "is_new": all(tokens != other["tokens"] for other in known),
            "captures": fast.captures - captures,
            "compilations": compiled_graphs() - compilations,
            "stages": stages,
            "followed_to": fast.explain().followed_to,
            "free_sizes": dict(fast.compiled.sizes),
        }
        document["cause"] = cause_of(document, known)
        known.append(document)
        self.say(
            f"document {i + 1} of {self.settings.documents}: {tokens} tokens, {seconds * 1e3:.1f} ms, "
            f"{document['cause']}"
        )

    def _repeated(self, fast: Optimized, i: int, tokens: int, of: int) -> None:
        """A length that came before, until it has come ten times."""
        ids = self.settings.case.ids(tokens, self.device)
        came = sum(document["tokens"] == tokens for document in self.record["documents"])
        times = [measure.seconds(lambda: fast(ids), self.device) for _ in range(max(3, CALLS - came))]
        self.record["repeated_s"][str(tokens)] = times
        self.say(f"repeated {i + 1} of {of}: {tokens} tokens, {repeated(times) * 1e3:.1f} ms")

    def _eager(self, model: Callable[..., Any], i: int, tokens: int, of: int) -> None:
        """The second call of the model as it is."""
        ids = self.settings.case.ids(tokens, self.device)
        model(ids)
        seconds = measure.seconds(lambda: model(ids), self.device)
        self.record["eager_s"][str(tokens)] = seconds
        self.say(f"eager {i + 1} of {of}: {tokens} tokens, {seconds * 1e3:.1f} ms")


def compiled_graphs() -> int:
    """How many graphs `torch.compile` has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


def repeated(times: Sequence[float]) -> float:
    """The time of a length that came often: the median of the last three calls."""
    return statistics.median(times[-3:])


def cause_of(document: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> str:
    """Why the first call of a length took longer than a later one, in words.

    Args:
        before: the documents that came before it.
    """
    causes = []
    if document["captures"]:
        counts = [stage for stage in document["stages"] if stage.startswith("capture")]
        causes.append(f"{_several(document['captures'], 'program')} captured ({'; '.join(counts)})")
    elif document["free_sizes"] and _of_rules(document) not in [_of_rules(other) for other in before]:
        causes.append("first use of rules for free sizes, compared with the model")
    if document["compilations"]:
        causes.append(f"{_several(document['compilations'], 'graph')} compiled")
    if document["followed_to"] > max((other["followed_to"] for other in before), default=0):
        causes.append(f"forward followed to {document['followed_to']} segments")
    if not causes and not document["is_new"]:
        return "length came before"
    return ", ".join(causes) or "nothing captured or compiled"


def _of_rules(document: Mapping[str, Any]) -> tuple[tuple[str, bool], ...] | None:
    """Which sizes were free where rules gave the program, and which of them were 1, which is a case of its
    own; None where it was captured, or has no free sizes."""
    if document["captures"] or not document["free_sizes"]:
        return None
    return tuple((name, size == 1) for name, size in sorted(document["free_sizes"].items()))


def _several(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


# ---- tables ----


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Sums over the documents behind the first two: of first calls and repeated ones where both times are
    there, and of the eager calls beside the first calls of the same documents."""
    counted = [d for d in record["documents"][WARM:] if str(d["tokens"]) in record["repeated_s"]]
    beside = [d for d in counted if str(d["tokens"]) in record["eager_s"]]
    first = sum(d["first_s"] for d in counted)
    again = sum(repeated(record["repeated_s"][str(d["tokens"])]) for d in counted)
    eager = sum(record["eager_s"][str(d["tokens"])] for d in beside)
    first_beside = sum(d["first_s"] for d in beside)
    return {
        "documents": len(counted),
        "eager_documents": len(beside),
        "first_s": first,
        "repeated_s": again,
        "eager_s": eager,
        "first_over_repeated": first / again if again else float("nan"),
        "eager_over_first": eager / first_beside if first_beside else float("nan"),
        "captures": sum(d["captures"] for d in counted),
        "compilations": sum(d["compilations"] for d in counted),
        "worst": max(counted, key=lambda d: excess(record, d), default=None),
    }


def excess(record: Mapping[str, Any], document: Mapping[str, Any]) -> float:
    """Seconds that the call of a document took more than a repeated call of its length."""
    return float(document["first_s"] - repeated(record["repeated_s"][str(document["tokens"])]))


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """The run, each document, and the sums that the run is for."""
    yield environment_table(record["environment"])
    if record["documents"]:
        yield _each(record)
    found = record.get("summary") or summary(record)
    if found["documents"]:
        yield _sums(record, found)


def _each(record: Mapping[str, Any]) -> Table:
    rows = []
    for i, document in enumerate(record["documents"]):
        times = record["repeated_s"].get(str(document["tokens"]))
        eager = record["eager_s"].get(str(document["tokens"]))
        rows.append(
            (
                f"{i + 1}" + "*" * (i < WARM),
                f"{document['segments']} + {document['rest']}",
                _ms(document["first_s"]),
                _ms(repeated(times)) if times else "",
                _ms(eager) if eager else "",
                str(document["captures"]),
                str(document["compilations"]),
                document["cause"],
            )
        )
    times = ("first ms", "repeated ms", "eager ms")
    header = ("document", "segments + rest", *times, "captured", "compiled", "cause")
    title = f"documents of random lengths, segments of {record['segment']} (*: not counted)"
    return Table(title, header, rows)


def _sums(record: Mapping[str, Any], found: Mapping[str, Any]) -> Table:
    worst = found["worst"]
    over, under = found["first_over_repeated"], found["eager_over_first"]
    eager = (
        ("eager", f"{found['eager_s']:.3f} s", f"of {found['eager_documents']} documents"),
        (
            "eager / first",
            f"{under:.2f}",
            f"{_held(under >= LEAST_UNDER_EAGER)}: at least {LEAST_UNDER_EAGER:g}",
        ),
    )
    rows = [
        ("first calls", f"{found['first_s']:.3f} s", ""),
        ("repeated calls", f"{found['repeated_s']:.3f} s", ""),
        (
            "first / repeated",
            f"{over:.3f}",
            f"{_held(over <= MOST_OVER_REPEATED)}: at most {MOST_OVER_REPEATED:g}",
        ),
        *(eager if found["eager_documents"] else ()),
        ("programs captured", str(found["captures"]), ""),
        ("graphs compiled", str(found["compilations"]), ""),
        (
            "worst document",
            f"+{excess(record, worst) * 1e3:.1f} ms",
            f"{worst['segments']} segments + {worst['rest']}: {worst['cause']}",
        ),
    ]
    return Table(f"{found['documents']} documents after the first {WARM}", ("", "", "wanted, cause"), rows)


def _held(is_held: bool) -> str:
    return "yes" if is_held else "no"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
