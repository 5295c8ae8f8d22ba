"""Control: what ranks tell each other, apart from the values of a program.

    NCCL     values, from device to device
    gloo     whether all run the same, shapes, what has failed: objects, from host to host

Words that go through a device wait for all that it was given before, and NCCL ends a process where another
one has died.  So ranks whose group has no backend for the host's memory get a second group for words.
Each rank says what it talks about, so that ranks that have lost step find out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from rmtcompile.errors import RankError, UnsupportedError

RUN = "run a program"
_FAILED = "end a call that has failed"

_HELP = "call with the same model and the same arguments on every rank, in the same order"

_KNOWN: WeakKeyDictionary[Any, Words] = WeakKeyDictionary()


def sends_from(group: Any, device: torch.device) -> bool:
    """Whether a group sends what lies on such a device."""
    return f"{device.type}:" in str(dist.get_backend_config(group))


def words_of(group: Any) -> Words:
    """The words of a group; made when all of its ranks first ask."""
    if group not in _KNOWN:
        _KNOWN[group] = Words(group)
    return _KNOWN[group]


class Words:
    """What the ranks of a group tell each other: all of them the same kind of thing at the same time.

    Attributes:
        group: over which they do.
        calls: of programs of the group that this rank has begun.
        agreed: what all ranks have agreed on, by what it is about.
    """

    _raised: Exception | None = None  # in this call, by all ranks
    _is_calling = False

    def __init__(self, group: Any) -> None:
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self.calls = 0
        self.agreed: dict[str, Any] = {}
        self.group = group
        if not sends_from(group, torch.device("cpu")) and dist.is_gloo_available():
            self.group = dist.new_group(
                dist.get_process_group_ranks(group),
                timeout=_timeout(group),
                backend="gloo",
                use_local_synchronization=True,
            )

    def gathered(self, about: str, mine: Any) -> list[Any]:
        """What each rank says.

        Args:
            about: what ranks are about to do; the same words on all of them.

        Raises:
            RankError: a rank has failed, or does not answer any more.
            UnsupportedError: ranks are about to do different things.
        """
        if self._raised is not None:  # what was tried meanwhile has taken it for an error of its own
            raise self._raised
        try:
            return self._gathered(about, mine)
        except (RankError, UnsupportedError) as error:
            self._raised = error if self._is_calling else None
            raise

    def _gathered(self, about: str, mine: Any) -> list[Any]:
        found: list[Any] = [None] * self.count
        with told(f"rank {self.rank}: another rank does not answer any more"):
            dist.all_gather_object(found, (about, self.calls, mine), group=self.group)
        calls = [n for _, n, _ in found]
        if len({what for what, *_ in found}) > 1 or about == RUN:
            self.calls = max(calls)  # in step again, whatever follows
        failed = [f"rank {rank}: {said}" for rank, (what, _, said) in enumerate(found) if what == _FAILED]
        if failed and about != _FAILED:
            raise RankError("\n".join(failed))
        if not failed and len({what for what, *_ in found}) > 1:
            lines = [
                f"rank {rank} is about to {what}" + (f": {said}" if isinstance(said, str) else "")
                for rank, (what, _, said) in enumerate(found)
            ]
            raise _different("what comes next", lines, is_in_step=False)
        if about == RUN and len(set(calls)) > 1:
            lines = [f"rank {rank}: call {n}" for rank, n in enumerate(calls)]
            raise _different("one of them has left out a call", lines, is_in_step=False)
        return [said for *_, said in found]

    def differ(self, what: str, evidence: list[str]) -> NoReturn:
        """Raise on all ranks that they are about to run different things; to be called on all of them."""
        error = _different(what, evidence)
        self._raised = error if self._is_calling else None
        raise error

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call of a program. Where it fails on this rank alone, others that wait for it are told."""
        self.calls += 1
        before, self._is_calling = self._is_calling, True
        try:
            yield
            if self._raised is not None:
                raise self._raised
        except RankError:
            raise
        except Exception as error:
            if self._raised is not None and self._raised is not error:
                raise self._raised from error
            if not getattr(error, "is_of_all_ranks", False):
                with suppress(RankError, UnsupportedError):
                    self._gathered(_FAILED, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            raise
        finally:
            self._raised, self._is_calling = None, before


def _different(what: str, evidence: list[str], is_in_step: bool = True) -> UnsupportedError:
    """What all ranks raise that are about to run different things.

    Args:
        is_in_step: whether these are at least things of one kind.
    """
    error: Any = UnsupportedError(f"ranks are about to run different things: {what}", evidence, _HELP)
    error.is_of_all_ranks, error.is_in_step = True, is_in_step
    found: UnsupportedError = error
    return found


@contextmanager
def told(text: str) -> Iterator[None]:
    """Where another rank does not answer, or there is no group any more, an error that says so."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(f"{text}: {_said(error)}") from None
    except ValueError:  # of torch.distributed: it knows no such group
        raise RankError(f"{text}: there is no process group any more") from None


def _said(error: Exception) -> str:
    """The first sentence of an error of torch.distributed, without its place in the source."""
    line = re.sub(r"^(\[[^\]]*\.(cc|cpp|h):\d+\]\s*)+", "", str(error).partition("\n")[0])
    return re.split(r"(?<=[a-z\d\]])\. ", line)[0]


def _timeout(group: Any) -> timedelta | None:
    """How long ranks of a group wait for each other, if it says so."""
    options = getattr(group._get_backend(torch.device("cuda")), "options", None)
    return getattr(options, "_timeout", None)


__all__ = ["RUN", "Words", "sends_from", "told", "words_of"]
