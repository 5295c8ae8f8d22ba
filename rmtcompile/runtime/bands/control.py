"""Control: over which group ranks agree, apart from the one that carries their values.

    NCCL     values, from device to device
    gloo     whether all run the same, shapes, what has failed: objects, from host to host

Words that go through a device wait for all that it was given before, and NCCL ends a process where another
one has died.  So ranks whose group has no backend for the host's memory get a second group for words.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

_COMPANIONS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def sends_from(group: Any, device: torch.device) -> bool:
    """Whether a group sends what lies on such a device."""
    return f"{device.type}:" in str(dist.get_backend_config(group))


def words_of(group: Any) -> Any:
    """The group over which its ranks tell each other objects; made when all of them first ask."""
    if sends_from(group, torch.device("cpu")) or not dist.is_gloo_available():
        return group
    if group not in _COMPANIONS:
        _COMPANIONS[group] = dist.new_group(
            dist.get_process_group_ranks(group),
            timeout=_timeout(group),
            backend="gloo",
            use_local_synchronization=True,
        )
    return _COMPANIONS[group]


def _timeout(group: Any) -> timedelta | None:
    """How long ranks of a group wait for each other, if it says so."""
    options = getattr(group._get_backend(torch.device("cuda")), "options", None)
    return getattr(options, "_timeout", None)


__all__ = ["sends_from", "words_of"]
