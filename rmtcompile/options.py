"""What the user may choose."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, TypedDict

import torch

CACHE = "RMTCOMPILE_CACHE"
"""The environment variable that names the folder of `cache` where none is given."""

Devices = Any
"""How the devices of bands of layers are given: "auto", a list of devices, numbers of layers by device, or a
process group or a mesh of one dimension of `torch.distributed`; None: one device."""


class Chosen(TypedDict, total=False):
    """The arguments of `rmtcompile.optimize` beside the model."""

    segment_size: int | None
    layers: str | None
    plan: str
    backend: str | Callable[..., Any]
    cuda_graphs: str | bool
    fallback: str | None
    verify: bool
    progress: bool | Callable[[str], Any]
    recompute: str | int
    cache: str | PathLike[str] | Literal[False] | None
    devices: Devices


@dataclass(frozen=True)
class Options:
    """What the user may choose; see `rmtcompile.optimize`.

    Attributes:
        layer_counts: how many layers each of the devices has; empty where nobody has said.
        joins: what the compiler itself chooses: how joins of values of several segments are written, as they
            come out of `forward_stores` (""; "held" or "listed", see there), or "nested" (see `nest`).
    """

    layers: str | None = None
    segment_size: int | None = None
    plan: str = "auto"
    backend: str | Callable[..., Any] = "auto"
    cuda_graphs: str | bool = "auto"
    fallback: str | None = None
    verify: bool = False
    recompute: str | int = "auto"
    cache: str | None = None
    devices: tuple[torch.device, ...] = ()
    group: Any = None
    layer_counts: tuple[int, ...] = ()
    passes_off: frozenset[str] = frozenset()
    min_segments_captured: int = 2
    max_segments_captured: int = 6
    joins: str = ""

    @property
    def has_bands(self) -> bool:
        """Whether the layers are cut into bands."""
        return bool(self.devices) or self.group is not None


def check_options(
    segment_size: Any,
    layers: Any,
    plan: Any,
    backend: Any,
    cuda_graphs: Any,
    fallback: Any,
    verify: Any,
    progress: Any,
    recompute: Any,
    cache: Any,
) -> None:
    """Check the arguments of `rmtcompile.optimize`.

    Raises:
        ValueError: an option has no such value.
    """
    if plan not in ("auto", "diagonal", "sequential"):
        raise ValueError(f"plan must be 'auto', 'diagonal' or 'sequential', not {plan!r}")
    if fallback not in (None, "sequential"):
        raise ValueError(f"fallback must be None or 'sequential', not {fallback!r}")
    if not (isinstance(backend, str) or callable(backend)):
        raise ValueError(f"backend must be a name or a callable of torch.compile, not {backend!r}")
    if isinstance(backend, str) and backend not in ("auto", "eager", "inductor"):
        _check_backend(backend)
    if cuda_graphs != "auto" and not isinstance(cuda_graphs, bool):
        raise ValueError(f"cuda_graphs must be 'auto', True or False, not {cuda_graphs!r}")
    if cuda_graphs is True and not torch.cuda.is_available():
        raise ValueError("cuda_graphs=True needs a CUDA device; 'auto' records graphs where there is one")
    is_count = isinstance(segment_size, int) and not isinstance(segment_size, bool) and segment_size > 0
    if segment_size is not None and not is_count:
        raise ValueError(f"segment_size must be a positive number of tokens, not {segment_size!r}")
    if layers is not None:
        try:
            re.compile(layers)
        except (re.error, TypeError) as error:
            message = f"layers must be a path or a regular expression, not {layers!r}: {error}"
            raise ValueError(message) from None
    if not isinstance(verify, bool):
        raise ValueError(f"verify must be True or False, not {verify!r}")
    is_levels = isinstance(recompute, int) and not isinstance(recompute, bool) and recompute > 0
    if not is_levels and recompute not in ("auto", "none", "level"):
        raise ValueError(
            f"recompute must be 'auto', 'none', 'level' or a positive number of levels, not {recompute!r}"
        )
    if not isinstance(progress, bool) and not callable(progress):
        raise ValueError(f"progress must be True, False or a callable, not {progress!r}")
    if cache is not None and cache is not False and not isinstance(cache, (str, PathLike)):
        raise ValueError(f"cache must be the path of a folder, or False for none, not {cache!r}")


def cache_folder(cache: str | PathLike[str] | Literal[False] | None) -> str | None:
    """The folder in which programs are kept: the one that is given, or else that of the environment."""
    if cache is None:
        return os.environ.get(CACHE) or None
    return None if cache is False else os.fspath(cache)


def group_of(devices: Devices) -> Any:
    """The process group whose ranks run bands, if that is what is given.

    Raises:
        ValueError: a mesh has several dimensions, or this process is in no such group.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(devices, DeviceMesh):
        if devices.ndim != 1:
            raise ValueError(f"devices must be a mesh of one dimension, such as mesh['bands'], not {devices}")
        return devices.get_group()
    if isinstance(devices, int) and devices == torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("devices is a process group that this process is no member of")
    return devices if isinstance(devices, torch.distributed.ProcessGroup) else None


def bands_on(devices: Devices, plan: str, recompute: str | int) -> tuple[torch.device, ...]:
    """The device of each band of layers; none where the layers are not cut.

    Raises:
        ValueError: there is no such device, or another option cannot be had with bands.
    """
    if devices is None:
        return ()
    if plan == "sequential":
        raise ValueError("plan='sequential' runs one cell after the other: one device is enough")
    if isinstance(recompute, int) and recompute > 1:
        raise ValueError("with devices, levels are not computed again by blocks: recompute='level'")
    if group_of(devices) is not None:
        return ()
    if devices == "auto":
        count = torch.cuda.device_count()
        devices = [f"cuda:{i}" for i in range(count)] if count else ["cpu"]
    if isinstance(devices, str) or not isinstance(devices, (Sequence, Mapping)) or not devices:
        raise ValueError(
            f"devices must be 'auto', a list of devices, one a band, or layers by device, not {devices!r}"
        )
    found = tuple(_device(device) for device in devices)
    if len({device.type for device in found}) > 1:
        raise ValueError(f"devices must be of one type, not {', '.join(map(str, found))}")
    if found[0].type not in ("cpu", "cuda"):
        raise ValueError(f"devices must be CPU or CUDA devices, not {found[0]}")
    return found


def layers_on(devices: Devices) -> tuple[int, ...]:
    """How many layers each device has; empty where that is not given.

    Raises:
        ValueError: these are no numbers of layers.
    """
    if not isinstance(devices, Mapping):
        return ()
    counts = tuple(devices.values())
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in counts):
        raise ValueError(f"devices must give each device a positive number of layers, not {devices!r}")
    return counts


def _device(device: Any) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        said = str(error).partition("\n")[0] if isinstance(device, str) else "a name, or a torch.device"
        raise ValueError(f"devices holds {device!r}, which is no device: {said}") from None
    if found.type == "cuda":
        count = torch.cuda.device_count()
        if found.index is None:
            found = torch.device("cuda", torch.cuda.current_device() if count else 0)
        if found.index >= count:
            raise ValueError(f"there is no device {found}: torch sees {count} CUDA devices")
    return found


def _check_backend(name: str) -> None:
    """Ask `torch.compile` for its backends, which imports dynamo and takes seconds: for seldom names only."""
    dynamo = torch._dynamo
    if name not in dynamo.list_backends(exclude_tags=()):
        usual = ", ".join(dynamo.list_backends())
        raise ValueError(f"backend must be 'auto' or a backend of torch.compile ({usual}), not {name!r}")
