"""Documents: many texts through one model, the segments of each right behind the last of the one before.

    results = fast.map(texts)
    for result in fast.stream(texts): ...      texts is read as the wavefront gets room

One text fills the wavefront only between its ramp-up and its ramp-down. A queue of texts has one ramp-up and
one ramp-down in all, where the program lets cells of several texts run in one call.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from rmtcompile.binding.arguments import of_document, tensors_of
from rmtcompile.compiler.results import value_of
from rmtcompile.dispatch.boundary import explained
from rmtcompile.dispatch.calls import Call
from rmtcompile.dispatch.compared import of_segments
from rmtcompile.dispatch.entries import Entry, is_loaded
from rmtcompile.dispatch.leaving import leave
from rmtcompile.dispatch.prefixes import Prefixes, chain
from rmtcompile.errors import RMTCompileError, UnsupportedError
from rmtcompile.passes.emit.together import apart
from rmtcompile.runtime.contexts import own_modes, plain_tensors
from rmtcompile.runtime.packed import Member, Pack, Snapshot, go_together, version, written_over

if TYPE_CHECKING:
    from rmtcompile.optimized import Optimized


class FailedDocument:
    """Stands for the result of a document that has failed; to use it raises what the model has raised.

    Attributes:
        error: what was raised.
        index: which document it was, in their order.
    """

    def __init__(self, error: Exception, index: int) -> None:
        self.error = error
        self.index = index

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.error

    def __getitem__(self, key: Any) -> Any:
        raise self.error

    def __iter__(self) -> Iterator[Any]:
        raise self.error

    def __repr__(self) -> str:
        return f"FailedDocument({self.index}: {type(self.error).__name__}: {self.error})"


_FIRST = "it is the first one of its program"


@dataclass(frozen=True)
class _Document:
    """A document on its way.

    Attributes:
        index: its place among all.
        call, entry: what runs it; None where it is called by itself.
        versions: of its tensors, and of what the program reads of the model, when it enters.
    """

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: Call | None = None
    entry: Entry | None = None
    versions: list[int] = field(default_factory=list)


class Stream:
    """Results of documents, in their order, each as soon as it is there; made by `Optimized.stream`.

    The next documents are read as the wavefront gets room: as many are on their way as have cells on a level.
    Documents that have entered are not finished before the next one was read, or there is none.

    Args:
        together: whether documents may run in one wavefront; "auto": where that makes fewer calls of cells,
            and runs are not put together of recordings.
        share_prefixes: whether whole segments with which several documents begin are run once.

    Attributes:
        alone: why documents ran by themselves, and how many did.
        shared: documents that have gone on from what another one had left.
        shared_segments, segments: those that were not run again, and all.
    """

    def __init__(
        self, fast: Optimized, documents: Iterable[Any], together: bool | str, share_prefixes: bool
    ) -> None:
        if together != "auto" and not isinstance(together, bool):
            raise ValueError(f"together must be True, False or 'auto', not {together!r}")
        self._fast = fast
        self._together = True if share_prefixes and together == "auto" else together
        self._prefixes: Prefixes | None = None
        self._snapshots: dict[bytes, tuple[Snapshot, Entry]] = {}
        self.shared = self.shared_segments = self.segments = 0
        if share_prefixes:
            documents = list(documents)
            self._prefixes = Prefixes([self._chain(document) for document in documents])
        self._pack: Pack | None = None
        self._lead: Entry | None = None
        self._left: Entry | None = None  # the program of the last document that has ended
        self.alone: Counter[str] = Counter()
        self._results = self._run(iter(documents))

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        return next(self._results)

    def close(self) -> None:
        """Read no more documents, and drop those on their way."""
        self._results.close()
        self._pack = self._lead = None

    def _run(self, documents: Iterator[Any]) -> Generator[Any]:
        for index in itertools.count():
            self._forget()
            try:
                document = next(documents)
            except StopIteration:
                break
            except Exception as error:  # what has come until then is finished first
                try:
                    self._ends(f"{type(error).__name__}: {error}")
                except RMTCompileError:  # what other ranks are told
                    raise error from None
                yield from self._drained()
                raise
            if self._prefixes is not None:
                self._prefixes.passed(index)
            with self._fast._lock, torch.no_grad():
                one = self._found(index, document)
                why = "" if isinstance(one, FailedDocument) else self._obstacle(one)
                if why == _FIRST and isinstance(one, _Document) and self._leads_in(one):
                    why = self._obstacle(one)
            if isinstance(one, FailedDocument) or why:
                yield from self._drained()
                self.alone.update([why] if why else [])
                yield one if isinstance(one, FailedDocument) else self._by_itself(one)
                continue
            yield from self._admit(one)
            while self._pack is not None and not self._pack.has_room:
                yield from self._stepped()
        self._ends()
        yield from self._drained()

    def _ends(self, why: str | None = None) -> None:
        """No document comes any more, on any rank; where others go on, all are told."""
        if (group := self._fast.options.group) is not None:
            from rmtcompile.runtime.bands.control import words_of

            words_of(group).gathered("end a queue of documents", why)

    # ---- documents -----------------------------------------------------------------------------------------

    def _found(self, index: int, document: Any) -> _Document | FailedDocument:
        """A document and what runs it."""
        fast = self._fast
        try:
            args, kwargs = of_document(document)
        except TypeError as error:
            return FailedDocument(error, index)
        falls_back = fast.options.fallback is not None
        if not self._together or (falls_back and fast._refusals):
            return _Document(index, args, kwargs)
        try:
            with fast._in_step(), explained(fast.model, args, kwargs):
                call = fast._programs.located(args, kwargs)
                call, entry = fast._programs.entry(call, args, kwargs)
        except UnsupportedError as error:  # by itself it may have a program of its own
            _failed(error, index)
            return _Document(index, args, kwargs)
        except Exception as error:
            if isinstance(error, RMTCompileError) and falls_back:
                return _Document(index, args, kwargs)
            return FailedDocument(error, index)
        return _Document(index, args, kwargs, call, entry)

    def _obstacle(self, one: _Document) -> str:
        """Why a document does not run in a wavefront with others; empty if it does.

        What a run leaves in the model may be what the next one reads. So a pack begins behind a run of the
        same code that has ended, after which the program still holds.
        """
        if not self._together:
            return "documents are to run by themselves"
        if one.entry is None:
            return "no program runs it"
        if getattr(self._fast, "is_wrapped", False):
            return "there are hooks, or what others have wrapped, around each call"
        entry, executor = one.entry, one.entry.executor
        if self._together == "auto" and executor.is_replayed:
            return "runs are put together of recordings"
        if entry.is_edited:
            return "its program was edited"
        if executor.bands and self._prefixes is not None:
            return "its layers are cut into bands, which share no beginnings"
        if is_loaded(entry.compiled):
            return "its program was loaded, without what tells whether texts may share a call"
        if entry.compiled.written or executor.replaced or entry.compiled.capture.guard.counters:
            return "the forward goes on from what it has left in the model"
        if found := apart(entry.compiled.program):
            return found
        groups = entry.compiled.program.groups
        if self._together == "auto" and any(max(group.classes) < 0 for group in groups):
            return "a last segment of its own kind cuts the wavefront in two, which makes no fewer calls"
        before = self._lead if self._pack is not None else self._left
        if entry.compiled.effects and (before is None or not go_together(executor, before.executor)):
            return _FIRST
        return ""

    def _leads_in(self, one: _Document) -> bool:
        """Run the first few segments of a document whose beginning others share: behind that it may stand in
        a wavefront, and leave them what they go on from. Whether that was done."""
        assert one.call is not None and one.entry is not None
        tail = _tail(one.entry)
        if self._prefixes is None or not self._prefixes.borders(one.index, one.call.count - tail):
            return False
        few = max(one.entry.compiled.rolled.proved_on[0], tail + 1)
        if self._pack is not None or few >= one.call.count:
            return False
        args, kwargs = of_segments(one.args, one.kwargs, one.entry.segmentation, few)
        programs = self._fast._programs
        try:
            self._fast(*args, **kwargs)
            _, self._left = programs.entry(programs.located(args, kwargs), args, kwargs)
        except Exception:  # which is said when the document runs
            return False
        return True

    def _by_itself(self, one: _Document) -> Any:
        """The result of a document that runs by itself."""
        try:
            with torch.no_grad():
                result = self._fast(*one.args, **one.kwargs)
        except Exception as error:
            return _failed(error, one.index)
        self._left = one.entry
        return result

    # ---- the pack ------------------------------------------------------------------------------------------

    def _admit(self, one: _Document) -> Iterator[Any]:
        """Put a document behind the others; gives what has to end before."""
        assert one.call is not None and one.entry is not None
        executor = one.entry.executor
        if self._pack is not None and self._lead and not go_together(executor, self._lead.executor):
            yield from self._drained()
        if self._pack is None:
            self._pack, self._lead = executor.pack(), one.entry
        pack = self._pack
        after, snapshots = self._after(one), self._to_keep(one)
        while after is not None and not after.is_ready and self._pack is pack and pack.members:
            yield from self._stepped()
        if self._pack is None:  # cells have failed meanwhile
            yield self._by_itself(one)
            return
        if after is not None and not after.is_ready:
            after = None
        self.segments += one.call.count
        if after is not None:
            self.shared, self.shared_segments = self.shared + 1, self.shared_segments + after.border
        try:
            with self._fast._lock:
                inputs = tensors_of(one.args, one.kwargs)
                member = pack.text(executor, one, one.call.count, inputs, after, snapshots)
                one.versions[:] = version(inputs), version(member.leaves.values())
                pack.admit(member)
        except Exception as error:
            failed = _failed(error, one.index)
            yield from self._drained()
            yield failed

    # ---- prefixes ------------------------------------------------------------------------------------------

    def _chain(self, document: Any) -> list[bytes]:
        """What tells the beginnings of a document; nothing where it cannot be cut."""
        try:
            args, kwargs = of_document(document)
            return chain(self._fast._programs.segmentation(args, kwargs), args, kwargs)
        except Exception:  # which is said when it is its turn
            return []

    def _after(self, one: _Document) -> Snapshot | None:
        """What another document with the same beginning has left, or is about to: the longest."""
        assert one.call is not None and one.entry is not None
        known = self._prefixes.chains[one.index] if self._prefixes is not None else []
        for prefix in reversed(known[: max(one.call.count - _tail(one.entry), 0)]):
            snapshot, entry = self._snapshots.get(prefix, (None, None))
            if entry is not None and go_together(one.entry.executor, entry.executor):
                return snapshot
        return None

    def _to_keep(self, one: _Document) -> list[Snapshot]:
        """What this document is to leave for others."""
        assert one.call is not None and one.entry is not None
        carried, found = one.entry.compiled.emitted.carried, []
        if self._prefixes is None or carried.obstacle:
            return []
        start = after.border if (after := self._after(one)) is not None else 0
        for border in self._prefixes.borders(one.index, one.call.count - _tail(one.entry)):
            prefix = self._prefixes.chains[one.index][border - 1]
            if border > start and prefix not in self._snapshots:
                found.append(Snapshot(carried, border))
                self._snapshots[prefix] = found[-1], one.entry
        return found

    def _forget(self, failed: Sequence[Member] = ()) -> None:
        """Drop what no other document goes on from, and what documents that have failed will not leave."""
        lost = [one for member in failed for one in member.snapshots if not one.is_ready]
        if self._prefixes is not None:
            wanted = self._prefixes.is_wanted
            known = self._snapshots.items()
            self._snapshots = {key: one for key, one in known if wanted(key) and one[0] not in lost}

    def _drained(self) -> Iterator[Any]:
        """What is on its way, run to its end."""
        if self._pack is not None and self._pack.members:
            self._pack.drain()
        while self._pack is not None and self._pack.members:
            yield from self._stepped()
        self._pack = self._lead = None

    def _stepped(self) -> Iterator[Any]:
        """Run one level; gives the results of texts that have ended with it."""
        pack = self._pack
        assert pack is not None
        try:
            with self._fast._lock, plain_tensors(), own_modes():
                ended = pack.step()
        except Exception:  # in cells, which may be those of any text
            ended, self._pack, self._lead = [], None, None
        if self._pack is None:
            self._forget(pack.members)
            yield from (self._by_itself(member.name) for member in pack.members)
        for member in ended:
            yield self._result(member)

    def _result(self, member: Member) -> Any:
        """What a text that has ended gives, and the model left as after its call."""
        one: _Document = member.name
        assert one.call is not None and one.entry is not None
        if member.final is not None:
            return FailedDocument(member.final, one.index)
        if member.error is not None:
            self._forget([member])
            return self._by_itself(one)  # which says what it is
        inputs = tensors_of(one.args, one.kwargs)
        if version(inputs) != one.versions[0]:
            return FailedDocument(written_over(), one.index)
        if version(member.leaves.values()) != one.versions[1]:  # cells of both have run
            return self._by_itself(one)
        with self._fast._lock:
            self._fast._last = one.entry, one.call.count
            leave(one.entry, one.call.count, member.outputs, inputs)
            self._left = one.entry
            return value_of(one.entry.compiled.result, member.outputs, one.call.count)


def _failed(error: Exception, index: int) -> FailedDocument:
    """What stands for a document's result; ranks that have lost step raise the error, which ends queues."""
    if not getattr(error, "is_in_step", True):
        raise error
    return FailedDocument(error, index)


def _tail(entry: Entry) -> int:
    """Segments at the end of a text that differ from all others."""
    return max(entry.compiled.emitted.borders.tail, 1)


__all__ = ["FailedDocument", "Stream"]
