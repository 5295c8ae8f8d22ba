"""Cases of tests/ranks.py: a queue of texts in one wavefront, of which each rank runs its own layers."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
import torch.distributed as dist
from rank_models import DEVICES, Failing, broken, features, made, of_zoo, optimized, refused
from toys import Toy, assert_same

import rmtcompile
from rmtcompile import FailedDocument
from rmtcompile.runtime.bands.rank_packed import RankPack

COUNTS = (4, 5, 1, 3, 6, 4)


def of_levels() -> list[int]:
    """Grows by the number of texts on their way, on each level of a pack."""
    seen: list[int] = []
    step = RankPack.step

    def counted(pack: RankPack) -> Any:
        seen.append(len(pack.members))
        return step(pack)

    RankPack.step = counted  # type: ignore[method-assign]
    return seen


def queued(rank: int, group: Any) -> Any:
    """Any lengths and ragged ends, also where values go down, in one wavefront; compiled cells."""
    levels = of_levels()
    names = ["infini_attention", "skewed", "compressed_older", "skip_connections", "alternating"]
    for name in (*names, "hybrid"):
        model, _ = of_zoo(name, 1)
        texts = [of_zoo(name, count)[1] for count in COUNTS]
        is_ragged = name in ("infini_attention", "skip_connections")
        texts += [text[:, :-1] for text in texts[:2]] if is_ragged else []
        backend = "aot_eager" if name == "infini_attention" and DEVICES[-1] == "cpu" else "eager"
        fast = rmtcompile.optimize(copy.deepcopy(model), devices=group, backend=backend)
        stream = fast.stream(texts, together=True)
        for text, result in zip(texts, stream, strict=True):
            assert_same(copy.deepcopy(model)(text), result)
        assert not stream.alone, stream.alone
    assert max(levels) > 1
    model, levels[:] = made(lambda: Toy(4)), []
    fast = optimized(copy.deepcopy(model), group)
    texts = [features(count) for count in COUNTS]
    for text, result in zip(texts, fast.map(texts, together=True), strict=True):
        assert_same(model(text), result)
    assert len(levels) == sum(COUNTS) + 4 - 1, "one ramp for all"
    return "same"


def queued_failing(rank: int, group: Any) -> Any:
    """A text that fails on one rank fails on all, with the same words, and stops no other."""
    model = made(Failing)
    fast = optimized(copy.deepcopy(model), group)
    texts = [torch.zeros(1, 4 * count, dtype=torch.long, device=DEVICES[-1]) for count in COUNTS]
    texts[1][0, 13] = 7
    results = fast.map(texts, together=True)
    for text, result in zip(texts, results, strict=True):
        if not isinstance(result, FailedDocument):
            assert_same(model(text), result)
    return [[i, str(one.error)] for i, one in enumerate(results) if isinstance(one, FailedDocument)]


def failing_once(times: int, call: Any, failed: list[int]) -> Any:
    """Fails when it is called for the given time, and notes that."""
    calls = itertools.count(1)

    def failing(*given: Any) -> Any:
        if next(calls) == times:
            failed.append(times)
            broken()
        return call(*given)

    return failing


def queued_again(rank: int, group: Any) -> Any:
    """What has failed once runs again by itself: a text before its first level, its entry, and the cells of
    all texts on their way. So it does where a rank's copies of weights are no more those of the model."""
    model, last = made(lambda: Toy(4)), dist.get_world_size() - 1
    fast = optimized(copy.deepcopy(model), group)
    texts = [features(count) for count in COUNTS]
    fast.map(texts, together=True)
    executor = fast._last[0].executor
    member, failed = executor.members[rank], [0]
    for where in ("named", "fill", "cells", "copies"):
        cells, fill = member.functions["CELLS"]["layers"], member.functions["fill"]
        if rank == last and where == "named":
            executor.given_to = failing_once(2, executor.given_to, failed)
        elif rank == last and where == "fill":
            member.functions["fill"] = failing_once(6, fill, failed)
        elif rank == last and where == "cells":
            member.functions["CELLS"]["layers"] = failing_once(6, cells, failed)
        elif rank == last:
            member.copies.hold = failing_hold(failed)
        for text, result in zip(texts, fast.map(texts, together=True), strict=True):
            assert not isinstance(result, FailedDocument), (where, said_of(result))
            assert_same(model(text), result)
        executor.__dict__.pop("given_to", None)
        member.copies.__dict__.pop("hold", None)
        member.functions["CELLS"]["layers"], member.functions["fill"] = cells, fill
    assert len(failed) == (5 if rank == last else 1), failed
    return "same"


def failing_hold(failed: list[int]) -> Any:
    """Does not hold when it is asked for the second time."""
    held = failing_once(2, lambda: True, failed)
    return lambda: refused(held, ZeroDivisionError) == "ran"


def queued_elsewhere(rank: int, group: Any) -> Any:
    """One rank reads another text, or one text fewer: all are told, and none waits. A queue that all leave
    before its end is followed by calls as ever."""
    model = made(lambda: Toy(4))
    fast = optimized(copy.deepcopy(model), group)
    texts = [features(count) for count in COUNTS]
    stream = fast.stream(texts, together=True)
    assert_same(model(texts[0]), next(stream))
    stream.close()
    assert_same(model(texts[3]), fast(texts[3]))
    told = []

    def breaking(at: int) -> Any:
        yield from texts[:at]
        if rank == 1:
            raise KeyError("mine")
        yield from texts[at:]

    queues = [[texts[0], texts[1] + rank, texts[2]], texts[: 3 - (rank == 1)], breaking(2), breaking(0)]
    for queue in queues:
        results = refused(lambda queue=queue: told.append(fast.map(queue, together=True)), Exception)
        told[:] = told if results == "ran" else [*told, results]
    return [x if isinstance(x[0], str) else [said_of(one) for one in x] for x in told]


def queued_written(rank: int, group: Any) -> Any:
    """What is written while texts are on their way, on one rank or on all: weights (the same values, or new
    ones that are broadcast), after which all texts run again; or a text, which fails on all ranks."""
    model = made(lambda: Toy(4))
    twin = copy.deepcopy(model)
    fast, weight = optimized(twin, group), next(twin.parameters())
    told = []
    for what in ("weights", "broadcast", "text"):
        texts = [features(count) for count in COUNTS]
        results = []
        for result in fast.stream(texts, together=True):
            results.append(result)
            if len(results) == 1 and rank == 0 and what == "weights":
                weight.copy_(weight.clone())
            if len(results) == 1 and what == "broadcast":
                for one, other in zip(twin.parameters(), model.parameters(), strict=True):
                    other.mul_(0.9)
                    one.mul_(0.9 if rank == 0 else 1)
                    dist.broadcast(one, 0)
            if len(results) == 1 and rank == 1 and what == "text":
                texts[1].mul_(2)
        told += [said_of(one) for one in results if isinstance(one, FailedDocument)]
        for text, result in list(zip(texts, results, strict=True))[1:]:
            if not isinstance(result, FailedDocument):
                assert_same(model(text), result)
        assert_same(model(texts[3]), fast(texts[3]))
    return told


def said_of(result: Any) -> str:
    return str(result.error) if isinstance(result, FailedDocument) else "ran"


ALL = (queued, queued_failing, queued_again, queued_elsewhere, queued_written)
