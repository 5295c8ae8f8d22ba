"""Recording: what every benchmark session keeps: its record, what failed in it, and how much time is left."""

from __future__ import annotations

import contextlib
import datetime
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

import rmtcompile

if TYPE_CHECKING:
    from rmtcompile.bench.shapes import Case


class Recording:
    """Fills `record`, which is what the JSON file holds.

    Args:
        budget: seconds after which nothing new is begun.
        save: writes the record as it is.

    Attributes:
        failed: what failed, in words.
    """

    def __init__(self, device: torch.device, budget: float, save: Callable[[dict[str, Any]], None]) -> None:
        self.device, self.budget, self.save = device, budget, save
        self.started = time.monotonic()
        self.failed: list[str] = []
        self.record: dict[str, Any] = {}

    def begin(self, case: Case, flags: Sequence[str], **lists: Any) -> None:
        """Begin the record of a session that runs one case.

        Args:
            flags: of the command line.
            lists: what the session fills, by name.
        """
        self.record = {
            "environment": environment(self.device, flags),
            "shape": asdict(case.shape),
            "case": {k: str(v) for k, v in asdict(case).items() if k != "shape"},
            "segment": case.segment,
            **lists,
            "failed": self.failed,
        }

    @property
    def is_late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() - self.started >= self.budget

    def say(self, line: str) -> None:
        """A line of progress on stderr."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {line}", file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """Note what has failed, and say so."""
        self.failed.append(line)
        self.say(line)


def environment(device: torch.device, flags: Sequence[str]) -> dict[str, Any]:
    """Versions, date, device and command line."""
    import transformers

    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["rmtcompile", "bench", *flags],
        "rmtcompile": rmtcompile.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device.type,
    }
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
        properties = torch.cuda.get_device_properties(device)
        found["properties"] = (
            f"sm_{properties.major}{properties.minor}, {properties.multi_processor_count} multiprocessors, "
            f"{properties.total_memory / 2**30:.0f} GiB, L2 {properties.L2_cache_size / 2**20:.0f} MiB"
        )
    return found
